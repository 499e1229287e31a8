"""Train all weights of a model's U-Net further on your own captioned pictures. The result is a checkpoint.

    python scripts/train.py full --folder my_pictures
    python scripts/train.py full --folder my_pictures --buckets --flip --offset-noise 0.05
    python scripts/train.py full --folder my_pictures --checkpoint sd15.safetensors --optimizer adamw8bit --batch 2
    python scripts/train.py full --folder my_pictures --prediction-type v_prediction --zero-snr

The captions of cat.png are in cat.txt, one a line, or those of all pictures in captions.jsonl, with lines such as
{"file": "cat.png", "caption": "a cat"}. For one new thing or style, a LoRA needs fewer pictures, and less memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.support.training import shared_arguments, train_and_write

MINUTES = 10
PREDICTION_TYPES, OPTIMIZERS = ("epsilon", "v_prediction"), ("adamw", "adamw8bit")  # those of sd, without torch


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folder", type=Path, required=True, metavar="DIR", help="your own pictures, with captions")
    help = "the learning rate at its highest (tiny model: 5e-4, others: 1e-5)"
    add("--learning-rate", type=float, metavar="X", help=help)
    add("--ema", type=float, default=0.999, metavar="X", help="decay of the average of the weights (0.999)")
    help = "gamma of the min-SNR weights, 0 for none (5; with --zero-snr: 0)"
    add("--min-snr", type=float, metavar="GAMMA", help=help)
    help = "strength of offset noise, for darker and brighter pictures, such as 0.05 (0)"
    add("--offset-noise", type=float, default=0.0, metavar="X", help=help)
    add("--flip", action="store_true", help="also train on mirrored pictures")
    add("--buckets", action="store_true", help="keep the pictures' shapes, instead of cropping squares")
    kinds = " or ".join(PREDICTION_TYPES)
    help = f"what the U-Net learns to predict: {kinds} (as the model does)"
    add("--prediction-type", choices=PREDICTION_TYPES, metavar="TYPE", help=help)
    add("--zero-snr", action="store_true", help="end the noise schedule in noise alone; only for v_prediction")
    help = f"{' or '.join(OPTIMIZERS)}; the second needs the package bitsandbytes and less memory (adamw)"
    add("--optimizer", choices=OPTIMIZERS, default="adamw", metavar="NAME", help=help)
    help = "under torchrun: divide the weights among the ranks, for models that do not fit on one device"
    add("--sharded", action="store_true", help=help)


def train(options: argparse.Namespace) -> Path | None:
    """Trains, or resumes, and returns the path of the checkpoint, which rank 0 writes."""
    from sd.training.fine_tuning import FineTuning, FineTuningRun

    settings = FineTuning(
        options.learning_rate,
        options.batch,
        options.ema,
        options.min_snr,
        options.offset_noise,
        options.flip,
        options.buckets,
        options.prediction_type,
        options.zero_snr,
        options.optimizer,
    )
    run = FineTuningRun(
        options.out,
        options.folder,
        options.checkpoint,
        settings,
        sharded=options.sharded,
        **shared_arguments(options),
    )
    return train_and_write(options, run.train, run.write_checkpoint)
