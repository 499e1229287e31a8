"""Starts a writer, kills it at a random moment, looks at what is there; again and again. Reports as JSON.

    python -m tests.support.killer FOLDER KILLS SEED URL

A writer is a copy of this process (a fork, which starts in a millisecond) that writes as fast as it can until it is
killed: pictures, checkpoints, training states, and a download from URL, so many KILLS of each. After each, no file
under a final name may be cut short, damaged, older than before, or gone; and what is left behind must not pile up.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from scripts.download import download
from scripts.support import transfer
from sd.checkpoints.files import read_state_dict, write_checkpoint
from sd.images import read_image, write_animation, write_png
from sd.training.loop import Training
from tests.support.misbehaving_server import BODY, weights
from tests.training.test_loop import Line


def frame(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)


class Pictures:
    """picture-0.png, picture-1.png, ... and two files that are overwritten again and again."""

    def write(self, folder: Path) -> None:
        number = len(list(folder.glob("picture-*.png")))
        while True:
            write_png(folder / f"picture-{number}.png", frame(number), "a prompt")
            write_png(folder / "same.png", frame(number), overwrite=True)
            write_animation(folder / "same.gif", [frame(number), frame(0)], overwrite=True)
            number += 1

    def check(self, folder: Path) -> None:
        written = sorted(folder.glob("picture-*.png"), key=lambda path: int(path.stem.split("-")[1]))
        for number, path in list(enumerate(written))[-10:]:
            assert path.name == f"picture-{number}.png"
            assert np.array_equal(read_image(path), frame(number)), path.name
        if (folder / "same.png").exists():
            seen = np.asarray(read_image(folder / "same.png"))
            assert any(np.array_equal(seen, frame(number)) for number in range(len(written) + 1)), "same.png"
        if (folder / "same.gif").exists():
            assert read_image(folder / "same.gif").size == (60, 40)


class Checkpoints:
    """One file of each format, all of whose numbers are those of the round in which it was written."""

    def __init__(self) -> None:
        self.newest = {"model.ckpt": 0, "model.safetensors": 0}

    def write(self, folder: Path) -> None:
        for number in itertools.count(max(self.newest.values()) + 1):
            for name in self.newest:
                write_checkpoint(folder / name, {f"t{i}": torch.full((50, 99), number) for i in range(9)})

    def check(self, folder: Path) -> None:
        for path in folder.glob("model.*"):
            state = read_state_dict(path)
            number = int(state["t0"][0, 0])
            assert all((tensor == number).all() for tensor in state.values()), path.name
            assert number >= self.newest[path.name], f"{path.name} is older than it was"
            self.newest[path.name] = number


class States:
    """A training run, resumed after every kill: its losses are those of a run that nobody kills."""

    STEPS = 100_000

    def __init__(self, folder: Path) -> None:
        self.losses: dict[int, float] = {}
        self.whole = self.training(folder / "whole")
        self.go_on_to(2)  # so that all is imported that optimizers need, before the first fork

    def training(self, folder: Path) -> Training:
        return Training(Line(), folder, torch.device("cpu"), 1.0, self.STEPS, seed=3)

    def go_on_to(self, step: int) -> None:
        """The run that nobody kills."""

        def pause() -> None:
            if self.whole.step >= step:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            self.whole.run(lambda progress: self.losses.__setitem__(progress.step, progress.loss), 0.0, pause)

    def write(self, folder: Path) -> None:
        with open(folder / "losses.txt", "a", buffering=1) as log:
            training = self.training(folder)
            training.run(lambda progress: log.write(f"{progress.step} {progress.loss!r}\n"), 0.0, lambda: None)

    def check(self, folder: Path) -> None:
        """All that was logged up to the last kill, against the same steps of the run that nobody kills."""
        lines = [line.split() for line in (folder / "losses.txt").read_text().splitlines()[:-1]]  # the last may be cut
        if lines and (last := max(int(step) for step, _ in lines)) > self.whole.step:
            self.go_on_to(last)
        wrong = [(step, loss) for step, loss in lines if float(loss) != self.losses[int(step)]]
        assert not wrong, wrong
        assert self.training(folder).step <= self.whole.step + 1  # it can be resumed


class Downloads:
    """One file from a server that is in no hurry, resumed after every kill."""

    def __init__(self, url: str) -> None:
        self.url, self.longest = url, 0
        transfer.CHUNK = 2000

    def fetch(self, folder: Path) -> None:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
            download(weights(), folder, self.url, lambda _: None)

    def write(self, folder: Path) -> None:
        self.fetch(folder)
        time.sleep(99)

    def check(self, folder: Path) -> None:
        if (folder / "model.ckpt").exists():
            assert (folder / "model.ckpt").read_bytes() == BODY
            (folder / "model.ckpt").unlink()  # once more, from the start
            self.longest = 0
        elif (folder / "model.ckpt.part").exists():
            part = (folder / "model.ckpt.part").read_bytes()
            assert BODY.startswith(part), "the part is not the beginning of the file"
            assert len(part) >= self.longest, "what had come was lost"
            self.longest = len(part)

    def finish(self, folder: Path) -> None:
        self.fetch(folder)
        assert [path.name for path in folder.iterdir()] == ["model.ckpt"]
        assert (folder / "model.ckpt").read_bytes() == BODY


def kill_at(moment: float, write: Callable[[Path], None], folder: Path) -> None:
    """A writer that lives for so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            write(folder)
        finally:
            os._exit(1)
    time.sleep(moment)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer ended by itself"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(folder: Path, kills: int, seed: int, url: str) -> None:
    torch.set_num_threads(1)
    rng, left_behind = random.Random(seed), {}
    for writer in (Pictures(), Checkpoints(), States(folder), Downloads(url)):
        name = type(writer).__name__.lower()
        place, left_behind[name] = folder / name, 0
        place.mkdir()
        for _ in range(kills):
            kill_at(rng.choice([0.02, 0.2, 0.5]) * rng.random(), writer.write, place)
            left = list(place.glob(".sd-*.tmp"))
            left_behind[name] += len(left)
            assert len(left) <= 1, "what killed writers leave behind piles up"
            writer.check(place)
        if hasattr(writer, "finish"):
            writer.finish(place)
    json.dump(left_behind, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
