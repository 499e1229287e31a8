"""Measure how well the tiny model, or one trained like it, follows its prompts: a table, and evaluation.json.

    python scripts/evaluate_tiny.py
    python scripts/evaluate_tiny.py --checkpoint runs/tiny/tiny.ckpt --out runs/tiny
    python scripts/evaluate_tiny.py --prompts 200 --cfg-scales 3 5 7.5 --samplers dpm++2m ddpm

The judge, a classifier, is trained first, which takes a minute or two. It is then kept in --out. If the checkpoint is
in the folder of its training run, the encoders in text.state also measure how often an image matches its own prompt
better than all others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, exit_status
from scripts.support.flags import with_flags
from scripts.support.output_files import make_folder, write_json

if TYPE_CHECKING:
    from torch import nn

    from sd.models import Models

JUDGE_SCENES, TEST_SCENES = 6000, 500
FOLDER = "runs/evaluation"

# Parameters of `generate` -> the flags for them here.
FLAGS = {
    "n_inference_steps": "--steps",
    "deep_cache": "--deep-cache",
    "device": "--device",
    "sampler_name": "--samplers",
    "cfg_scale": "--cfg-scales",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("evaluate_tiny.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="the model to evaluate (default: the tiny model in data/)")
    add("--out", type=Path, default=Path(FOLDER), metavar="DIR", help=f"for the judge and the results ({FOLDER})")
    add("--prompts", type=int, default=400, metavar="N", help="prompts of each kind, seen and held out (400)")
    add("--cfg-scales", type=float, nargs="+", metavar="S", help="guidance scales (the model's own; tiny model: 5)")
    add("--samplers", nargs="+", metavar="NAME", help="sampling algorithms (the model's own; tiny model: dpm++2m)")
    add("--steps", type=int, metavar="N", help="sampling steps (the model's own; tiny model: 20)")
    add("--deep-cache", type=int, default=1, metavar="N", help="recompute the deep stages every N steps (1)")
    add("--judge-steps", type=int, default=600, metavar="N", help="steps to train a judge, if --out has none (600)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first available one)")
    options = parser.parse_args(arguments)
    for name in ("prompts", "judge_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} should be at least 1, not {getattr(options, name)}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    interrupted = "interrupted; run the same command again: the judge is kept, the images are drawn again."
    return exit_status("evaluate_tiny.py", lambda: evaluate(options), interrupted)


def prepare(options: argparse.Namespace) -> Models:
    """Load the model, fill in missing options with its own sampling settings, and create the folder `out`.

    Raises ValueError or OSError for bad options, before the judge is trained or anything is drawn.
    """
    from sd import load_models

    check(options)
    models = load_models(options.checkpoint, options.device)
    if models.config.unet.inpaints:
        raise ValueError("--checkpoint should be a text-to-image model, not an inpainting model.")
    defaults, max_steps = models.config.sampling, models.config.schedule.num_training_steps
    options.samplers = options.samplers or [defaults.sampler]
    options.cfg_scales = options.cfg_scales or [defaults.cfg_scale]
    options.steps = options.steps or defaults.steps
    if options.steps > max_steps:
        raise ValueError(f"--steps should be at most {max_steps} with this checkpoint, not {options.steps}.")
    make_folder("--out", options.out)
    return models


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that are invalid for `generate`, by the names of the flags."""
    from sd.request import Request, check_models

    settings = {"n_inference_steps": options.steps, "deep_cache": options.deep_cache}
    for sampler in options.samplers or [None]:
        for scale in options.cfg_scales or [None]:
            try:
                Request("", sampler_name=sampler, cfg_scale=scale, **settings).check()
                check_models(None, None, options.device, None)
            except ValueError as error:
                raise ValueError(with_flags(str(error), FLAGS)) from None


