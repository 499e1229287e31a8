"""What an installed package needs beside its modules."""

import sys

import pytest

from sd.files import DATA
from tests import ROOT


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_an_installed_package_is_complete():
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sd").rglob("*.py")}
    assert set(setuptools["packages"]) == {*folders, "sd._data"}
    for package, names in setuptools["package-data"].items():
        folder = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        assert all(list(folder.glob(name)) for name in names)


def test_the_data_are_found():
    assert (DATA / "merges.txt").is_file()
    assert (DATA / "tiny.ckpt").is_file()
