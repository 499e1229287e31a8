"""Aspect-ratio buckets: pictures of many shapes are trained on in batches of one shape, with little cropped away.

A batch has one shape, and cropping every picture to a square cuts off heads and feet. So there are a few shapes, the
buckets, with about equally many pixels, and each picture is cropped to the one that fits it best (NovelAI,
"Improvements on Stable Diffusion", 2022; https://github.com/NovelAI/novelai-aspect-ratio-bucketing).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sd.images import image_to_tensor, read_image
from sd.training.captions import DataError

log = logging.getLogger(__name__)

Shape = tuple[int, int]  # height and width in pixels


def bucket_shapes(pixels: int, shortest: int, longest: int, step: int) -> list[Shape]:
    """The shapes of at most so many pixels: for each width the largest height, and the other way round.

    Sides are multiples of `step` from `shortest` to `longest`.
    """
    shapes = set()
    for side in range(shortest, longest + 1, step):
        other = min(longest, pixels // side // step * step)
        if other >= shortest:
            shapes |= {(other, side), (side, other)}
    return sorted(shapes)


def shapes_of_model(size: int, downscale: int) -> list[Shape]:
    """The buckets of a model that was trained on squares of `size` pixels: sides from half to twice of it, in steps of
    64 pixels (an eighth of the size, if that is less). Sides are multiples of the autoencoder's `downscale`."""
    step = max(1, min(64, size // 8) // downscale) * downscale
    return bucket_shapes(size * size, size // 2 // step * step, 2 * size, step)


def nearest(shape: Shape, shapes: list[Shape]) -> Shape:
    """Of `shapes`, the one to which a picture of this shape can be cropped with the least loss.

    Of a picture of aspect ratio a (width / height), cropping to ratio b leaves the share exp(-|log a - log b|).
    """
    height, width = shape
    return min(shapes, key=lambda other: abs(math.log(width / height) - math.log(other[1] / other[0])))


def sort_into_buckets(folder: Path, names: list[str], shapes: list[Shape]) -> dict[Shape, list[str]]:
    """The names of the pictures in each bucket that has any. Logs the buckets, and how many pictures are smaller than
    theirs. Raises DataError for a picture that cannot be read."""
    buckets: dict[Shape, list[str]] = {}
    enlarged = 0
    for name in tqdm(names, "reading images", leave=False):
        width, height = _read(folder / name, read_image).size
        shape = nearest((height, width), shapes)
        buckets.setdefault(shape, []).append(name)
        enlarged += height < shape[0] or width < shape[1]
    buckets = {shape: buckets[shape] for shape in sorted(buckets)}
    if len(shapes) > 1:
        listed = ", ".join(f"{len(names)} of {width} x {height}" for (height, width), names in buckets.items())
        log.info("Pictures by shape: %s.", listed)
    if enlarged:
        log.warning(
            "%d of %d pictures are smaller than the model's size and are enlarged: the model may learn to draw blurred "
            "pictures.",
            enlarged,
            len(names),
        )
    return buckets


@dataclass
class PicturesOfOneShape:
    """Pictures in a folder, read when they are needed, scaled and cropped around their centre to one shape."""

    folder: Path
    names: list[str]
    shape: Shape
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Tensor) -> Tensor:
        """Indices (B,) -> images (B, 3, H, W) in [-1, 1]. Raises DataError for one that cannot be read."""
        images = [_read(self.folder / self.names[i], image_to_tensor, *self.shape) for i in indices.tolist()]
        batch = torch.cat(images)  # (B, 3, H, W)
        return batch.flip(-1) if self.mirrored else batch


def _read(path: Path, read, *arguments):
    try:
        return read(path, *arguments)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
