"""Runs notebooks from top to bottom, each in a new kernel, as Jupyter does.

`python -m tests.support.run_notebooks [01_tour.ipynb ...]` runs the named notebooks, or all of them, and saves their
outputs. Run it after changing a notebook, the code it uses, or the tiny model. It saves no times and no Python version,
so a second run changes nothing.
"""

import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tests import ROOT

FOLDER = ROOT / "scripts" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TIMEOUT = 900  # seconds for the kernel to start, and for each cell; long, because the machine may be busy


def execute(path: Path, changes: dict[str, str] | None = None, solve: bool = False) -> NotebookNode:
    """Returns a copy of the notebook with new outputs. Raises CellExecutionError at the first cell that fails.

    `changes` maps texts to their replacements. Each text should occur in exactly one code cell. With `solve`, every
    exercise is also done: two code cells with the tag `solved` follow each solution, the solution and the check.
    """
    notebook = nbformat.read(path, as_version=4)
    if solve:
        notebook.cells = [cell for given in zip([None, *notebook.cells], notebook.cells) for cell in _solved(*given)]
    for old, new in (changes or {}).items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source)
        cell.source = cell.source.replace(old, new)
    metadata = dict(notebook.metadata)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    settings = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "SLIDERS": "0"}  # pictures, not sliders
    client.execute(env={**os.environ, **settings})
    notebook.metadata = nbformat.from_dict(metadata)  # without the kernel's Python version
    return notebook


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell has a tag. An exercise is three cells: `exercise`, `check` and `solution`."""
    return tag in cell.metadata.get("tags", ())


def solution(cell: NotebookNode) -> str:
    """The code that a cell with the tag `solution` folds away."""
    return re.fullmatch(
        r"<details><summary>Solution</summary>\n\n```python\n(.+)\n```\n\n</details>", cell.source, re.DOTALL
    )[1]


def _solved(before: NotebookNode | None, cell: NotebookNode) -> list[NotebookNode]:
    """The cell; a solution is followed by its code and by the check, which is the cell before it."""
    if not has_tag(cell, "solution"):
        return [cell]
    sources = (solution(cell), before.source)
    return [cell, *(new_code_cell(source, metadata={"tags": ["solved"]}) for source in sources)]


def main(names: list[str]) -> None:
    for path in [FOLDER / name for name in names] or NOTEBOOKS:
        start = time.perf_counter()
        notebook = execute(path)
        nbformat.write(notebook, path)
        seconds, kilobytes = time.perf_counter() - start, path.stat().st_size / 1e3
        print(f"{path.name}: {len(notebook.cells)} cells, {seconds:.0f} s, {kilobytes:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
