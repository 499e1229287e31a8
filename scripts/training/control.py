"""Trains a ControlNet (2302.05543): the model then draws what a prompt says along the lines of an image.

    python scripts/train.py control
    python scripts/train.py control --kind scribbles --start runs/control/control.safetensors --out runs/scribbles
    python scripts/train.py control --checkpoint model.safetensors --pictures mine --control-images edges
    python scripts/demo.py "a red house" --control runs/control/control.safetensors --control-image outline.png

Without --pictures, the pictures are scenes of the toy world. Without --control-images, their outlines are made from the
pictures. The result is control.safetensors in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.support.training import shared_arguments, train_and_write

MINUTES = 45


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help = "what is made from the pictures: outlines, or scribbles, which are outlines as a hand draws them (outlines)"
    add("--kind", choices=("outlines", "scribbles"), metavar="KIND", help=help)
    add("--pictures", type=Path, metavar="DIR", help="your own pictures, with captions (as for train_tiny.py --folder)")
    help = "an image to steer by for each picture, with its name: edges, poses or depths, for example"
    add("--control-images", type=Path, metavar="DIR", help=help)
    add("--scenes", type=int, metavar="N", help="number of scenes to train on, without --pictures (3000)")
    add("--start", type=Path, metavar="FILE", help="a ControlNet to train further")


def train(options: argparse.Namespace) -> Path | None:
    if options.kind and options.control_images:
        options.parser.error("--kind should be used without --control-images, which are what the ControlNet follows.")
    if options.scenes is not None and options.pictures:
        options.parser.error("--scenes should be used without --pictures.")
    from sd.training.control_run import ControlRun

    run = ControlRun(
        options.out,
        options.checkpoint,
        options.kind or "outlines",
        options.pictures,
        options.control_images,
        3000 if options.scenes is None else options.scenes,
        options.start,
        options.batch or 8,
        **shared_arguments(options),
    )
    return train_and_write(options, run.train, run.write)
