"""The source files that the page's links open, as plain HTML: read-only, and only those in a list made at the start."""

from __future__ import annotations

import ast
import json
from collections import Counter, defaultdict
from html import escape
from pathlib import Path

from scripts.playground.reference import html_page

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = (
    "sd/**/*.py",
    "scripts/notebooks/*.ipynb",
    "scripts/playground/*.py",
    "scripts/playground/page/*.js",
    "scripts/support/*.py",
)


def source_files() -> dict[str, Path]:
    """The files by their paths in the repository. A request's path is looked up here, and is never opened itself."""
    paths = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    return {path.relative_to(ROOT).as_posix(): path for path in paths if path.is_file() and not path.is_symlink()}


def index(names: list[str]) -> str:
    """A page with a link to each file."""
    items = "".join(f'<li><a href="/source/{escape(name)}"><code>{escape(name)}</code></a></li>' for name in names)
    return html_page("Source files", f'<p><a href="/">The page</a></p><ul>{items}</ul>')


def source_page(name: str, path: Path) -> str:
    """One file as a page. Each class, function and notebook cell has an id, so that a link can point to it.

    Raises OSError if the file is no longer there.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    show = {".py": _python, ".ipynb": _notebook}.get(path.suffix, _lines)
    try:
        shown = show(text)
    except (SyntaxError, ValueError, KeyError, TypeError):  # someone is just editing it
        shown = _lines(text)
    return html_page(name, f'<p><a href="/">The page</a> · <a href="/source/">All files</a></p>{shown}')


def _python(text: str) -> str:
    begin, end = defaultdict(list), Counter()
    for name, node in _definitions(ast.parse(text), ""):
        begin[min([node.lineno, *(one.lineno for one in node.decorator_list)])].append(name)
        end[node.end_lineno] += 1
    return _lines(text, begin, end)


def _definitions(node: ast.AST, prefix: str) -> list[tuple[str, ast.AST]]:
    """The classes and functions in a module or class, by names like "Tracer.attention"; the outer ones first."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((prefix + child.name, child))
            if isinstance(child, ast.ClassDef):
                found += _definitions(child, f"{prefix}{child.name}.")
    return found


def _lines(text: str, begin: dict[int, list[str]] | None = None, end: dict[int, int] | None = None) -> str:
    """Numbered lines. `begin` has the ids of the parts that begin at a line, `end` how many parts end there."""
    parts = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        parts += [f'<span id="{escape(name)}">' for name in (begin or {}).get(number, ())]
        parts.append(f"<i>{number:4}</i>  {escape(line)}\n")
        parts.append("</span>" * (end or {}).get(number, 0))
    return f"<pre>{''.join(parts)}</pre>"


def _notebook(text: str) -> str:
    """The cells without their output."""
    cells = []
    for cell in json.loads(text)["cells"]:
        kind = "pre" if cell["cell_type"] == "code" else "div"
        content = escape("".join(cell["source"]))
        cells.append(f'<{kind} class="cell" id="{escape(cell.get("id", ""))}">{content}</{kind}>')
    return "<p>A notebook, without its output: open it in Jupyter to run it.</p>" + "".join(cells)
