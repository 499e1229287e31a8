"""The settings in a picture: `quote` for writing them, `read` for --from.

They are one text, as the AUTOMATIC1111 web UI writes it: the prompt, "Negative prompt: ...", and a last line of pairs
such as "Steps: 20, Sampler: Euler a". A PNG file has it in the text chunk "parameters", JPEG and WebP in the EXIF tag
UserComment. A .txt file may hold the text itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

# How the web UI splits the last line: a name, and a value in quotes or up to the next comma.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LEAST_PAIRS = 3  # a last line with fewer belongs to the prompt
USUAL = {"Steps", "Sampler", "Seed"}  # without any of these, a last line with colons and commas is only a prompt
NEGATIVE = "Negative prompt:"
MAX_BYTES = 1_000_000
EXIF, USER_COMMENT = 0x8769, 0x9286


@dataclass(frozen=True)
class SavedSettings:
    """What a picture says of itself. `pairs` are the names and values of its last line."""

    prompt: str
    negative: str
    pairs: dict[str, str]


def quote(value: object) -> str:
    """A value as the web UI writes it: in quotes, as JSON, if it would not be read back otherwise."""
    text = str(value)
    plain = text == text.strip() and not re.search(r'[,:"\n\r]', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def protect(prompt: str) -> str:
    r"""A prompt none of whose lines looks like the beginning of the negative prompt: a colon may be written \:."""
    return re.sub(rf"(?m)^([^\S\n]*{NEGATIVE[:-1]}):", r"\1\\:", prompt)


def parse(text: str) -> SavedSettings:
    """Splits a text as the web UI does."""
    *lines, last = text.replace("\r\n", "\n").strip().split("\n")
    pairs = PAIR.findall(last)
    if len(pairs) < LEAST_PAIRS:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:]).strip().removeprefix(NEGATIVE)
    return SavedSettings(prompt.strip(), negative.strip(), {name: _unquote(value) for name, value in pairs})


def read(path: Path) -> SavedSettings:
    """The settings in a picture or in a .txt file. Raises ValueError or OSError, in one sentence, if there are none."""
    text = _text_file(path) if path.suffix.lower() == ".txt" else _picture_text(path)
    settings = parse(text or "")
    if USUAL.isdisjoint(settings.pairs):
        raise ValueError(
            f"--from should be a picture with its settings, as this tool and the AUTOMATIC1111 web UI write them: "
            f"{path} has none."
        )
    return settings


def _unquote(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:  # quotes that are not JSON belong to the value
            pass
    return value.strip()


def _text_file(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--from should be a picture or a text file in UTF-8, and {path} is neither.") from None


def _picture_text(path: Path) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            text = image.info.get("parameters")
            if text is None and image.format == "PNG":
                text = image.text.get("parameters")  # decodes the picture, to reach the chunks behind it
            if text is None:
                text = image.getexif().get_ifd(EXIF).get(USER_COMMENT)
    except UnidentifiedImageError:
        raise ValueError(f"--from should be a PNG, JPEG or WebP picture, and {path} is none of these.") from None
    except Exception as error:  # on a damaged file, Pillow's readers can raise anything
        raise ValueError(f"--from {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    return _comment(text) if isinstance(text, bytes) else text


def _comment(comment: bytes) -> str:
    """The text of an EXIF UserComment, whose first 8 bytes name its encoding."""
    kind, text = comment[:8], comment[8:]
    if kind == b"UNICODE\0":
        little = text[1::2].count(0) > text[::2].count(0)  # the usual tools write big-endian, some the other one
        return text.decode("utf-16-le" if little else "utf-16-be", "replace")
    known = kind in (b"ASCII\0\0\0", bytes(8))
    return (text if known else comment).decode("utf-8", "replace").strip("\0")
