"""Train the tiny model from scratch, on scenes of its toy world or on your own images. The result is tiny.ckpt.

    python scripts/train_tiny.py all --out runs/tiny
    python scripts/train_tiny.py all --folder my_pictures --out runs/mine
    python scripts/train_tiny.py diffusion --start data/tiny.ckpt --minutes 30 --out runs/further
    python scripts/train_tiny.py lcm --start runs/tiny/tiny.ckpt --out runs/lcm

The stages are vae, text, diffusion and decoder, in this order; `all` runs all four. To resume a run that was stopped,
run the same command again. A run with other images, another --seed or another --start needs another --out.

With --start, a finished model is trained further, by stage text, diffusion or decoder, or by all three (`all`).

Stage lcm distils a finished model, by default the tiny one: the result is a LoRA, lcm.safetensors, with which the model
draws in one to eight steps, without guidance.

Your own images need captions: those of cat.png in cat.txt, one a line, or those of all images in captions.jsonl, with
lines such as {"file": "cat.png", "caption": "a cat"}. sd/training/README.md says more.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.training import (
    TrainingParser,
    add_rank_flags,
    run_training,
    shared_arguments,
    train_and_write,
)

log = logging.getLogger("train_tiny")

SHARES = {"vae": 0.28, "text": 0.12, "diffusion": 0.556, "decoder": 0.044}  # of the minutes given to `all`
PREDICTION_TYPES = ("epsilon", "v_prediction")
DISTILLATION = "lcm"
# What a run takes by default: of the four stages, and of the distillation, where the scenes are prompts.
DEFAULTS = {"minutes": (144, 20), "scenes": (30000, 960), "out": (Path("runs/tiny"), Path("runs/lcm"))}

# Measured on two CPU cores with bfloat16.
ENOUGH_MINUTES = 45  # a model learned to follow its prompts
IMAGES_ENCODED_PER_MINUTE = 1500


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = TrainingParser("train_tiny.py", __doc__)
    add = parser.add_argument
    add("stage", nargs="?", default="all", choices=[*SHARES, "all", DISTILLATION], help="the stage to train (all)")
    add("--minutes", type=float, metavar="N", help="training time, without drawing and encoding (144; lcm: 20)")
    add("--steps", type=int, metavar="N", help="number of steps of each stage, instead of --minutes")
    add("--out", type=Path, metavar="DIR", help="folder for all files (runs/tiny; lcm: runs/lcm)")
    add("--folder", type=Path, metavar="DIR", help="your own images, with captions")
    add("--start", type=Path, metavar="FILE", help="a finished model to train further, or to distil by stage lcm")
    help = "number of scenes to train on, without --folder (30000); lcm: of prompts that the model draws (960)"
    add("--scenes", type=int, metavar="N", help=help)
    kinds = " or ".join(PREDICTION_TYPES)
    add(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        metavar="TYPE",
        help=f"what the U-Net predicts: {kinds} (epsilon)",
    )
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first available one)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add("--save-every", type=float, default=3, metavar="MINUTES", help="time between saved states and samples (3)")
    add("--batch", type=int, metavar="N", help="lcm: latents in a step, of all devices together (32)")
    add_rank_flags(parser)
    options = parser.parse_args(arguments)
    distils = options.stage == DISTILLATION
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[distils])
    for name in ("minutes", "steps", "scenes", "save_every", "batch", "accumulate", "wait"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:  # false for NaN too
            parser.error(f"--{name.replace('_', '-')} should be a number above 0, not {value}.")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed should be a whole number from 0 to 2**63 - 1, not {options.seed}.")
    if options.start and options.stage == "vae":
        parser.error("With --start, the stage should be another one than vae: the U-Net needs the latents it knows.")
    if options.batch and not distils:
        parser.error(f"With --batch, the stage should be {DISTILLATION}, not {options.stage}.")
    if distils and options.prediction_type:
        parser.error(f"--prediction-type should be left out of stage {DISTILLATION}: the U-Net goes on as it is.")
    if options.start and options.prediction_type:
        parser.error("--prediction-type should be used without --start: the U-Net goes on predicting the same.")
    return options


def main(arguments: list[str] | None = None) -> int:
    def work(options: argparse.Namespace) -> Path | None:
        return (distil if options.stage == DISTILLATION else train)(options)

    return run_training("train_tiny.py", lambda: parse(arguments), work)


def train(options: argparse.Namespace) -> Path | None:
    """Train the stages in order. Once every network has a state, write the checkpoint, and return its path."""
    every = [name for name in SHARES if not (options.start and name == "vae")]
    names = every if options.stage == "all" else [options.stage]
    from sd.config import TINY
    from sd.training.ranks import rank
    from sd.training.stages import TrainingRun  # imported here because torch takes a second to import

    schedule = replace(TINY.schedule, prediction_type=options.prediction_type or TINY.schedule.prediction_type)
    run = TrainingRun(
        options.out,
        options.folder,
        options.scenes,
        config=replace(TINY, schedule=schedule),
        start=options.start,
        **shared_arguments(options),
    )
    if options.stage == "all" and not options.steps and not any(run.out.glob("*.state")):
        log.info(forecast(options.minutes, len(run.train_set), run.device.type == "cpu"))
    for name in names:
        run.train(name, options.minutes * SHARES[name] / sum(SHARES[name] for name in names), options.steps)
    return run.write_checkpoint() if run.complete and rank() == 0 else None


def distil(options: argparse.Namespace) -> Path | None:
    """Train stage lcm, write its LoRA, and return the path."""
    from sd.training.distillation import DistillationRun

    run = DistillationRun(
        options.out,
        options.start,
        options.folder,
        options.scenes,
        batch_size=options.batch or 32,
        **shared_arguments(options),
    )
    return train_and_write(options, run.train, run.write_lora)


def forecast(minutes: float, images: int, on_cpu: bool) -> str:
    """What to expect of a new run of all stages: how long it takes, and whether that is long enough."""
    more = 0.5 + minutes / 20  # to start, and to draw samples
    if on_cpu:
        more += images / IMAGES_ENCODED_PER_MINUTE
    text = f"Training takes about {minutes:g} minutes, and encoding images and drawing samples about {more:.0f} more."
    if on_cpu and minutes < ENOUGH_MINUTES:
        text += f" So few minutes give noise or blurs: on two CPU cores, {ENOUGH_MINUTES} or more are needed."
    return text


if __name__ == "__main__":
    sys.exit(main())
