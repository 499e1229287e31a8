"""How many files of sd a module imports, directly and indirectly: what a student has to open to follow it.

Which module may import which is checked by import-linter, with the contracts in pyproject.toml.
"""

import ast
from pathlib import Path

import pytest

from tests import ROOT


def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def imports_of(file: Path) -> set[str]:
    """The modules of sd in the `import` statements at the top level of a file."""
    names = set()
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            within = [f"{statement.module}.{alias.name}" for alias in statement.names]  # a module or a name in one
            names |= {statement.module, *filter(file_of, within)}
    return {name for name in names if name.startswith("sd.")}


def closure(module: str) -> set[Path]:
    """The files of sd that run when a module is imported, without the `__init__.py` of packages."""
    files, waiting = set(), [module]
    while waiting:
        file = file_of(waiting.pop())
        if file not in files:
            files.add(file)
            names = imports_of(file)
            waiting += names | {name.rpartition(".")[0] for name in names if name.count(".") > 1}  # and their packages
    return {file for file in files if file.name != "__init__.py"}


@pytest.mark.parametrize("module, most", [("sd.guidance", 8), ("sd.pipeline", 30)])
def test_a_module_brings_in_few_files(module, most):
    names = sorted(file.relative_to(ROOT).as_posix() for file in closure(module))
    assert len(names) <= most, names


def test_the_pipeline_is_short():
    """3,600 lines before ControlNet, clip skip, FreeU and the second pass became arguments."""
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in closure("sd.pipeline")) <= 3800


def test_imports_are_found():
    """`from sd import module`, `from sd.module import name`, and what a package's `__init__.py` imports."""
    assert {"sd.pipeline", "sd.config"} <= imports_of(ROOT / "sd/inside/film.py")
    assert ROOT / "sd/samplers/heun.py" in closure("sd.samplers")
    assert closure("sd.config") == {ROOT / "sd/config.py"}
