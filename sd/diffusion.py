"""Noisy latents, timestep, context -> predicted noise: the U-Net (1505.04597; 2112.10752, section 3.3).

In: latents (B, 4, h, w) of any height and width, context (B, 77, 768), timesteps (B,). Out: noise (B, 4, h, w).

Going down, every stage's output is kept. Going up, every stage gets the kept map of its own resolution beside its
input, so that fine detail does not have to pass through the narrow middle.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import CrossAttention, SelfAttention
from sd.blocks import Downsample, ResidualBlock, Upsample
from sd.config import UNetConfig


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Timesteps (B,) in [0, 999] -> (B, width): the sinusoidal encoding of 1706.03762, section 3.5, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)  # (half,)
    angles = timesteps.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, width)


def guidance_embedding(scales: Tensor, width: int) -> Tensor:
    """Guidance scales (B,), 1 for none -> (B, width): the encoding of w = scale - 1 for LCM's U-Net (2310.04378)."""
    half = width // 2
    step = torch.tensor(math.log(10000)) / (half - 1)  # rounded to float32, as in training: angles reach 10,000
    frequencies = torch.exp(-step * torch.arange(half, device=scales.device))  # (half,)
    angles = 1000 * (scales.float()[:, None] - 1) * frequencies  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (B, width)


class GEGLU(nn.Module):
    """A linear layer; one half of its output gates the other: a * GELU(b) (2002.05202, eq. 5)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, out_width)."""
        value, gate = self.proj(x).chunk(2, dim=-1)  # (B, N, out_width) each
        return value * F.gelu(gate)


class SpatialTransformer(nn.Module):
    """Where the image meets the prompt: self-attention over pixels, cross-attention to tokens, a perceptron."""

    def __init__(self, channels: int, heads: int, groups: int, context_width: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.self_norm = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, heads, qkv_bias=False)
        self.cross_norm = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, context_width, heads)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(GEGLU(channels, 4 * channels), nn.Linear(4 * channels, channels))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, h, w), context (B, 77, context_width) -> (B, C, h, w)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, h w, C)
        tokens = self.proj_in(tokens)
        tokens = tokens + self.self_attention(self.self_norm(tokens))
        tokens = tokens + self.cross_attention(self.cross_norm(tokens), context)
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        tokens = self.proj_out(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, h, w)


class Stage(nn.Sequential):
    """Layers in a row. Each gets the feature map, and the time or the context if it reads it."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x (B, C, h, w), time (B, time_width), context (B, 77, D) -> (B, C', h', w'); `size` is for Upsample."""
        for layer in self:
            if isinstance(layer, ResidualBlock):
                x = layer(x, time)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class ContractingPath(nn.Module):
    """The way down, the middle and the time embedding of a U-Net. A ControlNet has a copy of them (2302.05543)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        first, time_width = config.channels[0], 4 * config.channels[0]
        self.time_embedding = nn.Sequential(nn.Linear(first, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.down = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, first, 3, padding=1))])
        self.skip_widths = [first]  # the channels of the kept maps
        for level, (width, attends) in enumerate(zip(config.channels, config.attention)):
            for _ in range(config.blocks_per_level):
                self.down.append(Stage(*_block(config, self.skip_widths[-1], width, attends)))
                self.skip_widths.append(width)
            if level < len(config.channels) - 1:
                self.down.append(Stage(Downsample(width, symmetric=True)))
                self.skip_widths.append(width)
        self.middle = Stage(*_block(config, width, width, attends=True), *_block(config, width, width, attends=False))

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
        """Timesteps (B,), and guidance scales (B,) for an LCM's U-Net -> the time embedding (B, 1280) that every
        residual block reads."""
        embedding = timestep_embedding(timesteps, self.config.channels[0]).to(dtype)  # (B, 320)
        if scales is not None:
            guidance = guidance_embedding(scales, self.config.guidance_width).to(dtype)  # (B, 256)
            embedding = embedding + self.guidance_projection(guidance)
        return self.time_embedding(embedding)


def _block(config: UNetConfig, in_channels: int, out_channels: int, attends: bool) -> list[nn.Module]:
    """A residual block, and a transformer if this level reads the prompt."""
    layers: list[nn.Module] = [ResidualBlock(in_channels, out_channels, config.groups, 1e-5, 4 * config.channels[0])]
    if attends:
        heads = config.heads_of(out_channels)
        layers.append(SpatialTransformer(out_channels, heads, config.groups, config.context_width))
    return layers


class Diffusion(ContractingPath):
    """The U-Net. For SD 1.5: 12 stages down, a middle, 12 stages up, over four resolutions."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        if config.guidance_width is not None:
            self.guidance_projection = nn.Linear(config.guidance_width, config.channels[0], bias=False)
        self.up = nn.ModuleList()
        below, skips = config.channels[-1], list(self.skip_widths)
        for level, (width, attends) in reversed(list(enumerate(zip(config.channels, config.attention)))):
            for _ in range(config.blocks_per_level + 1):
                self.up.append(Stage(*_block(config, below + skips.pop(), width, attends)))
                below = width
            if level > 0:
                self.up[-1].append(Upsample(width))

        self.norm_out = nn.GroupNorm(config.groups, config.channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        context: Tensor,
        timesteps: Tensor,
        residuals: list[Tensor] | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """latents (B, 4, h, w), context (B, 77, context_width), timesteps (B,) -> predicted noise (B, 4, h, w).

        `residuals` come from a ControlNet: one map for each kept map, to be added to it, and one for the middle.
        `scales` (B,) are the guidance scales for a U-Net with a `guidance_width`.
        """
        time = self.embed_time(timesteps, latents.dtype, scales)  # (B, 1280)
        x, skips = latents, []
        for stage in self.down:
            x = stage(x, time, context)  # (B, 320, h, w) down to (B, 1280, h/8, w/8)
            skips.append(x)
        x = self.middle(x, time, context)  # (B, 1280, h/8, w/8)
        if residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, residuals)]
            x = x + residuals[-1]
        for stage in self.up:
            x = torch.cat([x, skips.pop()], dim=1)  # with the map of the same size from the way down
            # Upsample to the size of the next kept map: doubling would miss an odd size by one pixel.
            x = stage(x, time, context, size=skips[-1].shape[-2:] if skips else None)  # up to (B, 320, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 4, h, w)
