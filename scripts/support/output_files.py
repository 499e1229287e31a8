"""Chooses the files that the scripts write to, and never replaces a file that the user did not name."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def first_path(out: str | None, overwrite: bool) -> Path:
    """The file that --out names, or picture.png in the folder that it names. Raises ValueError if it cannot be written.

    A name is that of a folder if the folder exists, if the name ends in a slash, or if it has no suffix.
    """
    path = Path(out or "")
    if path.is_dir() or (out or "").endswith(("/", os.sep)) or not path.suffix:
        path = path / "picture.png"
        check_folder("--out", path)
        return path
    if path.suffix.lower() not in IMAGES:
        raise ValueError(
            f"--out should be a .png, .jpg, .jpeg or .webp file, or a folder, not {out}; to make a folder of that "
            f"name, add a slash: {out}/."
        )
    check_free("--out", path, overwrite)
    return path


def check_free(flag: str, path: Path, overwrite: bool) -> None:
    """Raises ValueError if the file exists and may not be replaced, or if its folder cannot be written to."""
    if path.is_dir():
        raise ValueError(f"{flag} should be a file: {path} is a folder.")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} {path} already exists: choose another name, or add --overwrite to replace it.")
    check_folder(flag, path)


def check_folder(flag: str, path: Path) -> None:
    """Raises ValueError unless the folder of `path` can be written to, or made. Call it before the work begins."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "is write-protected" if folder.is_dir() else "is a file"
        raise ValueError(f"{flag} should be in a folder that you can write to: {folder} {reason}.")


def check_different_files(read: dict[str, Path | None], written: dict[str, Path | None]) -> None:
    """Raises ValueError if a file that is to be written is also read, or written twice. Folders do not count."""
    outputs = [(flag, path) for flag, path in written.items() if path is not None and not path.is_dir()]
    inputs = [(flag, path) for flag, path in read.items() if path is not None and not path.is_dir()]
    pairs = [*((other, one) for one in outputs for other in inputs), *itertools.combinations(outputs, 2)]
    for (flag, path), (other_flag, other) in pairs:
        if same_file(path, other):
            raise ValueError(f"{other_flag} should be a different file from {flag}, not {other} for both.")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, also through links. If one does not exist yet, the names are compared, without
    regard to case, because some systems ignore it."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one).casefold() == os.path.realpath(other).casefold()


def make_folder(flag: str, folder: Path) -> None:
    """Makes a folder if it is missing. Raises ValueError or OSError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{flag} should be a folder, but {folder} is a file, or is inside one.") from None
    except OSError as error:
        raise OSError(f"{flag} {folder} cannot be written to ({error.strerror or error}).") from None


def candidates(first: Path) -> Iterator[Path]:
    """picture.png, picture-2.png, picture-3.png, ..."""
    yield first
    for number in itertools.count(2):
        yield first.with_stem(f"{first.stem}-{number}")


def save(write: Callable[..., None], names: Iterator[Path], replaced: Path | None, *contents: object) -> Path:
    """Writes a file under the first free name, and returns that name. An existing file is replaced only if it is
    `replaced`."""
    while True:
        path = next(names)
        with contextlib.suppress(FileExistsError):
            write(path, *contents, overwrite=path == replaced)
            return path


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file atomically, replacing an existing one. Raises OSError."""
    from sd.files import write_whole  # imported late, because sd imports torch

    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()), overwrite=True)
