"""Images written as PNG, JPEG and WebP. How their settings are stored is tested in scripts/test_saved_settings.py."""

import numpy as np
import pytest
from PIL import Image

from sd.images import read_image, write_image


def colours():
    """A red and a blue half, uint8 (40, 60, 3): the edge would blur if colours had half the resolution."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :29], pixels[:, 29:] = (220, 20, 30), (20, 30, 220)
    return pixels


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.WebP", "WEBP")])
@pytest.mark.parametrize("image", [colours(), Image.fromarray(colours())])
@pytest.mark.parametrize("parameters", [None, "a\nSteps: 1"])
def test_the_suffix_chooses_the_format(tmp_path, name, kind, image, parameters):
    path = tmp_path / "new" / name
    write_image(path, image, parameters)
    with Image.open(path) as written:
        assert written.format == kind
        assert bool(written.info.keys() & {"exif", "parameters"}) == (parameters is not None)
    difference = np.abs(np.asarray(read_image(path)).astype(int) - colours())
    assert difference.mean() < {"PNG": 0.001, "JPEG": 2, "WEBP": 3}[kind]


def test_an_existing_file_is_kept_and_other_suffixes_are_refused(tmp_path):
    for name in ("a.jpg", "a.webp", "a.png"):
        (tmp_path / name).write_text("old")
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            write_image(tmp_path / name, colours())
        assert (tmp_path / name).read_text() == "old"
    for name in ("a.bmp", "a"):
        with pytest.raises(ValueError, match=r"An image should be a \.png, \.jpg, \.jpeg or \.webp file, not "):
            write_image(tmp_path / name, colours())
    with pytest.raises(ValueError, match="Expected a uint8 array"):
        write_image(tmp_path / "b.jpg", colours().astype(float))
