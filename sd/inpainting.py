"""Inpainting: keep part of an image, and repaint the rest.

In: an image, and a mask that is white where it is repainted and black where it stays. Out: `InpaintingInputs`, which
`pipeline.denoise` uses at every step and which puts the kept pixels back at the end.

An ordinary U-Net has no input for the mask. So after every step the known region is replaced by the image itself,
noised to the level of the next step (2201.09865, eq. 8). The U-Net of the inpainting checkpoint gets the mask and the
rest of the image as five more input channels, and nothing is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sd.images import ImageSource, image_to_tensor, read_image, read_mask, read_mask_image, tensor_to_array
from sd.models import Models
from sd.noise import draw_noise, make_generators
from sd.request import image_size, latent_shape
from sd.runtime.not_finite import run_in_range
from sd.sampler import Sampler


@dataclass(frozen=True)
class InpaintingInputs:
    """What inpainting keeps of one image, for B results; all float32."""

    image: Tensor  # (1, 3, H, W), in [-1, 1]
    mask: Tensor  # (1, 1, H, W), from 0 where the image stays to 1 where it is repainted
    latents: Tensor  # (B, 4, h, w), of the whole image
    noise: Tensor  # (B, 4, h, w), which brings them to every noise level
    channels: Tensor | None  # (B, 5, h, w), for the inpainting U-Net: its mask, and the latents of what stays

    def start(self, sampler: Sampler, strength: float) -> Tensor:
        """The first latents (B, 4, h, w): the noised image, or at full strength noise alone."""
        return self.noise if strength == 1 else sampler.add_noise(self.latents, sampler.timesteps[0], self.noise)

    def with_mask_channels(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> the U-Net's input: (B, 4, h, w), or (B, 9, h, w) for the inpainting U-Net."""
        return latents if self.channels is None else torch.cat([latents, self.channels.to(latents)], dim=1)

    def restore_known(self, latents: Tensor, sampler: Sampler, step: int) -> Tensor:
        """Latents (B, 4, h, w) before step `step`, with the known region taken from the image at that noise level."""
        if self.channels is not None:
            return latents
        known = self.latents.to(latents)
        if step < len(sampler.timesteps):
            known = sampler.add_noise(known, sampler.timesteps[step], self.noise)
        # A latent is repainted if any of its pixels is: `restore_pixels` puts the other pixels back.
        painted = F.adaptive_max_pool2d(self.mask, latents.shape[2:]).to(latents) > 0  # (1, 1, h, w)
        return torch.where(painted, latents, known)

    def restore_pixels(self, images: np.ndarray) -> np.ndarray:
        """Repainted images, uint8 (B, H, W, 3), with the kept pixels put back: exactly, where the mask is 0."""
        original = tensor_to_array(self.image)[0]  # (H, W, 3)
        share = self.mask[0, 0, :, :, None].numpy()  # (H, W, 1)
        return np.rint(share * images + (1 - share) * original).astype(np.uint8)


def mask_channels(mask: Tensor, kept: Tensor) -> Tensor:
    """mask (1, 1, H, W), latents of what stays (B, 4, h, w) -> the inpainting U-Net's extra channels (B, 5, h, w)."""
    small = F.interpolate((mask >= 0.5).float(), size=kept.shape[2:])  # (1, 1, h, w)
    return torch.cat([small.expand(len(kept), -1, -1, -1).to(kept), kept], dim=1)


def without_masked(image: Tensor, mask: Tensor) -> Tensor:
    """The image (1, 3, H, W) with grey where it is repainted, as in the training of the inpainting U-Net."""
    return image * (mask < 0.5)


@torch.no_grad()
def get_inpainting_inputs(
    models: Models,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    seed: int | list[torch.Generator] | None = None,
    input_image: ImageSource | None = None,
    mask_image: ImageSource | None = None,
    feather: float = 0,
) -> InpaintingInputs:
    """The inputs of `pipeline.denoise` that keep `input_image` where `mask_image` is not white. No mask: nowhere.

    The other arguments are those of `pipeline.get_latents`. Raises ValueError for a size that is not allowed and for a
    mask whose proportions differ from the image's, and what `read_image` raises.
    """
    shape = latent_shape(models, batch_size, height, width)
    size = image_size(models, shape)
    if input_image is not None and mask_image is not None:
        input_image = read_image(input_image)
        mask_image = read_mask_image(mask_image, input_image)
    image = torch.zeros(1, 3, *size) if input_image is None else image_to_tensor(input_image, *size)
    mask = torch.ones(1, 1, *size) if mask_image is None else read_mask(mask_image, *size, float(feather))
    generators = seed if isinstance(seed, list) else make_generators(seed, batch_size)
    latents = _encode(models, image, draw_noise(shape, generators))
    noise = draw_noise(shape, generators)
    channels = None
    if models.config.unet.inpaints:
        kept = _encode(models, without_masked(image, mask), draw_noise(shape, generators))
        channels = mask_channels(mask, kept)  # (B, 5, H/8, W/8)
    return InpaintingInputs(image, mask, latents, noise, channels)


def _encode(models: Models, image: Tensor, noise: Tensor) -> Tensor:
    """image (1, 3, H, W), noise (B, 4, h, w) -> B samples of its latents, float32 (B, 4, h, w)."""
    return run_in_range(models.encoder, "VAE encoder", image, noise)
