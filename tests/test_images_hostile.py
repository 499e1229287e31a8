"""Images of every format are read correctly; corrupt images, decompression bombs and other files are refused.

`--slow` tries 5,000 hostile files and 1,000 honest ones; `FUZZ_FIRST=5000` tries others.
"""

import io
import os
import random
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from sd.images import image_to_tensor, read_image, read_mask
from tests.support import picture_mutations
from tests.support.fuzzing import fuzz
from tests.support.picture_mutations import LOSSLESS, OTHERS, honest, png, png_chunk
from tests.test_images_reading import STORED

FIRST = int(os.environ.get("FUZZ_FIRST", 0))


@pytest.mark.parametrize("pictures", [25, pytest.param(5000, marks=pytest.mark.slow)])
def test_hostile_pictures_are_read_or_refused(tmp_path, pictures):
    outcomes = fuzz(tmp_path, FIRST, pictures=pictures)["outcomes"]
    assert outcomes["honest loaded"] == len(range(FIRST, FIRST + pictures)[-FIRST % 6 :: 6])
    assert outcomes["other refused"] == len(range(FIRST, FIRST + pictures)[(5 - FIRST) % 6 :: 6])
    assert {"damaged loaded", "damaged refused", "cut refused", "bomb refused"} <= set(outcomes)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_honest_pictures_are_read_correctly(count):
    """Lossless formats are exact, lossy ones are close. The EXIF orientation is applied."""
    rng = random.Random(FIRST)
    for _ in range(count):
        kind, image, content, orientation = honest(rng)
        seen = read_image(io.BytesIO(content))
        assert seen.mode == "RGB"
        assert seen.info == {}
        # Undo the orientation, to compare with what was stored.
        stored = STORED[orientation](np.asarray(seen))
        expected = np.asarray(read_image(image)).astype(int)
        difference = abs(stored - expected)
        assert stored.shape == expected.shape
        assert difference.max() == 0 if kind in LOSSLESS else difference.mean() < 12, (kind, image.mode, orientation)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 600)])
def test_very_wide_pictures_are_resized(tmp_path, size):
    levels = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[::-1])
    Image.fromarray(levels).save(tmp_path / "a.png", compress_level=1)
    assert read_image(tmp_path / "a.png").size == size
    assert image_to_tensor(tmp_path / "a.png", 64, 64).shape == (1, 3, 64, 64)
    mask = read_mask(tmp_path / "a.png", 64, 64, feather=4)
    assert mask.shape == (1, 1, 64, 64)


@pytest.mark.parametrize("kind", OTHERS)
def test_files_that_are_not_pictures(tmp_path, kind):
    path = tmp_path / "picture.png"
    path.write_bytes(OTHERS[kind])
    for read in (read_image, lambda path: read_mask(path, 8, 8)):
        with pytest.raises(
            ValueError, match=r"picture\.png is not an image that can be read: give a PNG, JPEG or WebP"
        ):
            read(path)


def test_no_program_is_started_for_a_postscript_picture(tmp_path, monkeypatch):
    """Pillow calls Ghostscript, `gs`, to read one."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'canary'}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert shutil.which("gs") == str(gs)
    (tmp_path / "a.png").write_bytes(OTHERS["eps"])
    with pytest.raises(ValueError, match="is not an image that can be read"):
        read_image(tmp_path / "a.png")
    assert not (tmp_path / "canary").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a device or a pipe, not a file"):
        read_image(tmp_path / "pipe")


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (50_000, 50_000)])
def test_a_picture_with_a_huge_size_in_its_header_is_refused_at_once(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(ValueError, match=r"bomb\.png is too large to be opened safely: make it smaller first"):
        read_image(tmp_path / "bomb.png")


def test_too_little_memory_is_a_value_error(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture_mutations.seeds()["PNG RGB"])

    def fail(*_):
        raise MemoryError

    for step in ("PIL.PngImagePlugin.PngImageFile.load", "PIL.Image.open", "sd.images._to_srgb"):
        with monkeypatch.context() as patch:
            patch.setattr(step, lambda *_, **__: fail())
            with pytest.raises(ValueError, match=r"a\.png is too large for the memory of this computer"):
                read_image(tmp_path / "a.png")


def test_text_chunks_that_decompress_to_megabytes_are_refused(tmp_path):
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        note = png_chunk(kind, head + zlib.compress(bytes(1 << 23)))
        (tmp_path / "a.png").write_bytes(png(8, 8, note, content=bytes(25 * 8)))
        with pytest.raises(ValueError, match=r"a\.png (cannot be read|is damaged).*too large"):
            read_image(tmp_path / "a.png")
