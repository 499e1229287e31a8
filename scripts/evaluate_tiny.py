"""Measures how well the tiny model, or one trained like it, does what it is told -> a table, and evaluation.json.

    python scripts/evaluate_tiny.py
    python scripts/evaluate_tiny.py --checkpoint runs/tiny/tiny.ckpt --out runs/tiny
    python scripts/evaluate_tiny.py --prompts 200 --cfg-scales 3 5 7.5 --samplers dpm++2m ddpm

A judge is trained first, once, on fresh renders: a minute or two. Where the text.state of its own training lies beside
a checkpoint, the encoders in it give a second opinion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, exit_status
from scripts.support.output_files import make_folder, write_json

if TYPE_CHECKING:
    from torch import nn

    from sd.models import Models

JUDGE_SCENES, TEST_SCENES = 6000, 500
FOLDER = "runs/evaluation"

# What `generate` calls its arguments, and what they are called here.
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
    add("--checkpoint", type=Path, metavar="FILE", help="what to evaluate (default: the tiny model in data/)")
    add("--out", type=Path, default=Path(FOLDER), metavar="DIR", help=f"for the judge and the result ({FOLDER})")
    add("--prompts", type=int, default=400, metavar="N", help="seen, and as many held-out (400: intervals under 0.03)")
    add("--cfg-scales", type=float, nargs="+", metavar="S", help="guidance scales (the model's own; tiny model: 5)")
    add("--samplers", nargs="+", metavar="NAME", help="sampling algorithms (the model's own; tiny model: dpm++2m)")
    add("--steps", type=int, metavar="N", help="sampling steps (the model's own; tiny model: 20)")
    add("--deep-cache", type=int, default=1, metavar="N", help="steps that share the U-Net's deep features (1)")
    add(
        "--judge-steps", type=int, default=600, metavar="N", help="how long to train a judge, if none is in --out (600)"
    )
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first there is)")
    options = parser.parse_args(arguments)
    for name in ("prompts", "judge_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} should be at least 1, not {getattr(options, name)}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    interrupted = "interrupted; the same command goes on with the judge, and draws the pictures anew."
    return exit_status("evaluate_tiny.py", lambda: evaluate(options), interrupted)


def prepare(options: argparse.Namespace) -> Models:
    """The model to evaluate, whose own sampling fills what the options leave open; and the folder `out`.

    Raises ValueError or OSError for what cannot be, before the judge is trained and anything is drawn.
    """
    from sd import load_models

    check(options)
    models = load_models(options.checkpoint, options.device)
    if models.config.unet.inpaints:
        raise ValueError("--checkpoint should make pictures from text alone: this one is made for inpainting.")
    usual, most = models.config.sampling, models.config.schedule.num_training_steps
    options.samplers = options.samplers or [usual.sampler]
    options.cfg_scales = options.cfg_scales or [usual.cfg_scale]
    options.steps = options.steps or usual.steps
    if options.steps > most:
        raise ValueError(f"--steps should be at most {most} with this checkpoint, not {options.steps}.")
    make_folder("--out", options.out)
    return models


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that `generate` would not take, under their names here."""
    from sd.request import Request, check_models

    settings = {"n_inference_steps": options.steps, "deep_cache": options.deep_cache}
    for sampler in options.samplers or [None]:
        for scale in options.cfg_scales or [None]:
            try:
                Request("", sampler_name=sampler, cfg_scale=scale, **settings).check()
                check_models(None, None, options.device, None)
            except ValueError as error:
                name, _, rest = str(error).partition(" ")
                raise ValueError(f"{FLAGS[name]} {rest}") from None


def evaluate(options: argparse.Namespace) -> None:
    """Trains the judge, judges true renders and their copies, then pictures for prompts, and writes it all down."""
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
    print(table(rows), f"\nVAE: {decibels:.2f} dB. A share of .95 is known to within {margin:.3f}.")
    for name, share in second.items():
        print(f"{name}: {share:.1%} of the pictures find their prompt among {options.prompts}.")
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
    """What the judge says of true renders and of their copies through the VAE, and the copies' PSNR in dB."""
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
    """The judge in `out`, trained there if it is not yet."""
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
    """Rows of shares under the names of the attributes."""
    names = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>10}" for name in names)]
    lines += [f"{row:<{width}}" + "".join(f"{shares[name]:>10.3f}" for name in names) for row, shares in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
