"""Images, uint8 (H, W, 3) -> data URIs ("data:image/webp;base64,..."), so that the page contains them."""

from __future__ import annotations

import base64
import io
from itertools import product

import numpy as np
from PIL import Image
from torch import Tensor

# From the best to the smallest: the longest side in pixels, and WebP's quality (None is lossless).
WAYS = tuple(product((256, 128, 64), (None, 90, 70, 40)))
LARGE_WAYS = tuple(product((4096, 2048, 1024), (None, 95, 80)))
MAP_SIDES = (64, 32, 16)


def encode(images: list[np.ndarray], budget: int) -> tuple[list[str], str]:
    """Images of the steps -> their URIs, encoded by the first of WAYS that fits all of them into `budget` bytes.

    Also returns their quality in words: "exact", or for example "at most 128 pixels wide and high, WebP quality 90", or
    only one of these two.
    """
    return _first_that_fits([Image.fromarray(image) for image in images], budget, WAYS)


def encode_exactly(image: np.ndarray, budget: int) -> tuple[str, str]:
    """An image -> its URI as a PNG, and "exact". If the PNG exceeds `budget` bytes, encodes as `encode` does."""
    png = _bytes(Image.fromarray(image), format="PNG", optimize=True)
    if len(png) <= budget:
        return _uri("png", png), "exact"
    (uri,), done = _first_that_fits([Image.fromarray(image)], budget, LARGE_WAYS)
    return uri, done


def encode_maps(maps: list[Tensor], budget: int) -> list[str]:
    """Maps, float32 (h, w) in [0, 1] -> the URIs of white images whose opacity is the map."""
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
    """The URIs by the first of `ways` that fits, or by the last if none does, and their quality in words."""
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
    done = [f"at most {side} pixels wide and high"] * smaller + [f"WebP quality {quality}"] * (quality is not None)
    return [_uri("webp", webp) for webp in encoded], ", ".join(done) or "exact"


def _within(image: Image.Image, side: int) -> Image.Image:
    """The image, scaled down if its longer side has more than `side` pixels."""
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