def evaluate(options: argparse.Namespace) -> None:
    """Train the judge, apply it to renders, to their reconstructions and to generated images, and write the results."""
    import torch
    from tqdm import tqdm

    from sd.training import evaluation

    models = prepare(options)
    encoders = options.checkpoint and evaluation.load_encoders(options.checkpoint.parent / "text.state", models)
    judge = train_judge(options)
    rows, decibels = judge_renders(options, models, judge)

    second = {}
    runs = [(s, c, h) for s in options.samplers for c in options.cfg_scales for h in (False, True)]
    for sampler, cfg_scale, held_out in tqdm(runs, "drawing"):
        scenes, prompts = evaluation.make_prompts(options.prompts, held_out)
        pictures = evaluation.draw_prompts(models, prompts, sampler, options.steps, cfg_scale, options.deep_cache)
        wanted = torch.tensor([evaluation.targets(scene) for scene in scenes])
        name = f"{sampler} {options.steps} steps, scale {cfg_scale:g}, {'held out' if held_out else 'seen'}"
        rows[name] = evaluation.judge_accuracy(judge, pictures, wanted)
        rows[name]["lights"] = evaluation.lights_accuracy(pictures, scenes)
        if encoders:
            second[name] = evaluation.second_opinion(encoders, models.tokenizer, pictures, prompts)

    margin = evaluation.interval(0.95, options.prompts)
    print(table(rows), f"\nVAE: {decibels:.2f} dB. 95 % interval of a share of .95: +-{margin:.3f}.")
    for name, share in second.items():
        print(f"{name}: {share:.1%} of the images match their own prompt best, out of {options.prompts}.")
    result = {
        "checkpoint": str(options.checkpoint or "data/tiny.ckpt"),
        "psnr": decibels,
        "prompts": options.prompts,
        "interval_at_95": margin,
        "accuracy": rows,
        "retrieval": second,
    }
    write_json(options.out / "evaluation.json", result)


def judge_renders(options: argparse.Namespace, models: Models, judge: nn.Module) -> tuple[dict[str, dict], float]:
    """The judge's shares for renders and for their reconstructions by the VAE, and the mean PSNR of these in dB."""
    import torch

    from sd.training import evaluation
    from sd.training.data import load_scenes
    from sd.training.world.scenes import scene_and_captions

    first = evaluation.JUDGE_SEED + JUDGE_SCENES
    renders = load_scenes(options.out, TEST_SCENES, models.config.image_size, first, held_out=None)
    scenes = [scene_and_captions(first + i, 0, held_out=None)[0] for i in range(TEST_SCENES)]
    wanted = torch.tensor([evaluation.targets(scene) for scene in scenes])
    images = renders.batch(torch.arange(TEST_SCENES))
    copies, decibels = evaluation.through_the_vae(models, images)
    rows = {}
    for name, pictures in {"renders": images, "through the VAE": copies}.items():
        rows[name] = evaluation.judge_accuracy(judge, pictures, wanted)
        rows[name]["lights"] = evaluation.lights_accuracy(pictures, scenes)
    return rows, decibels


def train_judge(options: argparse.Namespace):
    """Load the judge from `out`, or train it there first."""
    import torch
    from tqdm import tqdm

    from sd.checkpoints.files import write_checkpoint
    from sd.config import TINY
    from sd.training import evaluation
    from sd.training.data import load_scenes
    from sd.training.loop import Training
    from sd.training.world.scenes import scene_and_captions

    path = options.out / "judge.safetensors"
    if not path.exists():
        pictures = load_scenes(options.out, JUDGE_SCENES, TINY.image_size, evaluation.JUDGE_SEED, held_out=None)
        seeds = range(evaluation.JUDGE_SEED, evaluation.JUDGE_SEED + JUDGE_SCENES)
        stage = evaluation.JudgeStage(pictures, [scene_and_captions(seed, 0, held_out=None)[0] for seed in seeds])
        training = Training(stage, options.out, torch.device("cpu"), minutes=0, steps=options.judge_steps, seed=0)
        with tqdm(total=training.total, initial=training.step, desc="judge") as bar:
            training.run(lambda progress: bar.update(), save_every=60, pause=lambda: None)
        write_checkpoint(path, {name: t.half() for name, t in training.average["judge"].state_dict().items()})
    return evaluation.load_judge(path)


def table(rows: dict[str, dict[str, float]]) -> str:
    """The shares as text: a row for each sampling setting, a column for each attribute."""
    names = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>10}" for name in names)]
    lines += [f"{row:<{width}}" + "".join(f"{shares[name]:>10.3f}" for name in names) for row, shares in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
