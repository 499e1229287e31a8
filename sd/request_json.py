"""A `Request` -> a dict for JSON, with its images in it, and back."""

from __future__ import annotations

import base64
import io
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sd.adapters.control import controls_from_dicts
from sd.images import read_image, read_mask_image

if TYPE_CHECKING:
    from sd.request import Request

PNG_URL = "data:image/png;base64,"  # how an image travels in JSON
IMAGES = ("input_image", "mask_image")


def to_dict(request: Request) -> dict:
    """`Request.to_dict`."""
    read = request.read_images()
    values = {name: _plain(value) for name, value in vars(read).items()}
    if read.control is not None:
        values["control"] = [one.to_dict() | {"image": _png_url(one.image)} for one in read.control]
    return values | {name: _png_url(getattr(read, name)) for name in IMAGES}


def from_dict(cls: type[Request], values: dict) -> Request:
    """`Request.from_dict`, for `cls` the class."""
    names = [field.name for field in fields(cls)]
    unknown = [name for name in values if name not in names] if isinstance(values, dict) else values
    if not isinstance(values, dict) or unknown:
        raise ValueError(f"request should be a dict of {', '.join(names)}, not {unknown!r:.200}.")
    if "prompt" not in values:
        raise ValueError("prompt should be given, not None.")
    read = {name: _from_png_url(name, values.get(name)) for name in IMAGES}
    if values.get("control") is not None:
        read["control"] = controls_from_dicts(values["control"], _from_png_url)
    return cls(**(values | read))


def _plain(value: object) -> object:
    """A setting for JSON: numpy's numbers become Python's, a tuple of prompts becomes a list."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _png_url(image: Image.Image | None) -> str | None:
    if image is None:
        return None
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return PNG_URL + base64.b64encode(buffer.getvalue()).decode()


def _from_png_url(name: str, text: object) -> Image.Image | None:
    if text is None:
        return None
    if not isinstance(text, str) or not text.startswith(PNG_URL):
        raise ValueError(f"{name} should be a text that begins with {PNG_URL!r}, not {text!r:.200}.")
    try:
        content = base64.b64decode(text.removeprefix(PNG_URL), validate=True)
    except ValueError:
        raise ValueError(f"{name} should be a PNG data URL in base64, and this one is damaged.") from None
    file = io.BytesIO(content)
    image = read_mask_image(file) if name == "mask_image" else read_image(file, name=name)
    # `Control.read` reads it again: some ControlNets fill its transparent parts.
    return Image.open(file) if name == "control.image" else image
