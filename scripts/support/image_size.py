"""The size of an image: as given, or in the shape of the image that it starts from."""

from __future__ import annotations

import math
from itertools import product

MULTIPLE = 8  # pixels to a latent
LARGEST = 8192
EXTREME = 4  # the longest side is this many times the model's own, and the shortest this part of it


def choose_size(image: tuple[int, int] | None, width: int | None, height: int | None, side: int) -> tuple[int, int]:
    """The (width, height) to draw. `image` is the size of the image to start from, `side` the model's own.

    Without an image, what is not given is the model's own. With one, a missing side follows from the other and the
    image's shape. If neither is given, the image is drawn in its own shape, with about as many pixels as the model was
    trained on: more would repeat objects, and fewer would blur them. Both are multiples of 8, so the shape may differ
    a little; the image is then cropped, never stretched. Sides go from a quarter to four times the model's own.
    """
    if image is None or (width and height):
        return width or side, height or side
    ratio = image[0] / image[1]
    if width:
        return width, _multiple(width / ratio)
    if height:
        return _multiple(height * ratio), height
    ratio = min(max(ratio, 1 / EXTREME**2), EXTREME**2)
    sides = side * math.sqrt(ratio), side / math.sqrt(ratio)
    below = [max(int(pixels // MULTIPLE) * MULTIPLE, MULTIPLE) for pixels in sides]
    choices = product(*[(pixels, pixels + MULTIPLE) for pixels in below])
    return min(choices, key=lambda size: (abs(math.log(size[0] / size[1] / ratio)), abs(size[0] * size[1] - side**2)))


def _multiple(pixels: float) -> int:
    return min(max(round(pixels / MULTIPLE), 1) * MULTIPLE, LARGEST)
