"""Trains one of the techniques that people add to Stable Diffusion, on the tiny model or on real weights.

    python scripts/train.py lora --pictures my_pictures --word windmill
    python scripts/train.py lora --help

sd/training/README.md explains each. To resume a run that was stopped, run the same command again.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.training import TrainingParser, add_common_flags, check_common_flags, run_training

# Technique -> what `--help` says. Each is a module of scripts/training with `MINUTES`, its usual time, and functions
# `add_flags(parser)` and `train(options)`, which returns the path of the file that it wrote.
TECHNIQUES: dict[str, str] = {
    "lora": "a LoRA: the model learns one thing from a few pictures (DreamBooth)",
    "inversion": "textual inversion: one new word, learned from a few pictures",
    "full": "train all weights of the U-Net on your own pictures",
    "control": "a ControlNet: the model follows outlines, scribbles or other images",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = TrainingParser("train.py", __doc__)
    techniques = parser.add_subparsers(dest="technique", required=True, metavar="TECHNIQUE")
    for name, help in TECHNIQUES.items():
        module = import_module(f"scripts.training.{name}")
        one = techniques.add_parser(name, help=help, description=module.__doc__)
        module.add_flags(one)
        add_common_flags(one, name, module.MINUTES)
        one.set_defaults(train=module.train, parser=one)
    options = parser.parse_args(arguments)
    check_common_flags(options)
    return options


def main(arguments: list[str] | None = None) -> int:
    return run_training("train.py", lambda: parse(arguments), lambda options: options.train(options))


if __name__ == "__main__":
    sys.exit(main())
