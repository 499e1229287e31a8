"""What `pip install .` installs: every module, the data, the type marker and the command `sd`."""

import shutil
import subprocess
import sys

import pytest

from scripts import demo
from sd.files import DATA
from tests import ROOT


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_an_installed_package_is_complete():
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sd").rglob("*.py")}
    assert set(setuptools["packages"]) == {*folders, "sd._data", "sd_command.scripts", "sd_command.scripts.support"}
    for package, names in setuptools["package-data"].items():
        folder = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        assert all(list(folder.glob(name)) for name in names)


def test_the_command_sd_is_the_demo(tmp_path):
    """In the folders that pyproject.toml installs, without this repository on the path."""
    (tmp_path / "sd_command").mkdir()
    shutil.copytree(ROOT / "scripts", tmp_path / "sd_command/scripts")
    code = "import sys; from sd_command.scripts.demo import main; sys.argv[0] = 'bin/sd'; sys.exit(main())"
    command = [sys.executable, "-S", "-c", code, "--help"]  # without torch
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith("usage: sd [--help]"), result.stderr
    assert '\n    sd "a lighthouse at night"\n' in result.stdout


def test_errors_of_the_command_sd_begin_with_its_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bin/sd", "x", "--n", "0"])
    assert demo.main() == 2
    assert capsys.readouterr().err == "sd: --n should be from 1 to 10000, not 0.\n"


def test_the_data_are_found():
    assert (DATA / "merges.txt").is_file()
    assert (DATA / "tiny.ckpt").is_file()
