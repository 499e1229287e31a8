"""Records what the interpreter does during a block: imports, system calls, opened files, started programs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

AUDITED = (
    *("import", "exec", "compile", "open", "pickle.find_class", "marshal.loads", "code.__new__", "object.__setattr__"),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.putenv", "subprocess.Popen", "pty.spawn"),
    *("shutil.copyfile", "socket.connect", "urllib.Request", "webbrowser.open", "builtins.input", "ctypes.dlopen"),
)
_events: list | None = None  # what has happened in the current block


def _audit(event: str, arguments: tuple) -> None:
    if _events is not None and event in AUDITED:
        _events.append((event, *arguments[:1]))


sys.addaudithook(_audit)  # hooks cannot be removed; this one is idle while `_events` is None


@contextmanager
def watching() -> Iterator[list]:
    """A list that fills with what happens in the block: (event, its first argument)."""
    global _events
    _events = events = []
    try:
        yield events
    finally:
        _events = None
