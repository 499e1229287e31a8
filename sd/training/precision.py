"""Mixed precision: matrix products in bfloat16 where the device supports it natively, otherwise in float32.

Devices that only emulate bfloat16 are much slower with it. On MPS it is not used: torch 2.4 does not support it there,
and later versions are not reliable. Weights and their averages are always float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sd.runtime.devices import best_dtype


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device has it natively, otherwise float32.

    bfloat16 has the range of float32, so that, unlike in float16, small gradients do not become 0.
    """
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() also counts emulation, which is slower than float32
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and best_dtype(device) == torch.bfloat16
    return torch.bfloat16 if native else torch.float32


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """A context for products in `product_dtype`; torch keeps sums and norms in float32 (1710.03740)."""
    return torch.autocast(device.type, torch.bfloat16) if product_dtype(device) == torch.bfloat16 else nullcontext()
