"""Where the merges and the tiny model are: in the repository's data/, or within the package once it is installed."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "_data"  # see pyproject.toml

DATA = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "data"
