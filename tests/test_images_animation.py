"""Writing animations, which is atomic, like writing PNG files."""

import numpy as np
import pytest
from PIL import Image

from sd.images import write_animation


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def frames_of(path) -> tuple[list[np.ndarray], list[int]]:
    """The frames of an animation, and how many milliseconds each is shown."""
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        frames, durations = [], []
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return frames, durations


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "A.GIF"])
def test_animation(tmp_path, name):
    frames = [np.full((24, 40, 3), colour, np.uint8) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    write_animation(tmp_path / "new" / name, frames, frame_ms=80, last_ms=1000)
    written, durations = frames_of(tmp_path / "new" / name)
    assert durations == [80, 80, 1000]
    for frame, expected in zip(written, frames):
        assert np.abs(frame.astype(int) - expected).max() <= 8
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


def test_animation_of_one_frame(tmp_path):
    for name in ("a.webp", "a.gif"):
        write_animation(tmp_path / name, [noise()])
        assert Image.open(tmp_path / name).size == (9, 6)


def test_animation_keeps_what_is_there(tmp_path):
    path = tmp_path / "a.gif"
    path.write_text("old")
    with pytest.raises(FileExistsError, match=r"a\.gif exists already and is left as it is"):
        write_animation(path, [noise()])
    with pytest.raises(ValueError, match="Expected a uint8 array of shape"):
        write_animation(path, [noise(), noise()[0]], overwrite=True)
    assert path.read_text() == "old"
    write_animation(path, [noise(), noise(seed=1)], overwrite=True)
    assert Image.open(path).n_frames == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_bad_animation(tmp_path):
    with pytest.raises(ValueError, match=r"An animation should be a \.webp or \.gif file, not .*a\.mp4\."):
        write_animation(tmp_path / "a.mp4", [noise()])
    with pytest.raises(ValueError, match="An animation should have at least one frame."):
        write_animation(tmp_path / "a.gif", [])
    assert list(tmp_path.iterdir()) == []
