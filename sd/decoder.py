"""Latents -> image: the second half of the variational autoencoder (1312.6114; 2112.10752, section 3.1).

In: scaled latents (B, 4, H/8, W/8). Out: an image (B, 3, H, W), in [-1, 1] except for a little overshoot.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sd.blocks import EPS, ResidualBlock, Upsample, middle
from sd.config import VAEConfig


class UpLevel(nn.Module):
    """Residual blocks at one resolution, then upsampling to twice that (except in the finest level)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, last: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, groups, EPS) for a, b in zip(widths, widths[1:])))
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, 2 H, 2 W), or for the finest level (B, out_channels, H, W)."""
        return self.upsample(self.blocks(x))


class Decoder(nn.Module):
    """The VAE's decoder. Its levels are numbered like the encoder's, finest first, and so run backwards."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.scaling_factor = config.scaling_factor
        self.gradient_checkpointing = False  # True: a gradient costs less memory and more time (`guidance.by_loss`)
        widths = [*config.channels, config.channels[-1]]
        top = config.channels[-1]
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, top, 3, padding=1)
        self.middle = middle(top, config.groups)
        self.levels = nn.ModuleList(
            UpLevel(below, here, config.blocks_per_level + 1, config.groups, last=i == 0)
            for i, (here, below) in enumerate(zip(widths, widths[1:]))
        )
        self.norm_out = nn.GroupNorm(config.groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/8, W/8) -> image (B, 3, H, W)."""
        x = self.post_quant_conv(latents / self.scaling_factor)  # (B, 4, H/8, W/8)
        x = self.conv_in(x)  # (B, 512, H/8, W/8)
        x = self.middle(x)
        for level in reversed(self.levels):
            # (B, 512, H/4, W/4), (B, 512, H/2, W/2), (B, 256, H, W), (B, 128, H, W)
            x = checkpoint(level, x, use_reentrant=False) if self.gradient_checkpointing else level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)
