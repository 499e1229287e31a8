"""Latents -> a small preview of the image, by a linear map that is fast enough for every step.

In: scaled latents (B, 4, h, w). Out: uint8 (B, h, w, 3), one pixel for each latent.

The decoder adds the detail, but the colour of a region is already almost a linear function of its latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sd.config import SD15
from sd.decoder import Decoder
from sd.images import tensor_to_array
from sd.models import Models
from sd.runtime.devices import device_and_dtype

FIT_IMAGES, FIT_SIZE, FIT_BLOCK = 4, 16, 4  # random latents for the fit: number, side, and side of a uniform block


@dataclass(frozen=True)
class Preview:
    """The linear map: pixel = weight @ latent + bias, in [-1, 1]."""

    weight: Tensor  # (3, 4)
    bias: Tensor  # (3,)

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (B, 4, h, w), on any device -> previews, uint8 (B, h, w, 3)."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        return tensor_to_array(F.conv2d(latents.float(), weight[:, :, None, None], bias))


# Factors for SD 1.x's VAE, fitted by its users.
SD15_PREVIEW = Preview(
    weight=torch.tensor(
        [
            [0.3512, 0.3250, -0.2829, -0.2120],  # red
            [0.2297, 0.4974, 0.1762, -0.2616],  # green
            [0.3227, 0.2350, 0.2721, -0.7177],  # blue
        ]
    ),
    bias=torch.zeros(3),
)


def preview_for(models: Models) -> Preview:
    """The known map if the VAE has SD 1.x's sizes; otherwise a map that is fitted to the decoder now."""
    return SD15_PREVIEW if models.config.vae == SD15.vae else fit(models.decoder)


@torch.no_grad()
def fit(decoder: Decoder, latents: Tensor | None = None) -> Preview:
    """The linear map with the smallest mean squared error to the decoder's images, on some scaled latents (B, 4, h, w).

    The best latents for the fit are those of real images, encoded or generated. Without `latents`, it uses random ones
    in uniform blocks, which are closer to images than white noise is, and the fit is almost as good.
    """
    if latents is None:
        shape = FIT_IMAGES, next(decoder.parameters()).shape[1], FIT_SIZE // FIT_BLOCK, FIT_SIZE // FIT_BLOCK
        blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        latents = F.interpolate(blocks, scale_factor=FIT_BLOCK)  # (B, 4, h, w)
    images = decoder(latents.to(*device_and_dtype(decoder))).float().cpu()  # (B, 3, H, W)
    pixels = F.adaptive_avg_pool2d(images, latents.shape[2:])  # (B, 3, h, w)
    rows = latents.float().cpu().movedim(1, -1).flatten(0, 2)  # (B h w, 4)
    rows = F.pad(rows, (0, 1), value=1)  # (B h w, 5): the last column gives the bias
    solution = torch.linalg.lstsq(rows, pixels.movedim(1, -1).flatten(0, 2)).solution  # (5, 3)
    return Preview(solution[:-1].T.contiguous(), solution[-1].clone())
