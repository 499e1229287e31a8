"""A file appears complete or not at all. Only the leftovers of killed writers are removed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sd import files
from sd.files import remove_leftovers, whole_file

needs_locks = pytest.mark.skipif(files.fcntl is None, reason="no locks on Windows")
LEFTOVER = ".sd-0123456789abcdef.tmp"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, content: bytes, overwrite: bool = False) -> None:
    with whole_file(path, overwrite) as file:
        file.write(content)
        assert names(path.parent) != [path.name]


@pytest.mark.parametrize("locks", [pytest.param(True, marks=needs_locks), False])
def test_a_file_appears_at_the_end(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(files, "fcntl", None)
    write(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    write(tmp_path / "a", b"second", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"second"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_nothing(tmp_path, error):
    def fail() -> None:
        with whole_file(tmp_path / "a", overwrite=True) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "a", b"")


@needs_locks
def test_the_leftover_of_a_killed_writer_is_removed_by_the_next(tmp_path):
    code = "import sys, time; from pathlib import Path; from files import whole_file\n"
    code += "with whole_file(Path(sys.argv[1]), True) as file: file.write(b'half'); file.flush(); time.sleep(99)"
    folder = Path(files.__file__).parent  # not through the package, which takes a second to import torch
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], cwd=folder)
    while not any(path.stat().st_size for path in tmp_path.iterdir()):
        time.sleep(0.01)
        assert process.poll() is None
    write(tmp_path / "b", b"whole")
    assert len(names(tmp_path)) == 2  # its writer is still running
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(names(tmp_path)) == 2
    write(tmp_path / "c", b"whole")
    assert names(tmp_path) == ["b", "c"]


@needs_locks
def test_only_leftovers_are_removed(tmp_path):
    kept = [
        ".sd-0123456789abcdef.tmp.png",
        ".sd-0123.tmp",
        "sd-0123456789abcdef.tmp",
        "a.tmp",
        ".sd-0123456789ABCDEF.tmp",
    ]
    for name in [*kept, LEFTOVER]:
        (tmp_path / name).write_text("theirs")
    (tmp_path / ".sd-00000000000000aa.tmp").mkdir()
    (tmp_path / ".sd-00000000000000bb.tmp").symlink_to("a.tmp")
    os.mkfifo(tmp_path / ".sd-00000000000000cc.tmp")
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == {*kept, *(f".sd-00000000000000{end}.tmp" for end in ("aa", "bb", "cc"))}
    remove_leftovers(tmp_path / "missing")


@needs_locks
def test_a_file_removed_as_a_leftover_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, taken = files._lock, []

    def taken_first(file):
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        return lock(file)

    monkeypatch.setattr(files, "_lock", taken_first)
    write(tmp_path / "a", b"whole")
    assert taken
    assert names(tmp_path) == ["a"]


@needs_locks
def test_without_locks_files_are_written_and_leftovers_stay(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / LEFTOVER).write_text("perhaps another's")
    write(tmp_path / "a", b"whole")
    assert names(tmp_path) == [LEFTOVER, "a"]
