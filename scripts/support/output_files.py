"""Where the scripts write what they make: names that are free, and no existing file lost.

In: what the user asked for. Out: paths, or a ValueError of one sentence.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def first_path(out: Path | None, overwrite: bool) -> Path:
    """The file that --out means. Raises ValueError for one that may not be written."""
    if out is None or out.is_dir() or not out.suffix:
        path = (out or Path()) / "picture.png"
        check_folder("--out", path)
        return path
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out should be a .png file or a folder, not {out}.")
    check_free("--out", out, overwrite)
    return out


def check_free(flag: str, path: Path, overwrite: bool) -> None:
    """Raises ValueError if there is a file that may not be replaced, or if no file can be made there."""
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} {path} is there already: choose another name, or add --overwrite to replace it.")
    check_folder(flag, path)


def check_folder(flag: str, path: Path) -> None:
    """Raises ValueError unless the folder of `path` may be written to, or made: before the work, not after it."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "may not be written to" if folder.is_dir() else "is a file"
        raise ValueError(f"{flag} should be in a folder of yours: {folder} {reason}.")


def make_folder(flag: str, folder: Path) -> None:
    """Makes a folder, if it is missing. Raises ValueError or OSError for one that nothing can be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{flag} should be a folder: {folder} cannot be one, a file is in the way.") from None
    except OSError as error:
        raise OSError(f"{flag} {folder} cannot be written to ({error.strerror or error}).") from None


def candidates(first: Path) -> Iterator[Path]:
    """picture.png, picture-2.png, picture-3.png, ..."""
    yield first
    for number in itertools.count(2):
        yield first.with_stem(f"{first.stem}-{number}")


def save(write: Callable[..., None], names: Iterator[Path], replaced: Path | None, *contents: object) -> Path:
    """Writes a file under the first of the names that is free, and returns it. Only `replaced` need not be free."""
    while True:
        path = next(names)
        with contextlib.suppress(FileExistsError):
            write(path, *contents, overwrite=path == replaced)
            return path


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole or not at all, in place of one that is there. Raises OSError."""
    from sd.files import write_whole  # not before: sd imports torch

    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()), overwrite=True)
