"""Inpainting: keep part of an image, and repaint the rest.

In: an image, and a mask that is white where it is repainted and black where it stays. Out: `InpaintingInputs`, which
`pipeline.denoise` uses at every step and which puts the kept pixels back at the end.

An ordinary U-Net does not know that something must stay. So after every step the known region is replaced by the image
itself, noised to the level of the next step (2201.09865, eq. 8). The U-Net of the inpainting checkpoint gets the mask
and the rest of the image as five more input channels, and nothing has to be replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from sd.images import ImageSource, image_to_tensor, read_image, tensor_to_array
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


def read_mask_image(mask: ImageSource, image: Image.Image | None = None) -> Image.Image:
    """A mask as `read_image` reads it, except that transparent is black: editors save strokes on an empty layer.

    Raises ValueError if its shape is not that of `image`. It may be larger or smaller: both are cropped alike.
    """
    mask = read_image(mask, behind="black")
    if image is not None:
        (width, height), (other_width, other_height) = image.size, mask.size
        # Equal to a pixel: one of the two may have been scaled down, and a side rounded.
        if abs(width * other_height - other_width * height) > max(*image.size, *mask.size):
            sizes = f"{width} x {height}, not {other_width} x {other_height}"
            raise ValueError(f"mask_image should have the shape of input_image, {sizes} pixels.")
    return mask


def read_mask(mask: ImageSource, height: int, width: int, feather: float = 0) -> Tensor:
    """A mask image of any mode and size -> float32 (1, 1, height, width): 1 where white, 0 where black or transparent.

    `feather` softens its edges by that many pixels, inwards, so that black stays black.
    """
    mask = read_mask_image(mask)
    # Bilinear, because Lanczos, which resizes images, overshoots: black must stay black.
    levels = image_to_tensor(mask, height, width, Image.Resampling.BILINEAR)  # (1, 3, H, W)
    white = (levels.mean(1, keepdim=True) + 1) / 2  # (1, 1, H, W)
    if feather:
        levels = Image.fromarray((white[0, 0].numpy() * 255).round().astype(np.uint8))
        blurred = torch.from_numpy(np.array(levels.filter(ImageFilter.GaussianBlur(feather / 2)))) / 255
        white = white * (2 * blurred - 1).clamp(0, 1)  # the blur is half white at the old edge
    return white


def without_masked(image: Tensor, mask: Tensor) -> Tensor:
    """The image (1, 3, H, W) with grey where it is repainted: the inpainting U-Net was trained this way."""
    return image * (mask < 0.5)
