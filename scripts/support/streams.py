"""Standard output and error that never stop the work: closed streams, a reader that has gone, a full disk.

A program without a console (pythonw, cron, a launcher) may have no streams at all: sys.stdout is None. One whose output
goes to `head -1` loses its reader. Neither is a reason to lose a picture.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


class Stream:
    """A text stream that keeps its first error in `error` instead of raising it, and is silent from then on."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def _try(self, work, *arguments: object) -> None:
        if self.error is None:
            try:
                work(*arguments)
            except (OSError, ValueError) as error:  # ValueError: the file object is closed
                self.error = error
                self._drop()

    def _drop(self) -> None:
        """Discards what is still buffered. Otherwise Python would try again to write it when it exits."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def open_streams() -> None:
    """Makes sys.stdout and sys.stderr exist, and wraps them in `Stream`. Does nothing if that is done already."""
    with contextlib.suppress(OSError):
        # Files that are opened later must not get the numbers 0 to 2, which C code uses for its messages.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, open until the end
        if not isinstance(stream, Stream):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # not every stream has an encoding
                stream.reconfigure(errors="backslashreplace")  # for characters that the terminal lacks
            setattr(sys, name, Stream(stream))


def output_error() -> str | None:
    """What went wrong with standard output, as a sentence. None if nothing did, or if only its reader has gone."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None or isinstance(error, BrokenPipeError):
        return None
    return f"standard output cannot be written to ({getattr(error, 'strerror', None) or error})."
