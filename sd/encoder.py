"""Image -> latents: the first half of the variational autoencoder (1312.6114; 2112.10752, section 3.1).

In: an image (B, 3, H, W) in [-1, 1]; H and W are multiples of 8. Out: latents (B, 4, H/8, W/8) of about unit variance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.blocks import EPS, Downsample, ResidualBlock, middle
from sd.config import VAEConfig


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then downsampling to half of it (except in the last level)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, last: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, groups, EPS) for a, b in zip(widths, widths[1:])))
        self.downsample = nn.Identity() if last else Downsample(out_channels, symmetric=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H/2, W/2), or for the last level (B, out_channels, H, W)."""
        return self.downsample(self.blocks(x))


class Encoder(nn.Module):
    """The VAE's encoder: a distribution over latents for an image, and a sample of it."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.scaling_factor = config.scaling_factor
        widths = [config.channels[0], *config.channels]
        top = config.channels[-1]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.Sequential(
            *(
                DownLevel(a, b, config.blocks_per_level, config.groups, last=i == len(config.channels) - 1)
                for i, (a, b) in enumerate(zip(widths, widths[1:]))
            )
        )
        self.middle = middle(top, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, top, EPS)
        self.conv_out = nn.Conv2d(top, 2 * config.latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> mean and log variance of q(z | x), each (B, 4, H/8, W/8), unscaled."""
        x = self.conv_in(image)  # (B, 128, H, W)
        x = self.levels(x)  # (B, 512, H/8, W/8)
        x = self.middle(x)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, 8, H/8, W/8)
        mean, log_variance = self.quant_conv(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # exp() of it then neither overflows nor vanishes

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8): a sample of q(z | x), made with `noise` of
        that shape, or without noise the mean."""
        mean, log_variance = self.moments(image)
        latents = mean if noise is None else sample_posterior(mean, log_variance, noise)
        return latents * self.scaling_factor


def sample_posterior(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """z = mean + std * noise, all (B, 4, h, w): the reparameterisation trick (1312.6114, section 2.4)."""
    return mean + torch.exp(0.5 * log_variance) * noise  # gradients reach mean and log_variance
