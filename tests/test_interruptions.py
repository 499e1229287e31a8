"""Killed writers, full disks, and two processes in one folder: no data is lost, and no file is left incomplete.

`--slow` kills each kind of writer 50 times. `KILL_SEED=1` chooses other moments.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sd import files
from sd.checkpoints.files import read_state_dict, write_checkpoint
from sd.images import read_image, write_animation, write_image, write_png
from sd.training.loop import load_state, save_atomically
from tests import ROOT
from tests.support.killer import frame

SEED = int(os.environ.get("KILL_SEED", 0))
needs_fork = pytest.mark.skipif(files.fcntl is None or not hasattr(os, "fork"), reason="Windows has no fork")


@needs_fork
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_only_whole_files(tmp_path, kills):
    command = [sys.executable, "-m", "tests.support.killer", str(tmp_path), str(kills), str(SEED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(f"{kills} kills of each; temporary files found after them:", result.stdout)
    for folder, kept in [
        ("pictures", {"same.png", "same.gif"}),
        ("checkpoints", {"model.ckpt", "model.safetensors"}),
        ("states", {"line.state", "losses.txt"}),
    ]:
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert {name for name in names if not name.startswith(("picture-", ".sd-"))} <= kept


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def read_only(tmp_path):
    """A folder that even root cannot write to, with an old file in it for each writer."""
    folder = tmp_path / "disk"
    folder.mkdir()
    for name in WRITERS:
        (folder / name).write_text("old")
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    bound = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, text=True)
    if bound.returncode:
        pytest.skip(f"root can write anywhere, and nothing can be mounted here: {bound.stderr.strip()}")
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


BIG = np.random.default_rng(0).integers(0, 256, (200, 250, 3), dtype=np.uint8)  # 150 kB
NOISE = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)  # over 100 kB in any format
GREY = np.random.default_rng(0).integers(0, 256, (4, 200, 250, 1), dtype=np.uint8).repeat(3, 3)
STATE = {"a": torch.randn(50_000)}
WRITERS = {
    "a.png": lambda path: write_png(path, BIG, overwrite=True),
    "a.jpg": lambda path: write_image(path, NOISE, "x", overwrite=True),
    "a.webp": lambda path: write_image(path, NOISE, "x", overwrite=True),
    "a.gif": lambda path: write_animation(path, GREY, overwrite=True),
    "a.ckpt": lambda path: write_checkpoint(path, STATE),
    "a.safetensors": lambda path: write_checkpoint(path, STATE),
    "a.state": lambda path: save_atomically(STATE, path),
}


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a Linux tmpfs")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_what_was_there(small_disk, name):
    (small_disk / name).write_text("old")
    with pytest.raises(OSError, match=rf"{name} cannot be written \(.*space left") as caught:
        WRITERS[name](small_disk / name)
    assert str(caught.value).count("\n") == 0
    assert {path.name: path.read_text() for path in small_disk.iterdir()} == {name: "old"}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder(read_only, name):
    with pytest.raises(OSError, match=rf"{name} cannot be written \((Permission denied|Read-only file system)\)"):
        WRITERS[name](read_only / name)
    assert {path.name for path in read_only.iterdir()} == set(WRITERS)
    assert (read_only / name).read_text() == "old"


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_folder_is_made_or_named(tmp_path, name):
    path = tmp_path / "missing" / name
    if name in ("a.ckpt", "a.safetensors"):
        with pytest.raises(OSError, match=rf"{name} cannot be written \(No such file or directory\)"):
            WRITERS[name](path)
    else:
        WRITERS[name](path)
        assert path.exists()


def in_two_processes(work) -> None:
    """Runs `work(0)` and `work(1)` at the same time."""
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def write_under_free_names(folder: Path, numbers: range) -> None:
    names = (folder / f"picture-{i}.png" for i in range(9999))
    for number in numbers:
        while True:
            try:
                write_png(next(names), frame(number))
                break
            except FileExistsError:
                pass


@needs_fork
@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_two_processes_in_one_folder_lose_no_picture(tmp_path, count):
    """Each also removes the temporary files of killed processes, but not those that the other is writing."""
    in_two_processes(lambda who: write_under_free_names(tmp_path, range(who * count, (who + 1) * count)))
    assert {path.name for path in tmp_path.iterdir()} == {f"picture-{i}.png" for i in range(2 * count)}
    seen = sorted(np.asarray(read_image(path)).tobytes() for path in tmp_path.iterdir())
    assert seen == sorted(frame(number).tobytes() for number in range(2 * count))


@needs_fork
@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_two_processes_that_write_one_file_leave_it_whole(tmp_path, rounds):
    def work(who: int) -> None:
        for _ in range(rounds):
            write_checkpoint(tmp_path / "a.safetensors", {f"t{i}": torch.full((99,), who) for i in range(9)})
            save_atomically({"a": torch.full((99,), who)}, tmp_path / "a.state")

    in_two_processes(work)
    numbers = [*read_state_dict(tmp_path / "a.safetensors").values(), load_state(tmp_path / "a.state")["a"]]
    assert all(tensor.unique().numel() == 1 for tensor in numbers)
    assert torch.cat(numbers[:-1]).unique().numel() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.state"}
