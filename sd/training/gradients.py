"""The gradient of a batch: in one process, on threads of a CPU, or over the ranks of torchrun.

Both ways are called with a whole batch. They leave its gradient in the parameters, and return its loss. With
`accumulate` n, n parts of the batch are computed one after the other, and memory holds the activations of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from sd.training import ranks
from sd.training.precision import mixed_precision, product_dtype

if TYPE_CHECKING:
    from sd.training.loop import Stage


class OneProcess:
    """On a CPU with several cores, parts of the batch are computed at the same time, each by a thread."""

    def __init__(self, stage: Stage, device: torch.device, accumulate: int = 1):
        self.stage, self.device, self.accumulate = stage, device, accumulate
        self.parameters = list(stage.networks.parameters())
        # On a CPU with two cores, two threads with half a batch each are faster than one thread whose operations use
        # both cores: operations on small tensors are too short to be split.
        workers = os.cpu_count() or 1 if device.type == "cpu" and stage.divisible else 1
        self.workers = max(1, min(workers, stage.batch_size // accumulate // 8, 8))
        self.map = map

    @contextmanager
    def ready(self) -> Iterator[Callable]:
        """Keeps the threads for as long as the block runs. Gives their `map`."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            if self.workers > 1:
                torch.set_num_threads(1)
                self.map = pool.map
            try:
                yield self.map
            finally:
                torch.set_num_threads(threads)
                self.map = map

    def __call__(self, batch: list[Tensor]) -> float:
        total = 0.0
        for parameter in self.parameters:
            parameter.grad = None
        for part in split(batch, self.accumulate):
            losses, gradients = zip(*self.map(self.of_part, split(part, self.workers)))
            total += sum(losses)
            for parameter, *shares in zip(self.parameters, *gradients):
                gradient = sum(shares[1:], shares[0])  # always in the same order: float sums depend on it
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total

    def of_part(self, part: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """Of one part of the batch: its share of the loss, and of the gradient of every parameter."""
        with mixed_precision(self.device), plain_attention(self.device):
            loss = self.stage.loss(*part) * weight(self.stage, part)
        return loss.item(), torch.autograd.grad(loss, self.parameters)


class ManyRanks:
    """Each rank computes the gradient of its `share`; DistributedDataParallel averages them (2006.15704). Networks that
    are sharded average their gradients themselves."""

    def __init__(self, stage: Stage, device: torch.device, accumulate: int = 1, sharded: bool = False):
        self.stage, self.device, self.accumulate = stage, device, accumulate
        self.module, self.alone = StageLoss(stage), nullcontext
        if not sharded:
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.alone = self.module.no_sync
        # With it, the mean over ranks is the sum of their shares. A loss that gathers is whole on every rank.
        self.factor = ranks.count() if stage.divisible else 1

    def ready(self) -> AbstractContextManager[Callable]:
        return nullcontext(map)

    def __call__(self, batch: list[Tensor]) -> float:
        total = 0.0
        self.module.zero_grad()
        parts = split([ranks.share(tensor) for tensor in batch], self.accumulate)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            # Only the last part waits for the other ranks: it then exchanges the sum.
            with nullcontext() if last else self.alone():
                with mixed_precision(self.device), plain_attention(self.device):
                    loss = self.module(*part) * self.factor * weight(self.stage, part)
                loss.backward()
            total += loss.item()
        return ranks.mean(total)


class StageLoss(nn.Module):
    """The loss of a stage as a module, because DistributedDataParallel needs one."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage, self.networks = stage, stage.networks

    def forward(self, *part: Tensor) -> Tensor:
        return self.stage.loss(*part)


def weight(stage: Stage, part: tuple[Tensor, ...]) -> float:
    """The share of a part in the loss of the whole batch."""
    return len(part[0]) / stage.batch_size if stage.divisible else 1.0


def split(batch: list[Tensor] | tuple[Tensor, ...], count: int) -> list[tuple[Tensor, ...]]:
    """A batch -> `count` parts whose sizes differ by one row at most."""
    return list(zip(*(tensor.tensor_split(count) for tensor in batch)))


def plain_attention(device: torch.device) -> AbstractContextManager:
    """`StoredAttention` on a CPU that computes products in bfloat16."""
    stored = device.type == "cpu" and product_dtype(device) == torch.bfloat16
    return StoredAttention() if stored else nullcontext()


class StoredAttention(TorchFunctionMode):
    """Plain attention that keeps its scores for the backward pass: in bfloat16 on a CPU, several times faster than the
    built-in function, which computes them again. In float32, the built-in one is faster."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        query, key, value = args  # (B, heads, N, d), (B, heads, M, d), (B, heads, M, d)
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)  # (B, heads, N, M)
        return scores.softmax(dim=-1).to(value.dtype) @ value  # (B, heads, N, d)
