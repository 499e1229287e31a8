"""Files that appear under their names whole or not at all, whatever happens to the process that writes them.

In: a path, and a block of code that writes into an open file. Out: the file of that name, once the block has ended.

Until then it lies in the same folder as `.sd-(16 digits).tmp`, which is locked for as long as its writer lives. A
writer that is killed leaves it there, unlocked; the next one to write into that folder removes it.
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
except ImportError:  # Windows: leftovers stay there, for they cannot be told from files that are being written
    fcntl = None


# The merges and the tiny model are in the repository's data/, or inside the package once it is installed.
PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "_data"  # see pyproject.toml

DATA = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "data"


@contextlib.contextmanager
def whole_file(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """An open file that becomes `path` at the end of the block, at once, or vanishes if the block raises.

    An existing file stays until the new one is safely on disk, and without `overwrite` for good, even if another
    process takes the name at the last moment. The folder must exist. Raises FileExistsError, or another OSError.
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
                _give_name(temporary, path, overwrite)  # while it is locked
        if not fcntl:
            _give_name(temporary, path, overwrite)  # Windows renames no open file
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_whole(path: Path, save: Callable[[BinaryIO], None], overwrite: bool) -> None:
    """Have `save` write into a `whole_file`, in a folder that is made if it is missing.

    Raises FileExistsError or another OSError, whose message is one sentence.
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
    """Remove what killed processes have left in a folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if re.fullmatch(r"\.sd-[0-9a-f]{16}\.tmp", entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    if _lock(file):
                        os.unlink(entry.path)


def _locked_temporary(folder: Path) -> BinaryIO:
    while True:
        file = open(folder / f".sd-{secrets.token_hex(8)}.tmp", "xb")  # noqa: SIM115, it is handed on
        with contextlib.suppress(OSError):  # a network drive without locks, where nobody removes leftovers either
            if fcntl and not (_lock(file) and os.fstat(file.fileno()).st_nlink):
                file.close()  # between opening and locking, another process took it for a leftover
                continue
        return file


def _lock(file: BinaryIO) -> bool:
    """Whether nobody else has locked the file. Raises OSError where there are no locks."""
    if not fcntl:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _give_name(temporary: Path, path: Path, overwrite: bool) -> None:
    """Make the finished file appear as `path`, at once; without `overwrite`, only if the name is free."""
    if not overwrite:
        try:
            os.link(temporary, path)  # unlike a renaming, fails if the name is taken
            return
        except FileExistsError:
            raise
        except OSError:  # the filesystem has no hard links: take the name with an empty file
            open(path, "xb").close()
    try:
        os.replace(temporary, path)
    except BaseException:
        if not overwrite:
            path.unlink()  # the empty file is ours
        raise
