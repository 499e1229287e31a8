"""Captioned images for training: scenes of the toy world, or a folder of your own images.

Both become `CaptionedImages`: one uint8 array (N, size, size, 3), memory-mapped from a file so that it need not fit
into memory, and a list of captions for each image.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from sd.images import from_uint8, image_to_tensor, read_image, tensor_to_array
from sd.training.captions import DataError, read_captions, unreadable_images
from sd.training.ranks import rank, rank_0_first
from sd.training.world.render import render
from sd.training.world.scenes import WORLD, scene_and_captions

log = logging.getLogger(__name__)

CAPTIONS_PER_SCENE = 6


@dataclass
class CaptionedImages:
    """N images, each with one or more captions."""

    pixels: np.ndarray  # uint8 (N, size, size, 3)
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Tensor) -> Tensor:
        """Indices (B,) -> images (B, 3, size, size) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels[indices.numpy()])  # (B, H, W, 3)
        return from_uint8(pixels.permute(0, 3, 1, 2))  # (B, 3, H, W)


def load_scenes(
    cache: Path, count: int, size: int, first_seed: int = 0, held_out: bool | None = False
) -> CaptionedImages:
    """Draw `count` scenes of the toy world, with seeds first_seed, first_seed + 1, ...

    They are drawn once and then kept in a file in the folder `cache`, whose name has the version of the toy world.
    `held_out` is passed to `random_scene`: False for training scenes, True for held-out ones, None for both. Raises
    OSError if the file cannot be written.
    """
    kind = {False: "scenes", True: "held-out", None: "all"}[held_out]
    path = cache / f"{kind}-{WORLD}-{first_seed}-{count}-{size}.npy"
    with rank_0_first():
        if not path.exists():
            _draw_scenes(path, count, size, first_seed, held_out)
    seeds = range(first_seed, first_seed + count)
    captions = [scene_and_captions(seed, CAPTIONS_PER_SCENE, held_out)[1] for seed in seeds]
    return CaptionedImages(np.load(path, mmap_mode="r"), captions)


def _draw_scenes(path: Path, count: int, size: int, first_seed: int, held_out: bool | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    jobs = ((seed, size, held_out) for seed in range(first_seed, first_seed + count))
    with ProcessPoolExecutor(initializer=_ignore_interrupts) as pool:
        try:
            _write_pixels(path, pool.map(_draw, jobs, chunksize=64), count, size, "drawing scenes")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # without this, it would first draw all remaining scenes
            raise


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C in a worker process: the main process handles it for all of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw(job: tuple[int, int, bool | None]) -> np.ndarray:
    seed, size, held_out = job
    return np.asarray(render(scene_and_captions(seed, 0, held_out)[0], seed, size))


def _write_pixels(path: Path, images: Iterable[np.ndarray], count: int, size: int, what: str) -> None:
    """Write images (size, size, 3) to an array file, one by one and atomically. `what` labels the progress bar.

    The file is written, not memory-mapped: Windows cannot rename a mapped file, and if another process truncates a
    mapped file, this process crashes.
    """
    shape = (count, size, size, 3)
    try:
        with whole_file(path, overwrite=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            _reserve(file, math.prod(shape))
            for image in tqdm(images, what, count):
                file.write(image.astype(np.uint8).tobytes())
    except OSError as error:
        megabytes, reason = math.prod(shape) / 1e6, error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}): {megabytes:.0f} MB are needed.") from error


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve disk space for `size` more bytes, so that a full disk is noticed before anything is drawn."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, file.tell() + size)


def load_folder(folder: Path, cache: Path, size: int, captions: dict[str, list[str]] | None = None) -> CaptionedImages:
    """Load your own images, cropped to a centred square and resized to (size, size), with their captions: those that
    `read_captions` gives, or `captions`.

    Logs a line if the folder has images in other formats. Raises the errors of `read_captions`, DataError for an image
    that is missing or cannot be read, and OSError if the cache cannot be written.
    """
    captions = captions or read_captions(folder)
    note_left_out(folder)
    images = (_read_image(folder / name, size) for name in captions)
    path = cache / "folder.npy"
    with rank_0_first():
        if rank() == 0:
            cache.mkdir(parents=True, exist_ok=True)
            _write_pixels(path, images, len(captions), size, "reading images")
    return CaptionedImages(np.load(path, mmap_mode="r"), list(captions.values()))


def note_left_out(folder: Path) -> None:
    """Log a line if a folder has images in formats that cannot be read."""
    if left_out := unreadable_images(folder):
        names = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
        log.warning("Images in %s are left out because their format cannot be read: %s", folder, names)


def fingerprint(folder: Path, captions: dict[str, list[str]]) -> str:
    """The SHA-256 of images and their captions. Raises DataError if an image is missing or cannot be read."""
    digest = hashlib.sha256(json.dumps(captions).encode())
    for name in captions:
        path = folder / name
        if not path.is_file():
            raise DataError(f"There is no file {path}, but there is a caption for it.")
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def _read_image(path: Path, size: int) -> np.ndarray:
    try:
        return tensor_to_array(image_to_tensor(read_image(path), size, size))[0]
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
