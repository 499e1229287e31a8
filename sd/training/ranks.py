"""The ranks of a training run: the processes that torchrun starts, each with its own device and its share of a batch.

They form torch's default process group, which `joined` makes. All functions here also work without one: there is then
one rank, number 0. Every function that waits for another rank has to be called by all of them, in the same order.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn import functional as F


@contextmanager
def joined(store: distributed.Store, rank: int, count: int, device: torch.device, wait: float) -> Iterator[None]:
    """The process group, for as long as the block runs. `wait` is the time limit, in seconds, of each operation.

    Numbers on the CPU are exchanged by gloo, tensors on a GPU by NCCL. Raises ConnectionError, in one sentence, if
    another rank stops or does not come in time.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with _one_sentence(wait):
        limit = timedelta(seconds=wait)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
        yield
        distributed.destroy_process_group()  # not after an error: other ranks may be gone


@contextmanager
def _one_sentence(wait: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, distributed.DistError) and "gloo" not in text and "onnection" not in text:
            raise
        reason = text.strip().partition("\n")[0].rpartition("] ")[2][:100].rstrip(".")
        raise ConnectionError(
            f"another rank stopped, or did not come within {wait:g} s (--wait): {reason}. Run the same command again "
            "to resume from the last saved state."
        ) from error


def joins() -> bool:
    """Whether this process is in a process group, perhaps alone."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if joins() else 0


def count() -> int:
    return distributed.get_world_size() if joins() else 1


def clock() -> float:
    """Rank 0's time in seconds, on all ranks: what depends on it is then decided alike. The others wait for rank 0."""
    now = torch.tensor(time.monotonic(), dtype=torch.float64)
    if count() > 1:
        distributed.broadcast(now, src=0)
    return now.item()


def mean(value: float) -> float:
    """The mean of all ranks' values, on all ranks."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.item() / count()


def everyones(value: object) -> list:
    """The values of all ranks, on all ranks. They are pickled."""
    values = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the block and writes its files. The others then run it, and find them."""
    if rank() > 0:
        clock()
    yield
    if rank() == 0:
        clock()


def share(batch: Tensor) -> Tensor:
    """This rank's rows of a batch: every rank draws the whole batch from the same generator, and so no loss depends on
    the number of ranks."""
    return batch[rank() :: count()]


def gather(vectors: Tensor) -> Tensor:
    """The vectors (B', D) of each rank's `share` -> those of the whole batch (B, D), with the gradients of all. The
    rows of rank 0 come first."""
    if count() == 1:
        return vectors
    sizes = [torch.tensor(0) for _ in range(count())]
    distributed.all_gather(sizes, torch.tensor(len(vectors)))
    return Gather.apply(vectors, [int(size) for size in sizes])


class Gather(torch.autograd.Function):
    """What `gather` does. torch's own function for it is deprecated, and takes shares of one size only."""

    @staticmethod
    def forward(context, vectors: Tensor, sizes: list[int]) -> Tensor:
        context.sizes = sizes
        padded = F.pad(vectors, (0, 0, 0, max(sizes) - len(vectors)))  # shares may differ by one row
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)  # each rank's loss depends on the vectors of all
        return total.split(context.sizes)[rank()], None


def check_shared(out: Path) -> None:
    """Raise ValueError, on all ranks, unless all of them see the same folder `out`."""
    if count() == 1:
        return
    token = out / f".shared-{secrets.token_hex(8)}"
    token = out / everyones(token.name)[0]
    if rank() == 0:
        token.touch()
    with rank_0_first():
        found = token.exists()
    blind = [number for number, found in enumerate(everyones(found)) if not found]
    if rank() == 0:
        token.unlink()
    if blind:
        raise ValueError(
            f"--out should be a folder that all ranks share: rank {blind[0]} has another {out} than rank 0."
        )
