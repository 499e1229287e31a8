"""Teaches a model one thing from a few pictures: DreamBooth, trained as a LoRA. The result is WORD.safetensors.

    python scripts/train.py lora --pictures my_windmills --word windmill --class lighthouse
    python scripts/demo.py "a windmill at night" --lora runs/lora/windmill.safetensors
    python scripts/train.py lora --pictures my_cat --word sks --class cat --checkpoint sd15.safetensors

12 to 24 pictures are enough. The captions of cat.png are in cat.txt, one a line, and have the word. Without any
captions, "a WORD" is the caption of every picture. Part of each batch are pictures that the model itself draws first,
of other things of that class: it is trained to do there what it did before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.training.inversion import teach

MINUTES = 10


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pictures", type=Path, required=True, metavar="DIR", help="the pictures, with captions")
    add("--word", required=True, metavar="WORD", help="what prompts call the thing; best a rare word")
    add("--class", dest="kind", metavar="WORD", help="what kind of thing it is, a word that the model knows")
    help = "the LoRA's rank: a higher one learns more details, and its file is larger (8)"
    add("--rank", type=int, default=8, metavar="R", help=help)
    help = "vectors of the word that are learned together with the LoRA (tiny model: 2, others: 0)"
    add("--vectors", type=int, metavar="N", help=help)
    help = "the share of each batch that keeps what the model knows (0.4)"
    add("--prior", type=float, default=0.4, metavar="SHARE", help=help)
    help = "the learning rate at its highest (tiny model: 3e-3, others: 5e-4)"
    add("--learning-rate", type=float, metavar="X", help=help)


def train(options: argparse.Namespace) -> Path | None:
    """Trains, or resumes, and returns the path of the file, which rank 0 writes."""
    from sd.training.inversion import NewThing
    from sd.training.lora import LoRARun

    settings = NewThing(
        options.word,
        options.kind,
        options.vectors,
        options.rank,
        options.prior,
        options.learning_rate,
        options.batch,
    )
    return teach(LoRARun, settings, options)
