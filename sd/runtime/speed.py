"""What makes the same networks faster on the device at hand: memory order, the heap, packed weights, compilation.

In: networks that were just loaded. Out: the same networks, whose numbers are the same but for rounding. All of it is
chosen in `load_models`, and `load_models(..., tuned=False)` goes without.

Measured on two cores with bfloat16 matrix instructions, one step of SD 1.5's U-Net with a batch of two: 2.85 s as
loaded, 2.4 s in channels-last order with freed memory kept, 2.15 s with packed weights; a decode at 512x512: 6.1 s, and
2.9 s in channels-last order.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sd.diffusion import GEGLU

# What GNU's malloc calls the limits below (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_KEPT = 32 << 20  # bytes: it accepts no more


def memory_format(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """How a weight should lie in memory: that of a convolution in channels-last order, where it helps.

    In 16 bits the fast kernels of CUDA and of the CPU read all channels of a pixel together; given another order they
    turn every feature map round, twice a layer. In float32 that gains nothing, and weights can stay where the file has
    them.
    """
    if tensor.ndim == 4 and dtype != torch.float32 and device.type in ("cuda", "cpu"):
        return torch.channels_last
    return torch.preserve_format


def keep_freed_memory() -> None:
    """Lets the C library reuse large blocks. By default it hands them back to the system as soon as they are free, and
    every feature map then begins with thousands of page faults. No effect but on Linux with the GNU library."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, size in ((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, LARGEST_KEPT)):
        mallopt(option, size)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed weights help here: on a CPU, in bfloat16, where torch has oneDNN."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    # Without AVX-512 or its like, oneDNN has kernels that compute in bfloat16, but none that packs.
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def place_weights(module: nn.Module, place: Callable[[Tensor], Tensor], pack: bool) -> None:
    """Replaces each weight of a network by `place(weight)`; with `pack`, also packs its convolutions and GEGLUs.

    Packed weights lie in the order that oneDNN's bfloat16 kernels read, which would else bring them into it at every
    call. For prediction only: packed layers have no gradient, and can be neither copied nor brought to another dtype or
    device. The kernels are torch's own, those that its compiler chooses (torch._inductor.mkldnn_ir), called by name.

    All this is done layer by layer, so that each uses the memory that the one before it left: getting new memory from
    the system is what takes the most time here.
    """
    for name, weight in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(place(weight.detach()), requires_grad=False))
    for name, child in module.named_children():
        place_weights(child, place, pack)
        if pack and isinstance(child, (nn.Conv2d, GEGLU)):
            setattr(module, name, PackedConvolution(child) if isinstance(child, nn.Conv2d) else PackedGEGLU(child))


class PackedConvolution(nn.Module):
    """nn.Conv2d with packed weights."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.bias = conv.bias
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.geometry)
        self.packed = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C', h', w')."""
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.geometry, "none", [], "")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Called by `state_dict`: the weights unpacked, under the names that they have otherwise."""
        destination[f"{prefix}weight"], destination[f"{prefix}bias"] = self.packed.to_dense(), self.bias.detach()


class PackedGEGLU(nn.Module):
    """GEGLU with packed weights, as two products: the second one multiplies its result by the first as it goes."""

    def __init__(self, geglu: GEGLU):
        super().__init__()
        halves = geglu.proj.weight.detach().chunk(2)  # of the value, of the gate
        packed = (torch.ops.mkldnn._reorder_linear_weight(half.contiguous(), None) for half in halves)
        self.value, self.gate = (nn.Parameter(half, requires_grad=False) for half in packed)
        self.bias = geglu.proj.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, out_width)."""
        linear, biases = torch.ops.mkldnn._linear_pointwise, self.bias.chunk(2)
        gate = linear(x, self.gate, biases[1], "gelu", [], "none")  # (B, N, out_width)
        return linear.binary(x, gate, self.value, biases[0], "mul")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Called by `state_dict`: the weights unpacked, under the names that they have otherwise."""
        destination[f"{prefix}proj.weight"] = torch.cat([self.value.to_dense(), self.gate.to_dense()])
        destination[f"{prefix}proj.bias"] = self.bias.detach()


def compile_networks(networks: list[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """torch.compile, in place. The first picture then takes minutes, and the next ones less time each.

    On CUDA the kernels of a whole step are recorded as one graph. A graph overwrites its last output, which is safe
    only where outputs are copied into float32 at once, as they are in 16 bits.
    """
    if device.type == "cpu":
        settings = {"options": {"freezing": True}}  # weights in the order that their kernels want, once and for all
    else:
        settings = {"mode": "max-autotune" if dtype != torch.float32 else "max-autotune-no-cudagraphs"}
    # One graph a size, with guidance and without: beyond eight of them, torch would run the rest uncompiled.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for network in networks:
        network.compile(dynamic=False, **settings)
