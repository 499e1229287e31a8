"""Rows of images, uint8 (H, W, 3), and their labels -> one contact sheet, as a PIL image."""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np
from PIL import Image, ImageDraw

from sd.inside.label_fonts import pieces

GAP = 4  # pixels between images
MAX_LINES = 3  # in a label


def contact_sheet(rows: list[list[np.ndarray]], labels: list[list[str]]) -> Image.Image:
    """Puts images of one size in rows, each with its label above it. Rows can have different lengths.

    A label also uses the space above images to its right whose label is "". It wraps to at most three lines.
    Labels can be in any script that the system has a font for.

    Raises ValueError unless every row has an image and every image a label.
    """
    if not rows or [len(row) for row in rows] != [len(texts) for texts in labels] or not all(rows):
        raise ValueError("labels should be one for each image, in rows of one image or more.")
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    strips = [_strip(texts, width, columns, max(10, width // 32)) for texts in labels]
    sheet_height = sum(strip.height + height + GAP for strip in strips) - GAP
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, sheet_height), "white")
    top = 0
    for images, strip in zip(rows, strips):
        sheet.paste(strip, (0, top))
        for x, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (x * (width + GAP), top + strip.height))
        top += strip.height + height + GAP
    return sheet


def square_sheet(images: list[np.ndarray], labels: list[str]) -> Image.Image:
    """A contact sheet with about as many rows as columns. Raises the errors of `contact_sheet`."""
    columns = math.ceil(math.sqrt(len(images))) or 1
    starts = range(0, len(images), columns)
    return contact_sheet([images[i : i + columns] for i in starts], [labels[i : i + columns] for i in starts])


def _strip(texts: list[str], width: int, columns: int, size: int) -> Image.Image:
    """The labels of one row of images, each `width` pixels wide. The longest label decides the height."""
    places = [x for x, text in enumerate(texts) if text]
    ends = [*places[1:], columns]
    widths = [(end - x) * (width + GAP) - GAP for x, end in zip(places, ends)]
    wrapped = [[pieces(line, size) for line in _wrap(texts[x], size, room - GAP)] for x, room in zip(places, widths)]
    metrics = [font.getmetrics() for lines in wrapped for line in lines for _, font in line]
    ascent, descent = (max(heights) for heights in zip(*metrics)) if metrics else (0, 0)
    height = max(map(len, wrapped), default=0) * (ascent + descent) + GAP
    strip = Image.new("RGB", (columns * (width + GAP) - GAP, height), "white")
    for x, room, lines in zip(places, widths, wrapped):
        label = Image.new("RGB", (room, height), "white")  # drawn separately, so that it cannot overlap the next
        for number, line in enumerate(lines):
            left, baseline = GAP // 2, number * (ascent + descent) + ascent + GAP // 2
            for text, font in line:
                ImageDraw.Draw(label).text((left, baseline), text, fill="black", font=font, anchor="ls")
                left += font.getlength(text)
        strip.paste(label, (x * (width + GAP), 0))
    return strip


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Splits the text into lines of `width` pixels. The last line ends with "..." if the text is too long.

    Lines end between words, and within a word that is longer than a line, as in Chinese.
    """
    lines, text = [], " ".join(text.split())
    while text and len(lines) < MAX_LINES:
        line = _beginning(text, size, width)
        lines.append(line.rstrip())
        text = text[len(line) :]
    if text:
        lines[-1] = _beginning(lines[-1], size, width, " ...").rstrip() + " ..."
    return lines


def _beginning(text: str, size: int, width: int, end: str = "") -> str:
    """As much of the text as fits with `end` after it: up to a space, or if there is none, up to a letter."""
    count = bisect_right(range(1, len(text) + 1), width, key=lambda n: _length(text[:n] + end, size))
    if count < len(text):
        count = text.rfind(" ", 0, count + 1) + 1 or max(count, 1)
    return text[:count]


def _length(text: str, size: int) -> float:
    return sum(font.getlength(piece) for piece, font in pieces(text, size))
