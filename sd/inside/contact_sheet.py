"""Rows of images, uint8 (H, W, 3), and their labels -> one contact sheet, as a PIL image."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between images
MAX_LINES = 3  # in a label


def contact_sheet(rows: list[list[np.ndarray]], labels: list[list[str]]) -> Image.Image:
    """Puts images of one size in rows, each with its label above it. Rows can have different lengths.

    A label also uses the space above images to its right whose label is "". It wraps to at most three lines.

    Raises ValueError unless every row has an image and every image a label.
    """
    if not rows or [len(row) for row in rows] != [len(texts) for texts in labels] or not all(rows):
        raise ValueError("labels should be one for each image, in rows of one image or more.")
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    font = ImageFont.load_default(max(10, width // 32))
    strips = [_strip(texts, width, columns, font) for texts in labels]
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


def _strip(texts: list[str], width: int, columns: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The labels of one row of images, each `width` pixels wide. The longest label decides the height."""
    places = [x for x, text in enumerate(texts) if text]
    ends = [*places[1:], columns]
    widths = [(end - x) * (width + GAP) - GAP for x, end in zip(places, ends)]
    wrapped = [_wrap(texts[x], font, room - GAP) for x, room in zip(places, widths)]
    line_height = sum(font.getmetrics())
    height = max(map(len, wrapped), default=0) * line_height + GAP
    strip = Image.new("RGB", (columns * (width + GAP) - GAP, height), "white")
    for x, room, lines in zip(places, widths, wrapped):
        label = Image.new("RGB", (room, height), "white")  # drawn separately, so that it cannot overlap the next
        for number, line in enumerate(lines):
            ImageDraw.Draw(label).text((GAP // 2, number * line_height + GAP // 2), line, fill="black", font=font)
        strip.paste(label, (x * (width + GAP), 0))
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Splits the text into lines of `width` pixels. The last line ends with "..." if the text is too long."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + " ...") > width:
            last = last.rpartition(" ")[0]
        lines = [*lines[: MAX_LINES - 1], last + " ..."]
    return lines
