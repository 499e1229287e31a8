"""Latents -> image in little memory: what `Decoder.forward` computes, a strip of rows at a time.

In: a `Decoder` and scaled latents (B, 4, H/8, W/8). Out: its image (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.blocks import ResidualBlock, Upsample
from sd.decoder import Decoder


@torch.no_grad()
def decode_in_strips(decoder: Decoder, latents: Tensor, rows: int = 32) -> Tensor:
    return torch.cat([_decode(decoder, one, rows) for one in latents.split(1)])


def _decode(decoder: Decoder, latents: Tensor, rows: int) -> Tensor:
    """Latents (1, 4, H/8, W/8) -> image (1, 3, H, W)."""
    x = decoder.post_quant_conv(latents / decoder.scaling_factor)  # (1, 4, H/8, W/8)
    x = decoder.middle(decoder.conv_in(x))  # (1, 512, H/8, W/8)
    coarse, fine = decoder.levels[2:], decoder.levels[:2]
    for level in reversed(coarse):
        x = Map(level.blocks(x), rows, level.upsample).whole()  # (1, 512, H/4, W/4), (1, 512, H/2, W/2)
    x = Map(x, rows)
    for level in reversed(fine):
        for block in level.blocks:
            x = Map(_residual_block(block, x), rows)  # (1, 256, H/2, W/2), (1, 128, H, W)
        if level is not decoder.levels[0]:
            x = Map(x.stored, rows, level.upsample)
    image = x.blank(3)
    for here, _, strip in _convolve(decoder.norm_out, decoder.conv_out, x):
        image[:, :, here] = strip
    return image


@dataclass
class Map:
    """A feature map (1, C, H, W) that is read in strips of rows: a tensor, or one seen through an upsampling."""

    stored: Tensor
    rows: int  # of a strip
    upsample: Upsample | None = None

    @property
    def height(self) -> int:
        return self.stored.shape[2] * (2 if self.upsample else 1)

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.stored.stride(1) == 1 else torch.contiguous_format

    def strips(self) -> Iterator[tuple[int, int]]:
        for top in range(0, self.height, self.rows):
            yield top, min(top + self.rows, self.height)

    def blank(self, channels: int) -> Tensor:
        """An uninitialised tensor (1, channels, H, W) in the same memory format."""
        x = self.stored
        width = x.shape[3] * (2 if self.upsample else 1)
        shape = (1, channels, self.height, width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.format)

    def whole(self) -> Tensor:
        out = self.blank(self.stored.shape[1])
        for top, bottom in self.strips():
            out[:, :, top:bottom] = self.read(top, bottom)
        return out

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom: (1, C, bottom - top, W)."""
        if self.upsample is None:
            return self.stored[:, :, top:bottom].contiguous(memory_format=self.format)
        above, below = max(top - 1, 0), min(bottom + 1, self.height)
        above, below = above // 2, (below + 1) // 2
        x = self.upsample(self.stored[:, :, above:below])
        return x[:, :, top - 2 * above : bottom - 2 * above].contiguous(memory_format=self.format)


def _residual_block(block: ResidualBlock, x: Map) -> Tensor:
    h = x.blank(block.conv1.out_channels)
    in_place = x.upsample is None and isinstance(block.shortcut, nn.Identity)
    out = x.stored if in_place else x.blank(block.conv1.out_channels)
    for here, strip, convolved in _convolve(block.norm1, block.conv1, x):
        h[:, :, here] = convolved
        if not in_place:
            out[:, :, here] = block.shortcut(strip)
    for here, _, convolved in _convolve(block.norm2, block.conv2, Map(h, x.rows)):
        out[:, :, here] += convolved
    return out


def _convolve(norm: nn.GroupNorm, conv: nn.Conv2d, x: Map) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """conv(silu(norm(x))) in strips: the rows it is about, those rows of x, and those of the result."""
    mean, variance = _statistics(norm, x)
    for top, bottom in x.strips():
        above, below = max(top - 1, 0), min(bottom + 1, x.height)
        strip = x.read(above, below)
        y = conv(F.silu(_batch_norm(norm, strip, mean, variance, training=False), inplace=True))
        inner = slice(top - above, bottom - above)
        yield slice(top, bottom), strip[:, :, inner], y[:, :, inner]


def _statistics(norm: nn.GroupNorm, x: Map) -> tuple[Tensor, Tensor]:
    shares, means, variances = [], [], []
    for top, bottom in x.strips():
        strip = x.read(top, bottom)
        n = strip[0, 0].numel()
        mean = torch.zeros(norm.num_channels, device=strip.device)
        variance = torch.ones_like(mean)
        _batch_norm(norm, strip, mean, variance, training=True)
        shares.append((bottom - top) / x.height)
        means.append(mean)
        variances.append(variance * ((n - 1) / n))
    share = torch.tensor(shares, device=mean.device)[:, None, None]
    means, variances = (torch.stack(v).unflatten(1, (norm.num_groups, -1)) for v in (means, variances))
    mean = (share * means).sum(0).mean(1)
    variance = (share * (variances + (means - mean[:, None]) ** 2)).sum(0).mean(1)
    size = norm.num_channels // norm.num_groups
    return mean.repeat_interleave(size), variance.repeat_interleave(size)


def _batch_norm(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor, training: bool) -> Tensor:
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.batch_norm(x, mean, variance, weight, bias, training, momentum=1, eps=norm.eps)
