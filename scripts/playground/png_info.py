"""The settings in a picture's file, as the page and AUTOMATIC1111's clients get them."""

from __future__ import annotations

import io

from scripts.playground.limits import Wrong
from scripts.support import saved_settings

MAX_TEXT, MAX_LINE = 50_000, 12_000  # characters; a prompt has at most 10,000


def settings_in(picture: io.BytesIO) -> dict:
    """{"info": the text, "prompt", "negative", "settings": {"Steps": "20", ...}}; empty if the file has none."""
    try:
        text = saved_settings.picture_text(picture) or ""
    except ValueError:
        raise Wrong("image should be a picture that can be read, and this one is damaged.") from None
    if max(map(len, text.split("\n"))) > MAX_LINE or len(text) > MAX_TEXT:  # the pattern's time grows with its square
        raise Wrong(f"image should have settings of at most {MAX_TEXT:,} characters, {MAX_LINE:,} to a line.")
    saved = saved_settings.parse(text)
    if saved_settings.USUAL.isdisjoint(saved.pairs):
        return {"info": text, "prompt": "", "negative": "", "settings": {}}
    return {"info": text, "prompt": saved.prompt, "negative": saved.negative, "settings": saved.pairs}
