"""In which precision training multiplies: bfloat16, but for CPUs that would only imitate it, far more slowly.

In: a device. Out: a dtype for products, or the context in which torch chooses it operation by operation. Weights and
their averages are float32 in any case.
"""

from __future__ import annotations

import torch

from sd.model_loader import best_dtype


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, whose range is that of float32, so that no gradient vanishes; or float32 on a CPU without it."""
    return torch.float32 if best_dtype(device) == torch.float32 else torch.bfloat16


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in `product_dtype`, sums and norms in float32, as torch knows best (1710.03740)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=product_dtype(device) == torch.bfloat16)
