"""The building blocks of the VAE and the U-Net. In and out: feature maps (B, C, H, W)."""

import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import SelfAttention

EPS = 1e-6  # in every GroupNorm of the VAE; the U-Net's residual blocks use 1e-5


class ResidualBlock(nn.Module):
    """x + f(x), where f is GroupNorm, SiLU and 3x3 convolution, twice (1512.03385; 2006.11239, app. B)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels) if time_width else None  # the VAE has no timestep
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # x and f(x) can be added only if their channels are equal: otherwise a 1x1 convolution changes those of x.
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), time (B, time_width) -> (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out_channels, H, W)
        if self.time is not None:
            h = h + self.time(F.silu(time))[:, :, None, None]  # (B, out_channels, 1, 1): the same for every pixel
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


class AttentionBlock(nn.Module):
    """x + self-attention over all positions of the feature map, with a single head. Used in both halves of the VAE."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.attention = SelfAttention(channels, heads=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        tokens = self.attention(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


def middle(channels: int, groups: int) -> nn.Sequential:
    """The coarsest level of the VAE's encoder and decoder, where attention over all positions is cheap enough."""
    return nn.Sequential(
        ResidualBlock(channels, channels, groups, EPS),
        AttentionBlock(channels, groups),
        ResidualBlock(channels, channels, groups, EPS),
    )


class Downsample(nn.Module):
    """Halves height and width with a convolution of stride 2. With `symmetric`, as in the U-Net, one pixel is padded on
    every side, and half of an odd side is rounded up. Otherwise, as in the VAE, padding is on the right and at the
    bottom only, and half of an odd side is rounded down."""

    def __init__(self, channels: int, symmetric: bool):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repeating every pixel, followed by a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2 H, 2 W), or (B, C, *size) if an odd side was rounded up on the way down."""
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
