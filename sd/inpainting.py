"""Inpainting: keep part of an image, and repaint the rest.

In: an image, and a mask that is white where it is repainted and black where it stays. Out: `InpaintingInputs`, which
`pipeline.denoise` uses at every step and which puts the kept pixels back at the end.

Grey is in between. No value is a threshold: a slightly lighter grey changes the image slightly more.

An ordinary U-Net has no input for the mask. So after every step the known region is replaced by the image itself,
noised to the level of the next step (2201.09865, eq. 8). The U-Net of the inpainting checkpoint gets the mask and the
rest of the image as five more input channels, and nothing is replaced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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
    region: Region | None = None  # if the image and mask above are a part of a larger image

    def start(self, sampler: Sampler, strength: float) -> Tensor:
        """The first latents (B, 4, h, w): the noised image, or at full strength noise alone."""
        return self.noise if strength == 1 else sampler.add_noise(self.latents, sampler.timesteps[0], self.noise)

    def with_mask_channels(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> the U-Net's input: (B, 4, h, w), or (B, 9, h, w) for the inpainting U-Net."""
        return latents if self.channels is None else torch.cat([latents, self.channels.to(latents)], dim=1)

    def restore_known(self, latents: Tensor, sampler: Sampler, step: int) -> Tensor:
        """Latents (B, 4, h, w) before step `step`, with the known region taken from the image at that noise level.

        Where the mask is m, latents are repainted in the last m N of N steps (2306.00950): white in all, grey in some.
        """
        if self.channels is not None:
            return latents
        known, steps = self.latents.to(latents), len(sampler.timesteps)
        if step < steps:
            known = sampler.add_noise(known, sampler.timesteps[step], self.noise)
        # The share rises from 0 to 1 within one step. If it jumped, one level of grey could change everything.
        share = (step - steps * (1 - pool(self.mask, latents))).clamp(0, 1)  # (1, 1, h, w)
        return torch.lerp(known, latents, share)

    def restore_pixels(self, images: np.ndarray) -> np.ndarray:
        """Repainted images, uint8 (B, H, W, 3), with the kept pixels put back: exactly, where the mask is 0.

        With a region, each is pasted into the whole image, and the result has that image's size.
        """
        if self.region is not None:
            return self.region.paste(images)
        return blend(images, tensor_to_array(self.image)[0], self.mask[0, 0].numpy())


@dataclass(frozen=True)
class Region:
    """The part of an image around its mask, repainted alone and so at a higher resolution."""

    image: np.ndarray  # uint8 (H, W, 3): the whole image
    mask: np.ndarray  # float32 (H, W)
    box: tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the whole image

    def paste(self, images: np.ndarray) -> np.ndarray:
        """Repainted regions of any size, uint8 (B, h, w, 3) -> whole images, uint8 (B, H, W, 3)."""
        left, top, right, bottom = self.box
        inside = slice(top, bottom), slice(left, right)
        size = right - left, bottom - top
        resized = np.stack([Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image in images])
        wholes = np.stack([self.image] * len(images))
        for whole, image in zip(wholes, blend(resized, self.image[inside], self.mask[inside])):
            whole[inside] = image
        return wholes


def blend(images: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3) where `mask` (H, W) is 1, the original (H, W, 3) where it is 0, a mixture between; uint8."""
    share = mask[:, :, None]
    return np.rint(share * images + (1 - share) * original).astype(np.uint8)


def around_mask(mask: np.ndarray, padding: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of what a mask (H, W) in [0, 1] repaints, with `padding` pixels on each side,
    grown to the proportions of height x width as far as the image allows. For a black mask, the whole image."""
    painted = mask > 0.05  # a scan's black is not quite 0, and would make the box as large as the image
    if not painted.any():
        return 0, 0, mask.shape[1], mask.shape[0]
    (top, bottom), (left, right) = (np.flatnonzero(painted.any(axis))[[0, -1]] for axis in (1, 0))
    top, bottom = max(top - padding, 0), min(bottom + 1 + padding, mask.shape[0])
    left, right = max(left - padding, 0), min(right + 1 + padding, mask.shape[1])
    wanted_width, wanted_height = round((bottom - top) * width / height), round((right - left) * height / width)
    left, right = _grow(left, right, wanted_width, mask.shape[1])
    top, bottom = _grow(top, bottom, wanted_height, mask.shape[0])
    return left, top, right, bottom


