"""Contact sheets: every image is there, unchanged, under its label."""

import numpy as np
import pytest
from PIL import Image

from sd.inside.contact_sheet import GAP, contact_sheet, square_sheet


def noise(seed: int, height: int = 20, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def find(sheet: Image.Image, picture: np.ndarray) -> tuple[int, int]:
    """The corner (x, y) of a picture in the sheet."""
    pixels = np.asarray(sheet)
    height, width = picture.shape[:2]
    for y, x in np.argwhere((pixels == picture[0, 0]).all(-1)):
        if np.array_equal(pixels[y : y + height, x : x + width], picture):
            return x, y
    raise AssertionError("the picture is not on the sheet")


def is_blank(sheet: Image.Image, left: int, top: int, right: int, bottom: int) -> bool:
    return sheet.crop((left, top, right, bottom)).getextrema() == ((255, 255),) * 3


def test_pictures_in_rows_under_their_labels():
    pictures = [[noise(0), noise(1)], [noise(2)]]
    sheet = contact_sheet(pictures, [["one", "two"], ["three"]])
    corners = [find(sheet, picture) for row in pictures for picture in row]
    strip = corners[0][1]
    assert strip > 10
    assert corners == [(0, strip), (60 + GAP, strip), (0, 2 * strip + 20 + GAP)]
    assert sheet.size == (120 + GAP, 2 * (strip + 20) + GAP)
    assert not is_blank(sheet, 0, 0, 60, strip)
    assert not is_blank(sheet, 60 + GAP, 0, 120 + GAP, strip)
    assert is_blank(sheet, 60 + GAP, strip + 20, 120 + GAP, 2 * (strip + 20) + GAP)


def test_a_label_uses_the_space_of_empty_labels():
    row = [noise(0), noise(1)]
    label = "a rather long label for this"
    narrow, wide = contact_sheet([row], [[label, "b"]]), contact_sheet([row], [[label, ""]])
    assert wide.height < narrow.height  # it needs fewer lines
    assert not is_blank(wide, 60 + GAP, 0, 120 + GAP, find(wide, row[0])[1])


def test_long_labels_stay_in_their_place():
    row = [noise(0), noise(1)]
    for label in ("word " * 100, "w" * 100):
        sheet = contact_sheet([row], [[label, ""]])
        assert find(sheet, row[0])[1] < 60
        sheet = contact_sheet([row], [[label, "."]])
        top = find(sheet, row[0])[1]
        assert is_blank(sheet, 60, 0, 60 + GAP, top)
        assert is_blank(sheet, 80 + GAP, 0, 120 + GAP, top)


def test_no_labels():
    sheet = contact_sheet([[noise(0)]], [[""]])
    assert sheet.size == (60, 20 + GAP)
    assert find(sheet, noise(0)) == (0, GAP)


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_square_sheets(count, columns):
    pictures = [noise(seed) for seed in range(count)]
    sheet = square_sheet(pictures, [f"seed {seed}" for seed in range(count)])
    corners = [find(sheet, picture) for picture in pictures]
    assert corners == sorted(corners, key=lambda corner: (corner[1], corner[0]))
    assert len({x for x, _ in corners}) == columns


@pytest.mark.parametrize("rows, labels", [([], []), ([[]], [[]]), ([[0]], [[]]), ([[0], [0]], [["a"]])])
def test_bad_labels(rows, labels):
    rows = [[noise(0) for _ in row] for row in rows]
    with pytest.raises(ValueError, match="labels should be one for each image, in rows of one image or more."):
        contact_sheet(rows, labels)


def test_labels_without_spaces_go_on_in_the_next_line():
    picture = noise(0, width=120)
    heights = [find(contact_sheet([[picture]], [[label]]), picture)[1] for label in ("w" * 5, "w" * 20, "w" * 100)]
    assert heights[0] < heights[1] < heights[2]
