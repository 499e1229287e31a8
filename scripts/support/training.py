"""What all kinds of training share: flags, and how to train on the ranks of torchrun."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from scripts.support.command_line import RankParser, exit_status
from scripts.support.work_queue import WAIT, Refused, connect, find_problem, launched, own_device

POSITIVE = ("minutes", "steps", "batch", "save_every", "accumulate", "wait")
POSITIONAL = ("stage", "technique")
INTERNAL = ("parser", "train")  # options that are no flags
INTERRUPTED = "interrupted; run the same command again to resume from the last saved state."


class TrainingParser(RankParser):
    """Without torchrun, it prints an error and exits, like any parser."""

    def error(self, message: str) -> NoReturn:
        if launched():
            super().error(message)
        super(RankParser, self).error(message)


def add_common_flags(parser: argparse.ArgumentParser, name: str, minutes: float) -> None:
    """Adds the flags. `name` is that of the technique, and of its folder in runs/; `minutes` its usual time."""
    add = parser.add_argument
    help = "Stable Diffusion 1.x or 2.x: a file, a folder or owner/name on the hub (default: the tiny model)"
    add("--checkpoint", type=Path, metavar="PATH", help=help)
    add("--out", type=Path, default=Path("runs") / name, metavar="DIR", help=f"folder for all files (runs/{name})")
    help = f"training time, without reading and encoding pictures ({minutes:g})"
    add("--minutes", type=float, default=minutes, metavar="N", help=help)
    add("--steps", type=int, metavar="N", help="number of steps, instead of --minutes")
    add("--batch", type=int, metavar="N", help="pictures in a step (default: as the tiny model was trained)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first available one)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add("--save-every", type=float, default=3, metavar="MINUTES", help="time between saved states and samples (3)")
    add_rank_flags(parser)


def add_rank_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for large models and many devices."""
    add = parser.add_argument
    add("--accumulate", type=int, default=1, metavar="N", help="compute a batch in N parts, to save memory (1)")
    add("--recompute", action="store_true", help="compute activations twice, to save memory")
    help = f"under torchrun: time limit for other ranks; longer than saving and showing samples ({WAIT})"
    add("--wait", type=float, default=WAIT, metavar="SECONDS", help=help)


def shared_arguments(options: argparse.Namespace) -> dict[str, object]:
    """What all runs of `sd.training` take, by the names of their arguments."""
    return {name: getattr(options, name) for name in ("device", "seed", "save_every", "accumulate", "recompute")}


def train_and_write(
    options: argparse.Namespace, train: Callable[[float, int | None], None], write: Callable[[], Path]
) -> Path | None:
    """Trains, or resumes, and returns the path of the file, which rank 0 writes."""
    from sd.training.ranks import rank

    train(options.minutes, options.steps)
    return write() if rank() == 0 else None


def check_common_flags(options: argparse.Namespace) -> None:
    """Stops with one line if a number is out of range."""
    for name in POSITIVE:
        value = getattr(options, name, None)
        if value is not None and not 0 < value < math.inf:  # false for NaN too
            options.parser.error(f"--{name.replace('_', '-')} should be a number above 0, not {value:g}.")
    if not 0 <= options.seed < 2**63:
        options.parser.error(f"--seed should be a whole number from 0 to 2**63 - 1, not {options.seed}.")


def run_training(
    program: str, parse: Callable[[], argparse.Namespace], train: Callable[[argparse.Namespace], Path | None]
) -> int:
    """Trains with the options that `parse` returns, and prints the path that `train` returns. Returns the exit status.

    Under torchrun, all ranks train together. Of several that fail, one prints why.
    """
    options, problem, rank = None, "", int(os.environ["RANK"]) if launched() else 0
    try:
        options = parse()
    except ValueError as error:  # under torchrun
        problem = str(error)

    def work() -> int:
        import logging

        from tqdm.contrib.logging import logging_redirect_tqdm

        logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s")
        with logging_redirect_tqdm():
            try:
                path = on_ranks(program, options, problem, train) if launched() else train(options)
            except Refused:
                return 2
            except KeyboardInterrupt:
                if rank == 0:
                    raise  # one line is enough
                return 130
        if path and rank == 0:
            print(path)
        return 0

    def explain(error: Exception) -> str:
        return f"rank {rank}: {error}" if launched() else str(error)

    return exit_status(program, work, INTERRUPTED, explain)


def on_ranks(program: str, options: argparse.Namespace | None, problem: str, train: Callable) -> Path | None:
    """What `train` returns, once all ranks have joined and agreed on their flags. `problem` is what is wrong with those
    of this rank.

    Raises Refused where another rank prints what is wrong.
    """
    from torch import distributed

    from sd.training.ranks import joined

    ranks = connect(options.wait if options else WAIT, lambda line: print(f"{program}: {line}", file=sys.stderr))
    try:
        device = None if problem else own_device(options.device)
        if device and device.type not in ("cuda", "cpu"):
            problem = f"Under torchrun, --device should be cuda or cpu, not {device.type}."
    except ValueError as error:
        problem = str(error)
    ranks.agree("flags", {"problem": problem, "arguments": describe(options)}, find_problem)
    options.device = str(device)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions, where it costs nothing
    store = distributed.PrefixStore(f"{ranks.start}/group", ranks.store)
    try:
        with joined(store, ranks.rank, ranks.count, device, ranks.wait):
            path = train(options)
    except KeyboardInterrupt:
        ranks.fails_first()
        raise
    except (ValueError, OSError, MemoryError, ImportError):
        if ranks.fails_first():
            raise
        raise Refused from None
    ranks.leave()
    return path


def describe(options: argparse.Namespace | None) -> dict[str, str | None]:
    """The flags in which all ranks should agree."""
    given = {name: value for name, value in vars(options or argparse.Namespace()).items() if name not in INTERNAL}
    flags = {name if name in POSITIONAL else f"--{name.replace('_', '-')}": value for name, value in given.items()}
    return {flag: None if value is None else str(value) for flag, value in flags.items()}
