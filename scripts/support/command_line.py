"""What the scripts share: errors in one sentence, the exit status, and a word where the environment is missing."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import NoReturn

PACKAGES = ("torch", "numpy", "PIL", "tqdm", "regex", "ftfy")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the whole usage before it; keeps the layout of the description."""

    def __init__(self, prog: str, description: str | None, packages: Iterable[str] = PACKAGES):
        """`packages` are those that the script imports later."""
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.packages = packages

    def parse_args(self, *arguments, **more):
        return self._with_packages(super().parse_args(*arguments, **more))

    def parse_intermixed_args(self, *arguments, **more):
        return self._with_packages(super().parse_intermixed_args(*arguments, **more))

    def _with_packages(self, options: argparse.Namespace) -> argparse.Namespace:
        """The options, if this Python has what the script imports later; looked for here, before any of it."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            self.error(
                f"this Python lacks {', '.join(missing)}: `sh scripts/demo.sh` makes an environment with all that is "
                f"needed, and `.venv/bin/python scripts/{self.prog}` uses it."
            )
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def import_torch() -> None:
    """Imports torch. Ctrl-C counts when that is done: it swallows what happens while it imports numpy by itself, and
    goes on with half of numpy."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        import torch  # noqa: F401
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):  # not where it was to be ignored, as in the background
        before(signal.SIGINT, None)


def exit_status(prog: str, work: Callable[[], object], interrupted: str) -> int:
    """Does the work, which needs torch -> 0, or 2 after an error and 130 after Ctrl-C, with one line about it."""
    try:
        import_torch()
        work()
        return 0
    except KeyboardInterrupt:
        status, line = 130, interrupted
    except (ValueError, OSError, MemoryError) as error:
        status, line = 2, str(error)
    print(f"{prog}: {line}", file=sys.stderr)  # not before: the progress bars of the work end with their error
    return status
