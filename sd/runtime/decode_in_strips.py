"""Decodes latents one strip of rows at a time, in half the memory that `Decoder.forward` needs.

In: a `Decoder`, and scaled latents (B, 4, H/8, W/8). Out: its image (B, 3, H, W), the same up to rounding.

Decoding is when an image takes the most memory. At 1024x1024, in 16 bits, SD 1.5's decoder makes feature maps of 256
channels, 537 MB each, and three to five of them exist at once: a map, its normalised copy, and what SiLU and the
convolution make of that.

A row of a block's output depends on a few rows of its input, with one exception: GroupNorm uses the mean and variance
of the whole map. (This is why decoding in tiles leaves seams: every tile has a different mean and variance.) So every
norm here reads its map twice. The first time it measures the map. The second time it normalises it strip by strip, and
each strip goes through SiLU and the convolution. A strip is read with one more row above and below, for the 3x3 kernel.

Only three maps are stored whole: a block's input and the outputs of its two convolutions. The second output is added
to the input in place. The largest map is never stored: its rows are computed from the map before the upsampling, once
to measure them and once to use them. That is an eighth more work for the whole decoder. At 1024x1024 this leaves 134 MB
for 256 channels at 512x512, 2 x 268 MB for 128 channels at 1024x1024, and the strips.

At 1024x1024 in bfloat16, it takes 0.82 GB beyond the weights instead of 1.70 GB, in the same time. README.md has the
other measurements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.blocks import ResidualBlock, Upsample
from sd.decoder import Decoder
from sd.runtime.devices import is_compiled

# The peak memory of `Decoder.forward`, as a multiple of its largest map, with a margin. Measured on the CPU: 3.2 in
# channels-last order, 3.9 in contiguous order in float32, 5.4 in contiguous order in bfloat16.
MAPS_AT_ONCE = 5.5
FREE_IF_UNKNOWN = 2 << 30  # bytes
LARGE_MAP = 128 << 20  # bytes: the decoder's largest at 512x512 has 256 MB in float32


def needed(decoder: Decoder, latents: Tensor) -> bool:
    """Whether the decoder should decode in strips. There are two cases.

    One: `decoder(latents)`, one image of the batch at a time, might need more memory than is free on its device.
    Two: the maps are large and in float32 on a CPU, where strips save the most memory and cost almost no time. The
    second case has two exceptions: decoders with forward hooks (those of a `Tracer`, for example), which strips would
    bypass, and compiled decoders, which are faster whole.

    A tiny decoder (`sd.adapters.tiny_autoencoder`) decodes whole: it has no such levels, and small maps.
    """
    if not isinstance(decoder, Decoder):
        return False
    weight = decoder.conv_in.weight
    pixels = latents.shape[-2] * latents.shape[-1] * 4 ** (len(decoder.levels) - 1)
    largest = decoder.levels[0].blocks[0].norm1.num_channels * pixels * weight.element_size()  # bytes
    free = _free_memory(weight.device)
    if MAPS_AT_ONCE * largest > (FREE_IF_UNKNOWN if free is None else free):
        return True
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and largest >= LARGE_MAP and not _has_hooks(decoder) and not is_compiled(decoder)


def _has_hooks(decoder: Decoder) -> bool:
    """Whether any module has a forward hook. Strips use the weights of most modules without calling the modules."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


def _free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on the device, or None if that is unknown."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):  # torch 2.5
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    meminfo = Path("/proc/meminfo")  # Linux
    if device.type == "cpu" and meminfo.exists():
        available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        return int(available[1]) * 1024 if available else None
    return None


class InStrips(nn.Module):
    """Wraps a decoder so that calling it decodes in strips, without gradients."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/8, W/8) -> image (B, 3, H, W)."""
        return decode_in_strips(self.decoder, latents)


@torch.no_grad()
def decode_in_strips(decoder: Decoder, latents: Tensor, rows: int = 16) -> Tensor:
    """Scaled latents (B, 4, H/8, W/8) -> image (B, 3, H, W), in strips of `rows` rows, without gradients.

    Fewer rows take less memory and more time. Raises ValueError if `rows` is less than 1.
    """
    if rows < 1:
        raise ValueError(f"rows should be at least 1, not {rows}.")
    return torch.cat([_decode(decoder, one, rows) for one in latents.split(1)])


def _decode(decoder: Decoder, latents: Tensor, rows: int) -> Tensor:
    """Latents (1, 4, H/8, W/8) -> image (1, 3, H, W)."""
    x = decoder.post_quant_conv(latents / decoder.scaling_factor)  # (1, 4, H/8, W/8)
    x = decoder.middle(decoder.conv_in(x))  # (1, 512, H/8, W/8)
    coarse, fine = decoder.levels[2:], decoder.levels[:2]
    for level in reversed(coarse):  # their maps are small: only the upsampling goes in strips
        x = FeatureMap(level.blocks(x), rows, level.upsample).whole()  # (1, 512, H/4, W/4), (1, 512, H/2, W/2)
    x = FeatureMap(x, rows)
    for level in reversed(fine):
        for block in level.blocks:
            x = FeatureMap(_residual_block(block, x), rows)  # (1, 256, H/2, W/2), (1, 128, H, W)
        if level is not decoder.levels[0]:
            x = FeatureMap(x.stored, rows, level.upsample)  # (1, 256, H, W), never stored
    image = x.blank(3)
    for here, _, strip in _norm_silu_conv(decoder.norm_out, decoder.conv_out, x):
        image[:, :, here] = strip
    return image


