"""Starts a writer, kills it at a random moment, and checks its files; repeats that, and prints a report as JSON.

    python -m tests.support.killer FOLDER KILLS SEED

A writer is a fork of this process, so it starts in a millisecond. It writes as fast as it can until it is killed:
images, checkpoints or training states. Each is killed KILLS times. After every kill, no file with a final name may be
truncated, damaged, older than before, or missing. Temporary files must not accumulate.
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
from pathlib import Path

import numpy as np
import torch

from sd.checkpoints.files import read_state_dict, write_checkpoint
from sd.images import read_image, write_animation, write_png
from sd.training.loop import Training
from tests.training.test_loop import Line


def frame(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)


class Pictures:
    """Writes picture-0.png, picture-1.png, ..., and two files that are overwritten every time."""

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
    """Overwrites a file of each format. All numbers in a file are the number of the round that wrote it."""

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
    """A training run that is resumed after every kill. Its losses must be those of an uninterrupted run."""

    STEPS = 100_000

    def __init__(self, folder: Path) -> None:
        self.losses: dict[int, float] = {}
        self.whole = self.training(folder / "whole")
        self.go_on_to(2)  # imports everything that the optimizer needs, before the first fork

    def training(self, folder: Path) -> Training:
        return Training(Line(), folder, torch.device("cpu"), 1.0, self.STEPS, seed=3)

    def go_on_to(self, step: int) -> None:
        """Continues the uninterrupted run."""

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
        """Compares all losses that were logged before the last kill with those of the uninterrupted run."""
        complete = (folder / "losses.txt").read_text().splitlines()[:-1]  # the last line may be incomplete
        lines = [line.split() for line in complete]
        if lines and (last := max(int(step) for step, _ in lines)) > self.whole.step:
            self.go_on_to(last)
        wrong = [(step, loss) for step, loss in lines if float(loss) != self.losses[int(step)]]
        assert not wrong, wrong
        assert self.training(folder).step <= self.whole.step + 1  # it can be resumed


def kill_at(moment: float, write: Callable[[Path], None], folder: Path) -> None:
    """Starts a writer and kills it after `moment` seconds."""
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


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng, left_behind = random.Random(seed), {}
    for writer in (Pictures(), Checkpoints(), States(folder)):
        name = type(writer).__name__.lower()
        place, left_behind[name] = folder / name, 0
        place.mkdir()
        for _ in range(kills):
            kill_at(rng.choice([0.02, 0.2, 0.5]) * rng.random(), writer.write, place)
            left = list(place.glob(".sd-*.tmp"))
            left_behind[name] += len(left)
            assert len(left) <= 1, "temporary files of killed writers accumulate"
            writer.check(place)
    json.dump(left_behind, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
