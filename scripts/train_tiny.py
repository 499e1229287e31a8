"""Trains the tiny model from nothing, on scenes that it draws itself or on your own pictures -> tiny.ckpt.

    python scripts/train_tiny.py all --minutes 96 --out runs/tiny
    python scripts/train_tiny.py all --folder my_pictures --out runs/mine
    python scripts/train_tiny.py diffusion --start data/tiny.ckpt --minutes 30 --out runs/further

Stages are vae, text and diffusion, in this order, and a last polish of the decoder; `all` is the four in a row. A run
that was stopped goes on where it was when the same command is given again; another training set, --seed or --start
needs another --out. With --start, the U-Net of a finished model learns further.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, exit_status

SHARES = {"vae": 0.295, "text": 0.093, "diffusion": 0.568, "decoder": 0.044}  # of the minutes given to `all`


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("train_tiny.py", __doc__)
    add = parser.add_argument
    add("stage", nargs="?", default="all", choices=[*SHARES, "all"], help="what to train (all)")
    add("--minutes", type=float, default=96, metavar="N", help="how long, drawing and encoding not counted (96)")
    add("--steps", type=int, metavar="N", help="how many steps of each stage, instead of minutes")
    add("--out", type=Path, default=Path("runs/tiny"), metavar="DIR", help="where everything is written (runs/tiny)")
    add("--folder", type=Path, metavar="DIR", help="your own pictures, each with its caption in a .txt beside it")
    add("--start", type=Path, metavar="FILE", help="a model whose U-Net is to learn further (only stage diffusion)")
    add("--scenes", type=int, default=20000, metavar="N", help="how many scenes to draw, without --folder (20000)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first there is)")
    add("--seed", type=int, default=0, metavar="N", help="makes the run repeatable (0)")
    add("--save-every", type=float, default=3, metavar="MINUTES", help="between checkpoints and sample grids (3)")
    options = parser.parse_args(arguments)
    for name in ("minutes", "steps", "scenes", "save_every"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:  # NaN neither
            parser.error(f"--{name.replace('_', '-')} should be a number above 0, not {value}.")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed should be a whole number from 0 to 2**63 - 1, not {options.seed}.")
    if options.start and options.stage != "diffusion":
        parser.error(f"--start is for stage diffusion, not {options.stage}: the other networks stay as they are.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    names = list(SHARES) if options.stage == "all" else [options.stage]
    interrupted = "interrupted; the same command goes on from the last checkpoint."
    return exit_status("train_tiny.py", lambda: train(options, names), interrupted)


def train(options: argparse.Namespace, names: list[str]) -> None:
    """The stages in turn; once there is a state of each, everything in one file."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from sd.training.stages import TrainingRun  # not before: torch takes a second to import

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pictures = (options.folder, options.scenes)
    with logging_redirect_tqdm():
        workshop = TrainingRun(
            options.out, *pictures, options.device, options.seed, options.save_every, start=options.start
        )
        for name in names:
            minutes = options.minutes * (SHARES[name] if options.stage == "all" else 1)
            workshop.train(name, minutes, options.steps)
        if workshop.complete:
            print(workshop.write_checkpoint())


if __name__ == "__main__":
    sys.exit(main())
