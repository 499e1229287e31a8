"""Pictures with captions, as the training stages read them.

In: how many scenes to draw, or a folder of somebody's own pictures. Out: `Pictures`: all of them as one uint8 array
(N, size, size, 3), mapped from a file so that it need not fit into memory, and the captions of each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sd.files import whole_file
from sd.images import image_to_tensor, read_image, tensor_to_array
from sd.training.world.render import render
from sd.training.world.scenes import scene_and_captions

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CAPTIONS_PER_SCENE = 6


class DataError(ValueError):
    """The pictures to train on cannot be used. Its message is one sentence."""


@dataclass
class Pictures:
    """N pictures, each with one caption or more."""

    pixels: np.ndarray  # uint8 (N, size, size, 3)
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Tensor) -> Tensor:
        """Indices (B,) -> pictures (B, 3, size, size) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels[indices.numpy()])  # (B, H, W, 3)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_scenes(cache: Path, count: int, size: int, first_seed: int = 0, held_out: bool | None = False) -> Pictures:
    """The scenes of seeds first_seed, first_seed + 1, ...; drawn once, and kept in the folder `cache`.

    `held_out` is that of `random_scene`: False for scenes to train on, None for all kinds. Raises OSError if the file
    cannot be written.
    """
    kind = {False: "scenes", True: "held-out", None: "all"}[held_out]
    path = cache / f"{kind}-{first_seed}-{count}-{size}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        jobs = ((seed, size, held_out) for seed in range(first_seed, first_seed + count))
        with ProcessPoolExecutor(initializer=_leave_interrupts) as pool:
            try:
                _write_pixels(path, pool.map(_draw, jobs, chunksize=64), count, size, "drawing scenes")
            except BaseException:
                pool.shutdown(cancel_futures=True)  # or it would draw to the end first
                raise
    seeds = range(first_seed, first_seed + count)
    captions = [scene_and_captions(seed, CAPTIONS_PER_SCENE, held_out)[1] for seed in seeds]
    return Pictures(np.load(path, mmap_mode="r"), captions)


def _leave_interrupts() -> None:
    """Ctrl-C reaches every process: the one that waits for the pictures answers it for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw(job: tuple[int, int, bool | None]) -> np.ndarray:
    seed, size, held_out = job
    return np.asarray(render(scene_and_captions(seed, 0, held_out)[0], seed, size))


def _write_pixels(path: Path, pictures: Iterable[np.ndarray], count: int, size: int, what: str) -> None:
    """Fills an array file picture by picture. It gets its name when it is complete.

    It is written, not mapped: Windows renames no file that is mapped, and a mapped file that somebody else cuts short
    kills the process.
    """
    shape = (count, size, size, 3)
    try:
        with whole_file(path, overwrite=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            _claim(file, math.prod(shape))
            for picture in tqdm(pictures, what, count):
                file.write(picture.astype(np.uint8).tobytes())
    except OSError as error:
        megabytes, reason = math.prod(shape) / 1e6, error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}): {megabytes:.0f} MB are needed.") from error


def _claim(file: BinaryIO, size: int) -> None:
    """Takes the space on the disk at once for so many bytes more: a full disk is noticed before all the drawing."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, file.tell() + size)


def load_folder(folder: Path, cache: Path, size: int) -> Pictures:
    """Somebody's own pictures, cropped about their centre and resized to (size, size).

    Captions are in `captions.jsonl`, lines of {"file": "cat.png", "caption": "a cat"} (a file may have several), or
    else in one text file beside each picture, `cat.txt`, a caption a line. Raises DataError if there is no folder, no
    picture in it, a picture without a caption, or one that cannot be read; OSError if the cache cannot be written.
    """
    captions = read_captions(folder)
    pictures = (_read_picture(folder / name, size) for name in captions)
    path = cache / "folder.npy"
    cache.mkdir(parents=True, exist_ok=True)
    _write_pixels(path, pictures, len(captions), size, "reading pictures")
    return Pictures(np.load(path, mmap_mode="r"), list(captions.values()))


def read_captions(folder: Path) -> dict[str, list[str]]:
    """The captions of each picture in a folder, by the name of its file. Raises DataError as `load_folder` does."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: give one with pictures and their captions.")
    listed = folder / "captions.jsonl"
    captions = _read_jsonl(listed) if listed.exists() else _read_texts(folder)
    if not captions:
        raise DataError(f"{folder} holds no pictures: it needs files such as cat.png with cat.txt beside each.")
    return captions


def fingerprint(folder: Path, captions: dict[str, list[str]]) -> str:
    """The SHA-256 of pictures and their captions. Raises DataError for a picture that is not there."""
    digest = hashlib.sha256(json.dumps(captions).encode())
    for name in captions:
        path = folder / name
        if not path.is_file():
            raise DataError(f"There is no file {path}: every caption needs its picture.")
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def _read_picture(path: Path, size: int) -> np.ndarray:
    try:
        return tensor_to_array(image_to_tensor(read_image(path), size, size))[0]
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


def _read_jsonl(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file"], entry["caption"]
        except (ValueError, KeyError, TypeError) as error:
            expected = '{"file": "cat.png", "caption": "a cat"}'
            raise DataError(f"Line {number} of {path} should be like {expected}, not {line[:60]!r}.") from error
        captions.setdefault(str(name), []).append(str(caption))
    return captions


def _read_texts(folder: Path) -> dict[str, list[str]]:
    captions = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        text = path.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8").splitlines() if text.exists() else []
        captions[path.name] = [line.strip() for line in lines if line.strip()]
        if not captions[path.name]:
            raise DataError(f"{path} has no caption: write one into {text.name} beside it, or into captions.jsonl.")
    return captions
