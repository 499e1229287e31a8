"""What all scripts share: errors of one line, the exit status, and a message if packages are missing.

Every script makes a `Parser` first and then calls `run` or `exit_status`. Both work without a console.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from scripts.support.streams import open_streams, output_error

VENV_PYTHON = ".venv/Scripts/python" if os.name == "nt" else ".venv/bin/python"
PACKAGES = ("torch", "numpy", "PIL", "tqdm", "regex", "ftfy")


def demo_command() -> list[str]:
    """How the demo was started: as a script, or as the command `sd` that `pip install .` makes."""
    if Path(sys.argv[0]).stem == "sd":
        return ["sd"]
    own = Path(sys.prefix).resolve() == (Path(__file__).resolve().parents[2] / ".venv").resolve()  # as demo.sh made it
    return [VENV_PYTHON if own else "python", "scripts/demo.py"]


def demo_name() -> str:
    """What was started, as errors call it: demo.py, or the command sd."""
    return Path(demo_command()[-1]).name


def say(line: str) -> None:
    """Prints a line of the demo on standard error, after the program's name."""
    print(f"{demo_name()}: {line}", file=sys.stderr)


class Once(argparse.Action):
    """Stores a value, and is an error if the flag is given twice: of two names, one would be ignored."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} should be given once, not twice.")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints an error as one line, without the usage, and keeps the description's layout."""

    def __init__(self, prog: str, description: str, packages: Iterable[str] = PACKAGES, add_help: bool = True):
        """`packages`: what the script imports later. `add_help`: whether there are the flags -h and --help."""
        open_streams()
        if demo_command() == ["sd"]:
            prog, description = "sd", description.replace("python scripts/demo.py", "sd")
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=layout, add_help=add_help)
        self.packages = packages

    def parse_args(self, *arguments, **more):
        return self._ready(super().parse_args(*arguments, **more))

    def parse_intermixed_args(self, *arguments, **more):
        return self._ready(super().parse_intermixed_args(*arguments, **more))

    def _ready(self, options: argparse.Namespace) -> argparse.Namespace:
        """Returns the options. Stops with one line if a package or the current folder is missing."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            self.error(
                f"this Python lacks {', '.join(missing)}: run `sh scripts/demo.sh` once to install them into .venv, "
                f"then `{VENV_PYTHON} scripts/{self.prog}`."
            )
        try:
            os.getcwd()
        except FileNotFoundError:
            self.error("the current folder no longer exists: change to another one and run this again.")
        return options

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        problem = output_error() if status == 0 else None  # --help may be all that was asked for
        super().exit(2 if problem else status, f"{self.prog}: {problem}\n" if problem else message)

    def error(self, message: str) -> NoReturn:
        if self.prog == demo_name() and "unrecognized arguments: -" in message:
            message += "; a prompt that begins with a dash goes at the end, after --"
        self.exit(2, f"{self.prog}: {message}\n")


class RankParser(Parser):
    """Raises ValueError instead of printing an error: of several ranks, only one should print it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def import_torch() -> None:
    """Imports torch, and delays Ctrl-C until that is done.

    torch imports numpy from C and ignores errors there, so Ctrl-C at that moment would leave numpy half imported.
    """
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        import torch  # noqa: F401
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):  # not callable where Ctrl-C is ignored, as in the background
        before(signal.SIGINT, None)


def exit_status(
    prog: str, work: Callable[[], object], interrupted: str, explain: Callable[[Exception], str] = str
) -> int:
    """Imports torch and calls `run`."""

    def with_torch() -> object:
        import_torch()
        return work()

    return run(prog, with_torch, interrupted, explain)


def run(prog: str, work: Callable[[], object], interrupted: str, explain: Callable[[Exception], str] = str) -> int:
    """Runs `work`. Returns the exit status: what `work` returns if that is a number, or else 0; 2 after an error, 130
    after Ctrl-C. The last two also print one line on standard error: `explain` of the error, and `interrupted`.
    """
    open_streams()
    try:
        done = work()
        status, line = done if isinstance(done, int) else 0, None
    except KeyboardInterrupt:
        status, line = 130, interrupted
    except (ValueError, OSError, MemoryError, ImportError) as error:  # of a package for one feature only
        status, line = 2, explain(error)
    if line is None and (line := output_error()):
        status = 2
    if line is not None:
        print(f"{prog}: {line}", file=sys.stderr)  # only here, after the progress bars have closed
    return status
