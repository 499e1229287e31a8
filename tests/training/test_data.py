"""Loading training images: scenes, which are drawn once, and folders, which are read or refused in one sentence."""

import errno
import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd.training import data
from sd.training.data import DataError, load_folder, load_scenes
from sd.training.world.render import render
from sd.training.world.scenes import scene_and_captions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, each with its caption in a text file."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.jpg", "green"), ("c.webp", "blue")):
        Image.new("RGB", (48, 40), colour).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return folder


def test_scenes_are_those_of_their_seeds(tmp_path):
    pictures = load_scenes(tmp_path, 5, 32, first_seed=100)
    assert pictures.pixels.shape == (5, 32, 32, 3)
    scene, captions = scene_and_captions(103)
    assert np.array_equal(pictures.pixels[3], np.asarray(render(scene, 103, 32)))
    assert pictures.captions[3] == captions


def test_scenes_are_drawn_once(tmp_path, monkeypatch):
    load_scenes(tmp_path, 3, 32)
    monkeypatch.setattr(data, "_draw", None)
    assert len(load_scenes(tmp_path, 3, 32)) == 3


def test_a_full_disk_says_how_much_is_needed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\): 3 MB are needed"):
        load_scenes(tmp_path, 1000, 32)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_folder_do_not_disturb_each_other(tmp_path):
    """The second begins and ends when the first is half done."""
    path, pictures = tmp_path / "scenes.npy", np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)

    def first():
        yield from pictures[:2]
        data._write_pixels(path, iter(pictures), 4, 2, "second")
        yield from pictures[2:]

    data._write_pixels(path, first(), 4, 2, "first")
    assert np.array_equal(np.load(path, mmap_mode="r"), pictures)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_an_unfinished_array_leaves_no_file(tmp_path, monkeypatch, error):
    """And it is not memory-mapped: on Windows, a mapped file can be neither removed nor renamed."""

    def broken():
        yield np.zeros((2, 2, 3), np.uint8)
        raise error

    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("the file is mapped while it is written"))
    with pytest.raises(error):
        data._write_pixels(tmp_path / "scenes.npy", broken(), 4, 2, "drawing")
    assert list(tmp_path.iterdir()) == []


def test_batches_are_in_the_range_of_the_networks(tmp_path):
    batch = load_scenes(tmp_path, 4, 32).batch(torch.tensor([3, 0]))
    assert batch.shape == (2, 3, 32, 32)
    assert -1 <= batch.min() < -0.3
    assert 0.3 < batch.max() <= 1


def test_a_folder_with_texts(folder, tmp_path):
    pictures = load_folder(folder, tmp_path / "out", 16)
    assert pictures.pixels.shape == (3, 16, 16, 3)
    assert pictures.captions == [["a red square"], ["a green square"], ["a blue square"]]
    assert pictures.pixels[0, 0, 0].tolist() == [255, 0, 0]


def test_a_folder_with_one_list(folder, tmp_path):
    lines = [{"file": "b.jpg", "caption": "one"}, {"file": "a.png", "caption": "two"}]
    lines.append({"file": "b.jpg", "caption": "three"})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    pictures = load_folder(folder, tmp_path / "out", 16)
    assert pictures.captions == [["one", "three"], ["two"]]


def test_a_changed_folder_is_read_again(folder, tmp_path):
    load_folder(folder, tmp_path / "out", 16)
    (folder / "a.png").unlink()
    assert len(load_folder(folder, tmp_path / "out", 16)) == 2


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def without_caption(folder):
    (folder / "b.txt").unlink()


def with_blank_caption(folder):
    (folder / "b.txt").write_text(" \n", encoding="utf-8")


def with_damaged_picture(folder):
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:100])


def with_bad_line(folder):
    (folder / "captions.jsonl").write_text('{"file": "a.png"}\n', encoding="utf-8")


def with_missing_picture(folder):
    (folder / "captions.jsonl").write_text('{"file": "z.png", "caption": "z"}\n', encoding="utf-8")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (empty, "has no captioned images: add some, such as cat.png"),
        (without_caption, r"b\.jpg has no caption: write one in b\.txt in the same folder"),
        (with_blank_caption, r"b\.jpg has no caption"),
        (with_damaged_picture, r"b\.jpg (is damaged|is not an image|cannot be read)"),
        (with_bad_line, r"Line 1 of .*captions\.jsonl should be like"),
        (with_missing_picture, r"There is no file .*z\.png"),
    ],
)
def test_bad_folders_are_refused(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        load_folder(folder, tmp_path / "out", 16)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        load_folder(tmp_path / "nowhere", tmp_path, 16)
