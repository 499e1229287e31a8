"""A notebook that is opened elsewhere finds the repository, or says in one sentence where it should be opened."""

import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from tests import ROOT
from tests.support.run_notebooks import FOLDER, NOTEBOOKS

FIRST_CELL = next(cell.source for cell in nbformat.read(NOTEBOOKS[0], 4).cells if cell.cell_type == "code")


@pytest.fixture
def run(monkeypatch):
    """Runs the first cell in a folder, with nothing of the repository on sys.path. Returns the root that it finds."""
    libraries = [folder for folder in sys.path if not (Path(folder) / "sd").is_dir()]

    def run(folder, installed=(), **names):
        monkeypatch.setattr(sys, "path", [*map(str, installed), *libraries])
        monkeypatch.chdir(folder)
        exec(FIRST_CELL, names)
        assert sys.path[0] == str(names["root"])
        return names["root"]

    return run


def package(folder):
    """A folder that holds the package, like a clone of the repository."""
    (folder / "sd").mkdir(parents=True)
    (folder / "sd" / "pipeline.py").touch()
    return folder


@pytest.mark.parametrize("folder", [FOLDER, ROOT, ROOT / "tests" / "support", ROOT / "sd"], ids=lambda path: path.name)
def test_anywhere_in_the_repository(run, folder):
    assert run(folder) == ROOT


def test_a_folder_with_the_repository_in_it(run, tmp_path):
    clone = package(tmp_path / "clone")
    (tmp_path / "a file").touch()
    assert run(tmp_path) == clone


def test_vs_code_says_where_the_notebook_is(run, tmp_path):
    assert run(tmp_path, __vsc_ipynb_file__=str(NOTEBOOKS[0])) == ROOT


def test_a_copy_where_the_package_is_installed(run, tmp_path):
    site = package(tmp_path / "site-packages")
    (tmp_path / "work").mkdir()
    assert run(tmp_path / "work", installed=[site]) == site


def test_the_repository_comes_before_an_installed_package(run, tmp_path):
    assert run(FOLDER, installed=[package(tmp_path / "site-packages")]) == ROOT


@pytest.mark.parametrize("other", [None, "sd", "work/sd"])
def test_elsewhere_it_says_where_it_should_be_opened(run, tmp_path, other):
    """Also below a folder that only has the name of the package."""
    if other:
        (tmp_path / other).mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        run(tmp_path)
    assert str(caught.value) == (
        f"The notebook should be opened in scripts/notebooks of its repository, not in {Path.cwd()}."
    )


def test_a_kernel_without_the_libraries(run, monkeypatch):
    without = ("regex", "ftfy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in without else find_spec(name))
    with pytest.raises(ImportError) as caught:
        run(FOLDER)
    assert str(caught.value) == "The kernel should have regex, ftfy: start it with `sh scripts/notebooks.sh`."
