"""Teaches a model one new word from a few pictures: textual inversion. The result is WORD.safetensors.

    python scripts/train.py inversion --pictures my_windmills --word windmill --class lighthouse
    python scripts/demo.py "a windmill at night" --embedding runs/inversion/windmill.safetensors

Only the vectors of the word are trained, and the model stays as it is. So it can only draw what it could draw before,
if there had been a word for it: to teach it something new, train a LoRA. The captions of cat.png are in cat.txt, one a
line, and have the word. Without any captions, "a WORD" is the caption of every picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.support.training import shared_arguments, train_and_write

if TYPE_CHECKING:
    from sd.training.inversion import InversionRun, NewThing

MINUTES = 10


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pictures", type=Path, required=True, metavar="DIR", help="the pictures, with captions")
    add("--word", required=True, metavar="WORD", help="the new word")
    help = "what kind of thing it is: the vectors of the new word begin as those of this one"
    add("--class", dest="kind", metavar="WORD", help=help)
    add("--vectors", type=int, metavar="N", help="vectors of the word, 1 to 4 are usual (4)")
    help = "the learning rate at its highest (tiny model: 4e-3, others: 1e-3)"
    add("--learning-rate", type=float, metavar="X", help=help)


def train(options: argparse.Namespace) -> Path | None:
    """Trains, or resumes, and returns the path of the file, which rank 0 writes."""
    from sd.training.inversion import InversionRun, NewThing

    settings = NewThing(
        options.word,
        options.kind,
        options.vectors,
        learning_rate=options.learning_rate,
        batch_size=options.batch,
    )
    return teach(InversionRun, settings, options)


def teach(kind: type[InversionRun], settings: NewThing, options: argparse.Namespace) -> Path | None:
    """Trains a run of this kind, also that of lora.py, and returns the path of its file."""
    run = kind(options.out, options.pictures, settings, options.checkpoint, **shared_arguments(options))
    return train_and_write(options, run.train, run.write)
