"""Atomic file writes, and the folder of the shipped files.

A file appears under its name complete or not at all, even if the process is killed while writing. Until it is complete
it is called `.sd-(16 hexadecimal digits).tmp`, in the same folder, and its writer holds a lock on it. A killed writer
leaves it behind unlocked, and the next writer in that folder removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where leftovers stay: without locks they look like files that are being written
    fcntl = None


# The folder of merges.txt and the tiny model: the repository's data/, or _data in the installed package.
PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "_data"  # see pyproject.toml

DATA = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "data"


@contextlib.contextmanager
def whole_file(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """Opens a file that becomes `path` at the end of the block, or is removed if the block raises.

    An existing file is replaced only once the new one is safely on disk, and only with `overwrite`. Without it, even a
    file that another process creates at the last moment is kept. The folder must exist. Raises FileExistsError, or
    another OSError.
    """
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError
    remove_leftovers(path.parent)
    file = _locked_temporary(path.parent)
    temporary = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl:
                _give_name(temporary, path, overwrite)  # still locked
        if not fcntl:
            _give_name(temporary, path, overwrite)  # Windows cannot rename an open file
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_whole(path: Path, save: Callable[[BinaryIO], None], overwrite: bool) -> None:
    """Writes `path` atomically: `save` gets the open file. A missing folder is created.

    Raises FileExistsError or another OSError, with a message of one sentence.
    """
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(f"{path.parent} is not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, overwrite) as file:
            save(file)
    except FileExistsError:
        raise FileExistsError(f"{path} exists already and is left as it is: choose another name.") from None
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}).") from error


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed processes have left in a folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if re.fullmatch(r"\.sd-[0-9a-f]{16}\.tmp", entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    if _lock(file):
                        os.unlink(entry.path)


def _locked_temporary(folder: Path) -> BinaryIO:
    while True:
        file = open(folder / f".sd-{secrets.token_hex(8)}.tmp", "xb")  # noqa: SIM115, the caller closes it
        with contextlib.suppress(OSError):  # a network drive without locks: leftovers stay there too
            if fcntl and not (_lock(file) and os.fstat(file.fileno()).st_nlink):
                file.close()  # another process removed it as a leftover before it was locked
                continue
        return file


def _lock(file: BinaryIO) -> bool:
    """Locks the file. Returns False if another process has locked it. Raises OSError where there are no locks."""
    if not fcntl:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _give_name(temporary: Path, path: Path, overwrite: bool) -> None:
    """Renames the finished file to `path` in one step. Without `overwrite`, raises FileExistsError if `path` exists."""
    if not overwrite:
        try:
            os.link(temporary, path)  # unlike renaming, fails if the name is taken
            return
        except FileExistsError:
            raise
        except OSError:  # the filesystem has no hard links: reserve the name with an empty file
            open(path, "xb").close()
    try:
        os.replace(temporary, path)
    except BaseException:
        if not overwrite:
            path.unlink()  # the empty file from above
        raise
