"""Flags that all kinds of training share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

POSITIVE = ("minutes", "steps", "batch", "save_every")


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


def check_common_flags(options: argparse.Namespace) -> None:
    """Stops with one line if a number is out of range."""
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:  # false for NaN too
            options.parser.error(f"--{name.replace('_', '-')} should be a number above 0, not {value:g}.")
    if not 0 <= options.seed < 2**63:
        options.parser.error(f"--seed should be a whole number from 0 to 2**63 - 1, not {options.seed}.")