def _grow(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """The interval, grown to `length` around its middle, and moved to stay between 0 and `limit`."""
    length = min(max(length, end - start), limit)
    start = min(max((start + end - length) // 2, 0), limit - length)
    return int(start), int(start + length)


def pool(mask: Tensor, latents: Tensor) -> Tensor:
    """mask (1, 1, H, W) -> (1, 1, h, w), like the latents. The brightest pixel counts: a stroke can be thinner than a
    latent, and `restore_pixels` puts back the pixels beside it."""
    return F.adaptive_max_pool2d(mask, latents.shape[2:]).to(latents)


def mask_channels(mask: Tensor, kept: Tensor) -> Tensor:
    """mask (1, 1, H, W), latents of what stays (B, 4, h, w) -> the inpainting U-Net's extra channels (B, 5, h, w)."""
    return torch.cat([pool(mask, kept).expand(len(kept), -1, -1, -1), kept], dim=1)


def without_masked(image: Tensor, mask: Tensor) -> Tensor:
    """The image (1, 3, H, W) with grey where it is repainted, as in the training of the inpainting U-Net."""
    return image * (1 - mask)


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
    padding_mask_crop: int | None = None,
) -> InpaintingInputs:
    """The inputs of `pipeline.denoise` that keep `input_image` where `mask_image` is not white. Without a mask, nothing
    is kept.

    With `padding_mask_crop`, only the part of the image around the mask is used, with that many pixels on each side. It
    is resized to about height * width pixels, and has the proportions of height x width if the image has room for them.

    The other arguments are those of `pipeline.get_latents`. Raises ValueError for a size that is not allowed and for a
    mask whose proportions differ from the image's, and what `read_image` raises.
    """
    size = image_size(models, latent_shape(models, batch_size, height, width))
    if input_image is not None and mask_image is not None:
        input_image = read_image(input_image, name="input_image")
        mask_image = read_mask_image(mask_image, input_image)
    region = None
    if padding_mask_crop is not None and mask_image is not None:
        whole = image_to_tensor(input_image, input_image.height, input_image.width)
        whole_mask = read_mask(mask_image, *whole.shape[2:], float(feather))
        box = around_mask(whole_mask[0, 0].numpy(), int(padding_mask_crop), *size)
        region = Region(tensor_to_array(whole)[0], whole_mask[0, 0].numpy(), box)
        size = _same_area(box, size, models.config.vae.downscale)
        image = image_to_tensor(input_image.resize(size[::-1], Image.Resampling.LANCZOS, box), *size)
        left, top, right, bottom = box
        mask = F.interpolate(whole_mask[..., top:bottom, left:right], size, mode="bilinear", antialias=True)
    else:
        image = torch.zeros(1, 3, *size) if input_image is None else image_to_tensor(input_image, *size)
        mask = torch.ones(1, 1, *size) if mask_image is None else read_mask(mask_image, *size, float(feather))
    shape = latent_shape(models, batch_size, *size)
    generators = seed if isinstance(seed, list) else make_generators(seed, batch_size)
    latents = _encode(models, image, draw_noise(shape, generators))
    noise = draw_noise(shape, generators)
    channels = None
    if models.config.unet.inpaints:
        kept = _encode(models, without_masked(image, mask), draw_noise(shape, generators))
        channels = mask_channels(mask, kept)  # (B, 5, H/8, W/8)
    return InpaintingInputs(image, mask, latents, noise, channels, region)


def _same_area(box: tuple[int, int, int, int], size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(H, W) in multiples of `multiple`, with the proportions of the box and the area of `size`."""
    left, top, right, bottom = box
    scale = math.sqrt(math.prod(size) / ((right - left) * (bottom - top)))
    return tuple(max(1, round(side * scale / multiple)) * multiple for side in (bottom - top, right - left))


def _encode(models: Models, image: Tensor, noise: Tensor) -> Tensor:
    """image (1, 3, H, W), noise (B, 4, h, w) -> B samples of its latents, float32 (B, 4, h, w)."""
    return run_in_range(models.encoder, "VAE encoder", image, noise)
