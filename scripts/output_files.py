"""Where the scripts write what they make: names that are free, and no existing file lost.

In: what the user asked for. Out: paths, or a ValueError of one sentence.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path


def first_path(out: Path | None, overwrite: bool) -> Path:
    """The file that --out means. Raises ValueError for one that may not be written."""
    if out is None or out.is_dir() or not out.suffix:
        return (out or Path()) / "picture.png"
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out should be a .png file or a folder, not {out}.")
    check_free("--out", out, overwrite)
    return out


def check_free(flag: str, path: Path, overwrite: bool) -> None:
    """Raises ValueError if there is a file that may not be replaced."""
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} {path} is there already: choose another name, or add --overwrite to replace it.")


def candidates(first: Path) -> Iterator[Path]:
    """picture.png, picture-2.png, picture-3.png, ..."""
    yield first
    for number in itertools.count(2):
        yield first.with_stem(f"{first.stem}-{number}")


def save(write: Callable[..., None], names: Iterator[Path], overwrite: bool, *contents: object) -> Path:
    """Writes a file under the first of the names that is free (or the first, to overwrite), and returns it."""
    while True:
        path = next(names)
        with contextlib.suppress(FileExistsError):
            write(path, *contents, overwrite=overwrite)
            return path