@dataclass
class FeatureMap:
    """A map (1, C, H, W) that is read in strips: a stored tensor, or its upsampling, computed as it is read."""

    stored: Tensor  # (1, C, H, W), or (1, C, H / 2, W / 2) with an upsampling
    rows: int  # in a strip
    upsample: Upsample | None = None

    def __post_init__(self):
        scale = 1 if self.upsample is None else 2
        self.height, self.width = (scale * side for side in self.stored.shape[2:])
        self.format = torch.channels_last if self.stored.stride(1) == 1 else torch.contiguous_format

    def strips(self) -> Iterator[tuple[int, int]]:
        """For each strip, its first row and the row after its last."""
        for top in range(0, self.height, self.rows):
            yield top, min(top + self.rows, self.height)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows `top` to `bottom` - 1: (1, C, bottom - top, W)."""
        if self.upsample is None:
            x = self.stored[:, :, top:bottom]
            return x.contiguous(memory_format=self.format)  # most kernels are slow on other tensors
        above, below = max(top - 1, 0), min(bottom + 1, self.height)
        x = self.stored[:, :, above // 2 : (below + 1) // 2]
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, above % 2 : above % 2 + below - above]
        return _convolve(self.upsample.conv, x, top == above, bottom == below)

    def blank(self, channels: int) -> Tensor:
        """An uninitialised tensor (1, channels, H, W) with the same dtype, device and memory format."""
        x, shape = self.stored, (1, channels, self.height, self.width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.format)

    def whole(self) -> Tensor:
        """The whole map as a tensor (1, C, H, W)."""
        out = self.blank(self.stored.shape[1])
        for top, bottom in self.strips():
            out[:, :, top:bottom] = self.read(top, bottom)
        return out


def _residual_block(block: ResidualBlock, x: FeatureMap) -> Tensor:
    """The output of `block` for the map x: (1, out_channels, H, W).

    If the shortcut is the identity and x is stored, the output overwrites x.
    """
    in_place = x.upsample is None and isinstance(block.shortcut, nn.Identity)
    h = x.blank(block.conv1.out_channels)
    out = x.stored if in_place else x.blank(block.conv1.out_channels)
    for here, strip, convolved in _norm_silu_conv(block.norm1, block.conv1, x):
        h[:, :, here] = convolved
        if not in_place:
            out[:, :, here] = block.shortcut(strip)
    for here, _, convolved in _norm_silu_conv(block.norm2, block.conv2, FeatureMap(h, x.rows)):
        out[:, :, here] += convolved
    return out


def _norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: FeatureMap) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """conv(silu(norm(x))), strip by strip. Yields a slice of rows, these rows of x, and these rows of the result."""
    mean, variance = _statistics(norm, x)
    for top, bottom in x.strips():
        above, below = max(top - 1, 0), min(bottom + 1, x.height)
        strip = x.read(above, below)
        y = F.silu(_batch_norm(norm, strip, mean, variance), inplace=True)
        y = _convolve(conv, y, top == above, bottom == below)
        yield slice(top, bottom), strip[:, :, top - above : bottom - above], y


def _convolve(conv: nn.Conv2d, x: Tensor, first: bool, last: bool) -> Tensor:
    """A 3x3 convolution of a strip that has one extra row above and below, or zeros there at the edge of the map."""
    if first or last:
        x = F.pad(x, (0, 0, int(first), int(last)))
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))


def _statistics(norm: nn.GroupNorm, x: FeatureMap) -> tuple[Tensor, Tensor]:
    """The mean and variance that GroupNorm uses for each channel: both float32 (C,).

    The mean of the squares minus the square of the mean would lose all precision if the mean is large. This uses the
    law of total variance instead: the variance of a group is the mean of its parts' variances plus the variance of its
    parts' means. A part is one channel of one strip.
    """
    shares, means, variances = [], [], []
    for top, bottom in x.strips():
        # Two tensors, not two halves of one: those are views, and MPS would update a copy of them.
        mean, variance = (torch.zeros(norm.num_channels, device=x.stored.device) for _ in range(2))
        _batch_norm(norm, x.read(top, bottom), mean, variance, measure=True)
        count = (bottom - top) * x.width
        shares.append((bottom - top) / x.height)
        means.append(mean)
        variances.append(variance * (1 - 1 / count))  # BatchNorm divides by count - 1, GroupNorm by count
    share = torch.tensor(shares, device=mean.device)[:, None, None]
    means, variances = (torch.stack(parts).unflatten(1, (norm.num_groups, -1)) for parts in (means, variances))
    mean = (share * means).sum(0).mean(1, keepdim=True)  # (groups, 1), from (strips, groups, C / groups)
    variance = (share * (variances + (means - mean) ** 2)).sum(0).mean(1, keepdim=True)
    return tuple(part.expand(means.shape[1:]).flatten() for part in (mean, variance))


def _batch_norm(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor, measure: bool = False) -> Tensor:
    """x (1, C, h, W) normalised with a mean and variance per channel. With `measure`, they are first set to those of x.

    GroupNorm can neither take a mean and variance nor return them. BatchNorm can do both, for single channels.
    """
    weight, bias = norm.weight.float(), norm.bias.float()
    wide = x.float() if x.device.type == "mps" else x  # MPS aborts the process if x has 16 bits and weight has 32
    return F.batch_norm(wide, mean, variance, weight, bias, training=measure, momentum=1, eps=norm.eps).to(x.dtype)
