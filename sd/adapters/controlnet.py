"""ControlNet: an image of edges, poses or depths steers the U-Net (2302.05543).

In: what the U-Net gets, latents (B, 4, h, w), context (B, 77, D) and timesteps (B,), and an image (B, 3, 8h, 8w) in
[0, 1]. Out: 13 residuals, which `Diffusion.forward` adds to its 12 kept maps and to the output of its middle.

The ControlNet is a copy of the U-Net's way down, trained further, with new layers Z before and after it (eq. 2):

    y = F(x; W) + Z(F(x + Z(c; W_z1); W_c); W_z2)

c are the features of the image, and x + Z(c) the first feature map with them added. Z is a convolution that starts with
zeros: so training begins with y = F(x), a U-Net without a ControlNet. Here are only the layers, with random weights;
`sd.training.control.control_of` makes the copy and the zeros.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from sd.config import UNetConfig
from sd.diffusion import ContractingPath

HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256)  # of the convolutions that make features of the image
HALVING = (2, 4, 6)  # which of these convolutions halve height and width
HINT_SCALE = 8  # pixels of the image along one side of a latent


class ControlNet(ContractingPath):
    """The network. With `global_pool`, as for control_v11e_sd15_shuffle, a residual is the mean over its map. With
    `inpaints`, as for control_v11p_sd15_inpaint, the image is -1 where it is to be filled."""

    def __init__(self, config: UNetConfig, global_pool: bool = False, inpaints: bool = False):
        super().__init__(config)
        self.global_pool, self.inpaints = global_pool, inpaints
        self.source: Path | str | None = None  # the file or folder that it was loaded from
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(zip(HINT_WIDTHS, HINT_WIDTHS[1:])):
            layers += [nn.Conv2d(width, following, 3, padding=1, stride=2 if i in HALVING else 1), nn.SiLU()]
        self.hint = nn.Sequential(*layers, nn.Conv2d(HINT_WIDTHS[-1], config.channels[0], 3, padding=1))
        self.zero_convs = nn.ModuleList(nn.Conv2d(width, width, 1) for width in self.skip_widths)
        self.zero_middle = nn.Conv2d(config.channels[-1], config.channels[-1], 1)

    def forward(self, latents: Tensor, context: Tensor, timesteps: Tensor, features: Tensor) -> list[Tensor]:
        """latents (B, 4, h, w), context (B, 77, D), timesteps (B,) -> 13 residuals, (B, 320, h, w) to (B, 1280, h/8,
        w/8). `features` (B or 1, 320, h, w) are `hint` of an image (B or 1, 3, 8h, 8w): the same at all steps."""
        time = self.embed_time(timesteps, latents.dtype)  # (B, 1280)
        x = self.down[0](latents, time, context) + features  # x + Z(c; W_z1): (B, 320, h, w)
        residuals = [self.zero_convs[0](x)]
        for stage, zero_conv in zip(self.down[1:], self.zero_convs[1:]):
            x = stage(x, time, context)  # (B, 320, h, w) down to (B, 1280, h/8, w/8)
            residuals.append(zero_conv(x))  # Z(F(x + Z(c)); W_z2)
        residuals.append(self.zero_middle(self.middle(x, time, context)))
        return [x.mean((2, 3), keepdim=True) for x in residuals] if self.global_pool else residuals
