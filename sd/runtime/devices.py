"""Choosing a device and a dtype, moving networks, and a workaround for attention on Apple's GPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Device = torch.device | str | None

STORING_DEVICES = ("mps",)  # where attention may have no fused kernel, and stores its scores in float32
MAX_SCORE_BYTES = 1 << 30  # bytes of scores at a time


def best_device(device: Device = None) -> torch.device:
    """`device` itself, or the fastest one here: CUDA, MPS, CPU. Raises ValueError for one that torch cannot use."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if torch.empty(0, device=device).is_meta:  # the meta device computes nothing
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device should be one that torch can use here, such as 'cpu', not {device!r}.") from error
    return torch.device(device)


def best_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype:
    """`dtype` itself, or the fastest one without a visible loss. Raises ValueError for a dtype that is not supported.

    That is float16 on a GPU, bfloat16 on a CPU that multiplies bfloat16 natively, and float32 elsewhere.
    """
    supported = (torch.float32, torch.float16, torch.bfloat16)
    if dtype is None:
        if device.type != "cpu":
            return torch.float16
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    if dtype not in supported:
        raise ValueError(f"dtype should be one of {', '.join(map(str, supported))}, not {dtype!r}.")
    return dtype


def device_and_dtype(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a network's weights."""
    parameter = next(network.parameters())
    return parameter.device, parameter.dtype


@contextmanager
def on_device(network: nn.Module, device: torch.device, idle_device: Device = None) -> Iterator[None]:
    """Moves the network to `device` for the block, then to `idle_device` if one is given.

    Raises ValueError for packed weights, which cannot move (`sd.runtime.speed`).
    """
    try:
        network.to(device)
    except NotImplementedError:
        raise ValueError(
            f"Packed weights cannot move to {device}: load the models there, or with tuned=False."
        ) from None
    except BaseException:  # out of memory, with a part of the network moved
        if idle_device is not None:
            network.to(idle_device)
        raise
    try:
        yield
    finally:
        if idle_device is not None:
            network.to(idle_device)


def is_compiled(network: nn.Module) -> bool:
    """Whether `torch.compile` has compiled the network. Its modules then run without being called: hooks never fire."""
    return network._compiled_call_impl is not None


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """torch's function of that name: query (B, heads, N, d), key and value (B, heads, M, d) -> (B, heads, N, d).

    On MPS it does two things differently. torch may have no fused kernel there and store all scores (B, heads, N, M),
    so queries go in chunks whose scores take at most 1 GB. And `is_causal` lets 16-bit queries see later positions
    (pytorch issue 195910), so the mask is written out.
    """
    if query.device.type not in STORING_DEVICES:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    if causal:  # the text encoder: few queries
        # Made on the CPU: on MPS, triu of infinities is NaN in torch 2.4 (pytorch issue 128429).
        later = torch.full((query.shape[2], key.shape[2]), -math.inf).triu(1).to(query)  # (N, M)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=later)
    batch, heads = query.shape[:2]
    rows = max(1, MAX_SCORE_BYTES // (4 * batch * heads * key.shape[2]))  # scores are float32
    return torch.cat([F.scaled_dot_product_attention(chunk, key, value) for chunk in query.split(rows, dim=2)], dim=2)


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 dot products. Only Linux lists them; torch has no public function for it."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None
