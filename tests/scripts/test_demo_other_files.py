"""The files that the demo script writes beside its pictures: grids, films and reports."""

import base64
import html
import importlib
import io
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.demo import frame_count
from sd.images import write_animation
from tests.support.demo_results import names, prompt_and_seed


def test_only_the_file_that_was_named_is_overwritten(run_demo):
    precious = ["picture.png", "cat-2.png", "cat-grid.png"]
    for name in (*precious, "cat.png"):
        Path(name).write_text("precious")
    assert run_demo("a cat", "--film", "cat.gif", "--overwrite")[0] == 0
    assert run_demo("a cat", "--n", 2, "--grid", "--out", "cat.png", "--overwrite")[0] == 0
    assert run_demo("a cat", "--out", ".", "--overwrite")[0] == 0
    assert [Path(name).read_text() for name in precious] == ["precious"] * 3
    assert names() == sorted(
        [*precious, "cat.png", "cat.gif", "picture-2.png", "picture-3.png", "cat-3.png", "cat-grid-2.png"]
    )


@pytest.mark.parametrize(
    "arguments, rows, columns",
    [(["a cat", "--n", 3], 2, 2), (["a {red|blue} cat", "a dog"], 2, 2), (["a {red|blue|green} cat", "--n", 2], 3, 2)],
)
def test_grid(run_demo, arguments, rows, columns):
    code, out, _ = run_demo(*arguments, "--grid", "--seed", 5, "--out", "cats.png")
    assert code == 0
    count = len(names()) - 1
    assert out.splitlines()[-1] == f"cats-grid.png  {count} images"
    with Image.open("cats-grid.png") as sheet:
        assert sheet.width == columns * (32 + 4) - 4
        assert rows * 40 < sheet.height < rows * (40 + 50)
        assert "Seed: 5" in sheet.text["parameters"]
        pixels = np.asarray(sheet)
    first, last = np.asarray(Image.open("cats.png")), np.asarray(Image.open(f"cats-{count}.png"))
    top = next(y for y in range(len(pixels)) if np.array_equal(pixels[y : y + 40, :32], first))
    assert top > 10
    x = (count - 1) % columns * 36
    assert np.array_equal(pixels[-40:, x : x + 32], last)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_the_number_of_frames_is_that_of_the_file(tmp_path, suffix):
    """Pillow joins neighbours that look the same."""
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    path = tmp_path / f"film{suffix}"
    write_animation(path, [black, white, white])
    assert frame_count(path) == 2


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_film(run_demo, suffix):
    code, out, _ = run_demo("a cat", "--n", 2, "--seed", 5, "--film", f"cat{suffix}")
    assert code == 0
    assert names() == sorted([f"cat-2{suffix}", f"cat{suffix}", "picture-2.png", "picture.png"])
    with Image.open(f"cat{suffix}") as film:
        assert out.splitlines()[1] == f"cat{suffix}  {film.n_frames} frames"
    with Image.open(f"cat-2{suffix}") as film:
        assert film.size == (32, 40)
        assert film.is_animated
    assert prompt_and_seed("picture-2.png") == ("a cat", 6)
    run_demo("a cat", "--n", 2, "--seed", 5, "--out", "again.png")
    for one, other in (("picture.png", "again.png"), ("picture-2.png", "again-2.png")):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


@pytest.mark.slow
def test_reports(run_demo):
    code, out, _ = run_demo("a {red|blue} cat", "--seed", 5, "--report", "cat.html", "--film", "cat.gif")
    assert code == 0
    assert names() == sorted(["cat.html", "cat-2.html", "cat.gif", "cat-2.gif", "picture.png", "picture-2.png"])
    assert out.splitlines()[2] == "cat.html  0.1 MB"
    page = Path("cat-2.html").read_text(encoding="utf-8")
    assert "<bdi>a blue cat</bdi>" in page
    (line,) = (line for line in page.splitlines() if "<code>" in line)
    command = html.unescape(re.sub(r"<[^>]+>", "", line.partition("<code>")[2].partition("</code>")[0]))
    assert run_demo(*shlex.split(command)[2:], "--out", "again.png")[0] == 0
    run_demo("a {red|blue} cat", "--seed", 5, "--out", "without.png")
    for one in ("picture-2.png", "again.png", "without-2.png"):
        with Image.open(one) as picture:
            uri = base64.b64decode(page.partition("data:image/png;base64,")[2].partition('"')[0])
            assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(uri))))


@pytest.mark.parametrize(
    "flags, module, function, what, error",
    [
        (["--film", "cat.gif"], "sd.inside.film", "frames", "film", KeyError("x")),
        (["--film", "cat.gif"], "sd.images", "write_animation", "film", OSError("It is full.")),
        (["--report", "cat.html"], "sd.inside.film", "frames", "report", KeyError("x")),
        (["--report", "cat.html"], "sd.inside.report", "report", "report", KeyError("x")),
        (["--report", "cat.html"], "scripts.demo", "details", "report", MemoryError("Too large.")),
        (["--report", "cat.html"], "sd.inside.report", "write_report", "report", OSError("It is full.")),
        (["--grid"], "scripts.demo", "grid", "grid", ValueError("It is broken.")),
    ],
)
def test_what_fails_after_drawing_loses_no_picture(run_demo, monkeypatch, flags, module, function, what, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(importlib.import_module(module), function, fail)
    code, out, err = run_demo("a cat", "--n", 2, *flags)
    assert code == 2
    assert [line.split()[0] for line in out.splitlines()] == ["picture.png", "picture-2.png"]
    assert names() == ["picture-2.png", "picture.png"]
    line = "KeyError: 'x'" if isinstance(error, KeyError) else str(error)
    assert err.count(f"demo.py: no {what}: {line}\n") == (1 if what == "grid" else 2)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "flag, file, start",
    [("--film", "cat.gif", b"GIF89a" + struct.pack("<2H", 32, 40)), ("--report", "cat.html", b"<!DOCTYPE html>")],
)
def test_films_and_reports_overwrite_only_when_told(run_demo, flag, file, start):
    Path(file).write_text("precious")
    code, _, err = run_demo("a cat", flag, file)
    assert code == 2
    assert f"{flag} {file} already exists" in err
    assert names() == [file]
    assert run_demo("a cat", flag, file, "--overwrite")[0] == 0
    assert Path(file).read_bytes().startswith(start)
