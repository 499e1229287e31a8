"""Pictures -> data URIs, so that a page can carry them in itself.

In: uint8 arrays (H, W, 3), and how many bytes they may take. Out: texts like "data:image/webp;base64,...".
"""

from __future__ import annotations

import base64
import io
from itertools import product

import numpy as np
from PIL import Image
from torch import Tensor

# From the best to the smallest: the longest side in pixels, and the quality of WebP, None for lossless.
WAYS = tuple(product((256, 128, 64), (None, 90, 70, 40)))
LARGE_WAYS = tuple(product((4096, 2048, 1024), (None, 95, 80)))
MAP_SIDES = (64, 32, 16)


def encode(pictures: list[np.ndarray], budget: int) -> tuple[list[str], str]:
    """Pictures of the steps -> their URIs, by the first of WAYS in which all of them together fit into `budget` bytes.

    Also what that did to them, in words: "exact", or for instance "at most 128 pixels long, at WebP quality 90", or
    one of these two alone.
    """
    return _first_that_fits([Image.fromarray(picture) for picture in pictures], budget, WAYS)


def encode_exactly(picture: np.ndarray, budget: int) -> tuple[str, str]:
    """A picture -> its URI as a PNG, and "exact"; if that takes more than `budget` bytes, as `encode` does."""
    png = _bytes(Image.fromarray(picture), format="PNG", optimize=True)
    if len(png) <= budget:
        return _uri("png", png), "exact"
    (uri,), done = _first_that_fits([Image.fromarray(picture)], budget, LARGE_WAYS)
    return uri, done


def encode_maps(maps: list[Tensor], budget: int) -> list[str]:
    """Maps, float32 (h, w) in [0, 1] -> the URIs of white pictures that are the more opaque the higher the map is."""
    opacities = [Image.fromarray((values.numpy() * 255).round().astype(np.uint8)) for values in maps]
    for side in MAP_SIDES:
        encoded = []
        for opacity in opacities:
            opacity = _within(opacity, side)
            white = Image.new("L", opacity.size, 255)
            encoded.append(_bytes(Image.merge("LA", (white, opacity)), format="PNG", optimize=True))
        if sum(map(len, encoded)) <= budget:
            break
    return [_uri("png", png) for png in encoded]


def _first_that_fits(
    images: list[Image.Image], budget: int, ways: tuple[tuple[int, int | None], ...]
) -> tuple[list[str], str]:
    """The URIs of the images by the first of `ways` that fits, or else by the last; and in words which it was."""
    for side, quality in ways:
        options = {"lossless": True} if quality is None else {"quality": quality}
        encoded, size = [], 0
        for image in images:
            encoded.append(_bytes(_within(image, side), format="WEBP", **options))
            size += len(encoded[-1])
            if size > budget and (side, quality) != ways[-1]:
                break
        else:
            break
    smaller = any(max(image.size) > side for image in images)
    done = [f"at most {side} pixels long"] * smaller + [f"at WebP quality {quality}"] * (quality is not None)
    return [_uri("webp", webp) for webp in encoded], ", ".join(done) or "exact"


def _within(image: Image.Image, side: int) -> Image.Image:
    """The image, made smaller if a side of it is longer than that."""
    if max(image.size) <= side:
        return image
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _bytes(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def _uri(kind: str, contents: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(contents).decode('ascii')}"
