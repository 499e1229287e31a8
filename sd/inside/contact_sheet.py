"""Many pictures -> one contact sheet, each picture with its label above it.

In: rows of pictures, uint8 (H, W, 3), and their labels. Out: a PIL image.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between pictures
MAX_LINES = 3  # of a label


def contact_sheet(rows: list[list[np.ndarray]], labels: list[list[str]]) -> Image.Image:
    """Rows of pictures, all of one size, each with a label above it. Rows may be of different lengths.

    A label runs on over the pictures to its right that have none ("") and is wrapped, to three lines at most.

    Raises ValueError unless every row has a picture and every picture a label.
    """
    if not rows or [len(row) for row in rows] != [len(texts) for texts in labels] or not all(rows):
        raise ValueError("labels should be one for each picture, in rows of one picture or more.")
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    font = ImageFont.load_default(max(10, width // 32))
    strips = [_strip(texts, width, columns, font) for texts in labels]
    sheet_height = sum(strip.height + height + GAP for strip in strips) - GAP
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, sheet_height), "white")
    top = 0
    for pictures, strip in zip(rows, strips):
        sheet.paste(strip, (0, top))
        for x, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x * (width + GAP), top + strip.height))
        top += strip.height + height + GAP
    return sheet


def square_sheet(pictures: list[np.ndarray], labels: list[str]) -> Image.Image:
    """Pictures in rows that make the sheet about as many pictures high as wide. Raises as `contact_sheet` does."""
    columns = math.ceil(math.sqrt(len(pictures))) or 1
    starts = range(0, len(pictures), columns)
    return contact_sheet([pictures[i : i + columns] for i in starts], [labels[i : i + columns] for i in starts])


def _strip(texts: list[str], width: int, columns: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The labels of one row of pictures of `width` pixels, as high as the longest of them needs."""
    places = [x for x, text in enumerate(texts) if text]
    ends = [*places[1:], columns]
    widths = [(end - x) * (width + GAP) - GAP for x, end in zip(places, ends)]
    wrapped = [_wrap(texts[x], font, room - GAP) for x, room in zip(places, widths)]
    line_height = sum(font.getmetrics())
    height = max(map(len, wrapped), default=0) * line_height + GAP
    strip = Image.new("RGB", (columns * (width + GAP) - GAP, height), "white")
    for x, room, lines in zip(places, widths, wrapped):
        label = Image.new("RGB", (room, height), "white")  # of its own, so that nothing sticks out of it
        for number, line in enumerate(lines):
            ImageDraw.Draw(label).text((GAP // 2, number * line_height + GAP // 2), line, fill="black", font=font)
        strip.paste(label, (x * (width + GAP), 0))
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of `width` pixels; "..." stands for what does not fit in the last."""
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
