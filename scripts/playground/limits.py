"""The limits of the server. Whatever exceeds one is answered with a sentence that names it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd.request import Request

DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp);base64,")
FORMATS = ("PNG", "JPEG", "WEBP")


class Wrong(ValueError):
    """What a client sent cannot be used. The message is a sentence."""


@dataclass(frozen=True)
class Limits:
    """See the flags of playground.py. `grace` is how long work goes on without its client."""

    steps: int = 150
    pixels: int = 1024 * 1024  # of a picture, after the second pass
    images: int = 16  # of one call of txt2img or img2img
    queue: int = 64  # pictures that wait
    queue_each: int = 16  # pictures of one client that wait
    body: int = 32 << 20  # bytes
    body_seconds: float = 60
    commas: int = 25_000  # of a request, so of the values in its JSON: each wrong one takes 0.05 ms to describe
    upload_pixels: int = 4096 * 4096
    seconds: float = 600  # for one picture
    grace: float = 10  # seconds
    kept: int = 24 << 20  # bytes of finished pictures and their steps

    def check_steps(self, name: str, steps: int | None) -> None:
        if steps is not None and steps > self.steps:
            raise Wrong(f"{name} should be at most {self.steps}, the limit of this server, not {steps}.")

    def check_size(self, request: Request) -> None:
        """Raises Wrong if the picture of a request, whose size is known, would have too many pixels."""
        scale = request.hires_scale
        width, height = round(request.width * scale), round(request.height * scale)
        self.check_steps("n_inference_steps", request.n_inference_steps)
        if width * height > self.pixels:
            most = f"at most {self.pixels:,} pixels, the limit of this server"
            names = "width and height" if scale == 1 else f"width and height, enlarged {scale:g} times,"
            raise Wrong(f"{names} should give {most}, not {width} x {height}.")

    def image_bytes(self, name: str, text: str) -> io.BytesIO:
        """The file in a data URL, or in base64 alone. Raises Wrong for anything else, and for too many pixels."""
        from PIL import Image

        if re.match("(?i)(https?|ftp|file):", text):
            raise Wrong(f"{name} should be the image itself as a data URL, not an address: nothing is fetched.")
        match = DATA_URL.match(text)
        if match is None and text.startswith("data:"):
            raise Wrong(f"{name} should be a data URL of a PNG, JPEG or WebP image, not {text[:40]!r}.")
        try:
            content = base64.b64decode(text[match.end() if match else 0 :], validate=True)
            file = io.BytesIO(content)
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
        except Exception:  # Pillow's readers can raise anything
            raise Wrong(f"{name} should be a PNG, JPEG or WebP image in base64, and this is not one.") from None
        if width * height > self.upload_pixels:
            most = f"at most {self.upload_pixels:,} pixels, the limit of this server"
            raise Wrong(f"{name} should have {most}, not {width} x {height}.")
        return io.BytesIO(content)
