"""A picture and a mask -> what must stay of the picture while the rest of it is painted anew.

In: a picture, and a mask that is white where it is repainted and black where it stays. Out: `InpaintingInputs`, which
`pipeline.denoise` uses at every step and which puts the kept pixels back at the end.

An ordinary U-Net does not know that anything must stay. So after every step the known region is replaced by the
picture itself, noised to the level that the next step expects (2201.09865, eq. 8). The U-Net of the inpainting
checkpoint is shown the mask and the rest of the picture as five more input channels and needs no replacing.
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
    """What inpainting knows of B pictures, all of it float32."""

    picture: Tensor  # (1, 3, H, W), in [-1, 1]
    mask: Tensor  # (1, 1, H, W), from 0 where the picture stays to 1 where it is painted
    latents: Tensor  # (B, 4, h, w), of the whole picture
    noise: Tensor  # (B, 4, h, w), which brings them to every noise level
    condition: Tensor | None  # (B, 5, h, w), for the inpainting U-Net: its mask, and the latents of what stays

    def start(self, sampler: Sampler, strength: float) -> Tensor:
        """The latents (B, 4, h, w) to denoise: the noised picture, or at full strength noise alone."""
        return self.noise if strength == 1 else sampler.add_noise(self.latents, sampler.timesteps[0], self.noise)

    def with_mask_channels(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> what the U-Net sees, (B, 4, h, w) or for the inpainting U-Net (B, 9, h, w)."""
        return latents if self.condition is None else torch.cat([latents, self.condition.to(latents)], dim=1)

    def restore_known(self, latents: Tensor, sampler: Sampler, step: int) -> Tensor:
        """Latents (B, 4, h, w) before step `step`, with the known region as the picture has it at that noise level."""
        if self.condition is not None:
            return latents
        known = self.latents.to(latents)
        if step < len(sampler.timesteps):
            known = sampler.add_noise(known, sampler.timesteps[step], self.noise)
        # A latent is painted if any of its pixels is: `restore_pixels` puts the other pixels back.
        painted = F.adaptive_max_pool2d(self.mask, latents.shape[2:]).to(latents) > 0  # (1, 1, h, w)
        return torch.where(painted, latents, known)

    def restore_pixels(self, images: np.ndarray) -> np.ndarray:
        """Painted pictures, uint8 (B, H, W, 3), with what stays put back: to the byte where the mask is 0."""
        original = tensor_to_array(self.picture)[0]  # (H, W, 3)
        share = self.mask[0, 0, :, :, None].numpy()  # (H, W, 1)
        return np.rint(share * images + (1 - share) * original).astype(np.uint8)


def read_mask_image(mask: ImageSource, picture: Image.Image | None = None) -> Image.Image:
    """A mask as `read_image` reads it, but transparent is black: editors save strokes on an empty layer.

    Raises ValueError for another shape than that of `picture`, which may be larger or smaller: they are cropped alike.
    """
    mask = read_image(mask, behind="black")
    if picture is not None:
        (width, height), (other_width, other_height) = picture.size, mask.size
        # Equal to a pixel, for one of the two may have been made smaller, and a side rounded.
        if abs(width * other_height - other_width * height) > max(*picture.size, *mask.size):
            sizes = f"{width} x {height}, not {other_width} x {other_height}"
            raise ValueError(f"mask_image should have the shape of input_image, {sizes} pixels.")
    return mask


def read_mask(mask: ImageSource, height: int, width: int, feather: float = 0) -> Tensor:
    """A mask picture of any mode and size -> float32 (1, 1, height, width), 1 where white, 0 where black or nothing.

    `feather` softens its edges over so many pixels, inwards, so that black stays black.
    """
    mask = read_mask_image(mask)
    # Not by Lanczos, as pictures are: it rings, and black must stay black.
    levels = image_to_tensor(mask, height, width, Image.Resampling.BILINEAR)  # (1, 3, H, W)
    white = (levels.mean(1, keepdim=True) + 1) / 2  # (1, 1, H, W)
    if feather:
        levels = Image.fromarray((white[0, 0].numpy() * 255).round().astype(np.uint8))
        blurred = torch.from_numpy(np.array(levels.filter(ImageFilter.GaussianBlur(feather / 2)))) / 255
        white = white * (2 * blurred - 1).clamp(0, 1)  # half white is where the edge was
    return white


def without_masked(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture (1, 3, H, W) with grey where it is to be painted, which is how the inpainting U-Net was trained."""
    return picture * (mask < 0.5)
