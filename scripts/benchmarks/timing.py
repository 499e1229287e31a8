"""Timing on a device, and the rate of a product of matrices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds that the function takes, including work that it queued on the device."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def gemm(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """Operations per second in a product of large matrices: an upper limit for every network on this machine."""
    a, b = _square(side, device, dtype), _square(side, device, dtype)
    best = min(timed(device, lambda: a @ b) for _ in range(4))
    return 2 * side**3 / best


def steady_gemm(device: torch.device, dtype: torch.dtype, seconds: float = 1, side: int | None = None) -> float:
    """Operations per second in products of matrices that are repeated for this time. The mean, and not the best: it
    falls if another program takes a part of the time."""
    side = side or (2048 if device.type == "cpu" else 8192)
    a, b = _square(side, device, dtype), _square(side, device, dtype)
    timed(device, lambda: a @ b)  # chooses kernels and wakes the threads
    spent = []
    while sum(spent) < seconds:
        spent.append(timed(device, lambda: a @ b))
    return 2 * side**3 * len(spent) / sum(spent)


def _square(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(side, side, device=device, dtype=dtype)
