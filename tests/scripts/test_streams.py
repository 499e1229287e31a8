"""Scripts without a console: closed streams, a reader that has gone, a full disk, a folder that has been deleted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.support.streams import Stream
from tests import ROOT
from tests.support.marks import slow

posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
PYTHON = shlex.quote(sys.executable)
DEMO = f"{PYTHON} {shlex.quote(str(ROOT / 'scripts/demo.py'))}"
SCRIPTS = ["demo", "download", "train_tiny", "evaluate_tiny", "make_gallery", "benchmark"]
QUICK = "a --steps 1 --seed 1 --width 32 --height 32 --device cpu --out a.png"


def shell(line, folder):
    return subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True)


@posix
@pytest.mark.parametrize("closed", ["<&- >&-", slow("2>&-")])
def test_a_picture_without_a_console(tmp_path, closed):
    result = shell(f"{DEMO} {QUICK} {closed}", tmp_path)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@posix
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("closed", [slow("<&- >&-"), slow("2>&-"), "<&- >&- 2>&-"])
def test_every_script_starts_without_a_console(tmp_path, name, closed):
    command = f"{PYTHON} {shlex.quote(str(ROOT / f'scripts/{name}.py'))}"
    for argument, status in (("--help", 0), ("--magic", 2)):
        result = shell(f"{command} {argument} {closed}", tmp_path)
        assert result.returncode == status
        assert result.stderr.count("\n") == (0 if "2>" in closed or status == 0 else 1)


@pytest.mark.slow
@posix
def test_a_reader_that_has_gone_is_no_error(tmp_path):
    for flag in ("--world", "--help"):
        result = shell(f"{DEMO} {flag} | head -1", tmp_path)
        assert (result.stdout.count("\n"), result.stderr) == (1, "")
    shell(f"{DEMO} {QUICK} b --n 2 2>&1 | head -1", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a-3.png", "a-4.png", "a.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.slow
def test_a_full_disk_on_standard_output_is_one_line(tmp_path):
    result = shell(f"{DEMO} {QUICK} > /dev/full", tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "demo.py: standard output cannot be written to (No space left on device)."
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert shell(f"{DEMO} {QUICK} --overwrite 2> /dev/full", tmp_path).returncode == 0


@posix
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_is_gone_is_one_line(tmp_path, name):
    script = shlex.quote(str(ROOT / f"scripts/{name}.py"))
    result = shell(f"mkdir gone; cd gone; rmdir ../gone; {PYTHON} {script}", tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr == f"{name}.py: the current folder no longer exists: change to another one and run this again.\n"
    )


@posix
@pytest.mark.slow
def test_no_environment_at_all(tmp_path):
    assert shell(f"env -i OMP_NUM_THREADS=1 {DEMO} {QUICK}", tmp_path).returncode == 0


def test_a_stream_keeps_its_first_error(tmp_path):
    file = open(tmp_path / "file", "w")  # noqa: SIM115, it is closed on purpose
    stream = Stream(file)
    assert stream.write("kept") == 4
    stream.flush()
    file.close()
    assert stream.write("lost") == 4
    stream.flush()
    assert isinstance(stream.error, ValueError)
    assert (tmp_path / "file").read_text() == "kept"
    assert stream.name == file.name
