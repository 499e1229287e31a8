"""The shell scripts find their folder from anywhere, and pass their arguments on unchanged. Nothing is installed."""

import os
import shutil
import subprocess

import pytest

from tests import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")

# Stands for Python: prints its version if asked, or else its arguments, one in each line.
PYTHON = """#!/bin/sh
case $1 in -I) echo 3.11 ;; *) for word in "$@"; do echo "$word"; done ;; esac
"""


@pytest.fixture
def repository(tmp_path):
    """A copy of the scripts, in a folder with a space in its name, whose environment counts as installed."""
    root = tmp_path / "my repository"
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").write_text(PYTHON)
    (root / ".venv/bin/python").chmod(0o755)
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "requirements.txt",
        "requirements-hub.txt",
        "requirements-notebooks.txt",
        "requirements-playground.txt",
    ):
        shutil.copy(ROOT / name, root / name)
        with open(root / name, "rb") as file:
            checksum = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True).stdout.strip()
        (root / f".venv/.installed-{name}").write_text(f"Python 3.11, cksum {checksum}\n")
    return root


@pytest.mark.parametrize(
    "script, first",
    [
        ("demo.sh", ["{root}/scripts/demo.py"]),
        ("download.sh", ["{root}/scripts/download.py"]),
        ("notebooks.sh", ["-m", "jupyterlab", "--ServerApp.root_dir={root}"]),
        ("playground.sh", ["{root}/scripts/playground.py"]),
    ],
)
@pytest.mark.parametrize("where", ["beside", "link", "inside", "closed"])
def test_from_anywhere(repository, tmp_path, script, first, where):
    folder = tmp_path / "else"
    (folder / "scripts").mkdir(parents=True)
    (folder / "link.sh").symlink_to(f"../my repository/scripts/{script}")
    path = {"link": "link.sh", "inside": f"scripts/{script}"}.get(where, f"../my repository/scripts/{script}")
    cwd = repository if where == "inside" else folder
    line = f'sh "{path}" "a  red house" "" -x {"<&-" if where == "closed" else ""}'
    environment = os.environ | {"CDPATH": str(folder)}  # `cd` looks there first, and prints where it goes
    result = subprocess.run(["sh", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    words = result.stdout.split("\n")
    assert words[: len(first)] == [word.format(root=repository.resolve()) for word in first]
    assert words[-4:] == ["a  red house", "", "-x", ""]
