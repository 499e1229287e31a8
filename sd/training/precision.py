"""In which precision training multiplies: bfloat16, but for CPUs that would only imitate it, far more slowly, and for
Apple's GPUs, on which torch 2.4 refuses it and later versions are not to be relied on.

In: a device. Out: a dtype for products, or the context in which torch chooses it operation by operation. Weights and
their averages are float32 in any case.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sd.runtime.devices import best_dtype


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, whose range is that of float32, so that no gradient vanishes; or float32 where there is none."""
    if device.type == "cuda":  # "supported" counts imitations too, which are slower than float32
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and best_dtype(device) == torch.bfloat16
    return torch.bfloat16 if native else torch.float32


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Products in `product_dtype`, sums and norms in float32, as torch knows best (1710.03740)."""
    return torch.autocast(device.type, torch.bfloat16) if product_dtype(device) == torch.bfloat16 else nullcontext()
