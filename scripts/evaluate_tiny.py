"""Measure how well the tiny model, or one trained like it, follows its prompts: a table, and evaluation.json.

With --control, it measures instead how well lines are followed: following.json.

    python scripts/evaluate_tiny.py
    python scripts/evaluate_tiny.py --checkpoint runs/tiny/tiny.ckpt --out runs/tiny
    python scripts/evaluate_tiny.py --prompts 100 --kinds short two
    python scripts/evaluate_tiny.py --kinds full --cfg-scales 3 5 7.5 --samplers dpm++2m ddpm
    python scripts/evaluate_tiny.py --lora data/tiny-lcm.safetensors --samplers lcm --cfg-scales 1 --steps 4
    python scripts/evaluate_tiny.py --lora data/tiny-windmill.safetensors --kinds windmill
    python scripts/evaluate_tiny.py --control data/tiny-scribble.safetensors --prompts 200

A small network, the judge, says what each image shows. It comes with the code; --judge-steps trains another. For a
thing that is not in the toy world, such as a windmill, it is first trained further, which takes a few minutes. If the
checkpoint is in the folder of its training run, the encoders in text.state also measure how often an image matches its
own prompt better than all others. sd/training/README.md says what the kinds of prompts and the columns mean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, exit_status
from scripts.support.embeddings import split_word
from scripts.support.flags import with_flags
from scripts.support.output_files import make_folder, write_json

if TYPE_CHECKING:
    import numpy as np

    from sd.models import Models
    from sd.training.evaluation import Prompt
    from sd.training.judge import Judge, JudgeStage, Seen

JUDGE_PICTURES, TEST_PICTURES, TEST_RECONSTRUCTIONS = 40000, 2000, 500  # to train and to test the judge
TEST_SCENES, TEST_SEED = 500, 20_000_000  # renders to measure the VAE with; no model trains on them
JUDGE_FILE = Path(__file__).resolve().parent.parent / "tests" / "support" / "judge.safetensors"
KINDS = ("full", "short", "two", "twice", "relation", "none")
NEWCOMERS = ("windmill", "rocket")  # kinds of prompts for one thing that is not in the toy world
NEWCOMER_PICTURES, NEWCOMER_STEPS = 4000, 400  # to train the judge further
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
    add("--lora", type=Path, metavar="FILE", help="a LoRA for it")
    add("--embedding", metavar="FILE[:word]", help="an embedding of textual inversion for it")
    help = "a ControlNet for it: measure instead how well images follow outlines and scribbles of scenes"
    add("--control", type=Path, metavar="FILE", help=help)
    add("--out", type=Path, default=Path(FOLDER), metavar="DIR", help=f"folder for the results ({FOLDER})")
    add("--prompts", type=int, default=400, metavar="N", help="prompts of each kind, seen and held out (400)")
    add(
        "--kinds",
        nargs="+",
        default=KINDS,
        choices=(*KINDS, *NEWCOMERS),
        metavar="KIND",
        help=f"kinds of prompts ({', '.join(KINDS)}), or {' or '.join(NEWCOMERS)}",
    )
    add("--cfg-scales", type=float, nargs="+", metavar="S", help="guidance scales (the model's own; tiny model: 5)")
    add("--samplers", nargs="+", metavar="NAME", help="sampling algorithms (the model's own; tiny model: dpm++2m)")
    add("--steps", type=int, metavar="N", help="sampling steps (the model's own; tiny model: 20)")
    add("--deep-cache", type=int, default=1, metavar="N", help="recompute the deep stages every N steps (1)")
    add("--judge-steps", type=int, metavar="N", help="train another judge for N steps, if --out has none")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first available one)")
    options = parser.parse_args(arguments)
    for name in ("prompts", "judge_steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} should be at least 1, not {getattr(options, name)}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    interrupted = "interrupted; run the same command again: a trained judge is kept, the images are drawn again."
    work = follow if options.control else evaluate
    return exit_status("evaluate_tiny.py", lambda: work(options), interrupted)


def prepare(options: argparse.Namespace) -> Models:
    """Load the model, fill in missing options with its own sampling settings, and create the folder `out`.

    Raises ValueError or OSError for bad options, before the judge is trained or anything is drawn.
    """
    from sd import load_models
    from sd.adapters.textual_inversion import read_embedding

    check(options)
    loras = [options.lora] if options.lora else []
    embeddings = [read_embedding(*split_word(options.embedding))] if options.embedding else []
    models = load_models(options.checkpoint, options.device, loras=loras, embeddings=embeddings)
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
    """Load or train the judge, apply it to renders and to generated images, and write the results."""
    from tqdm import tqdm

    from sd.training import evaluation

    models = prepare(options)
    encoders = options.checkpoint and evaluation.load_encoders(options.checkpoint.parent / "text.state", models)
    judge = train_judge(options) if options.judge_steps else load_judge()
    calibration = judge_renders(judge)
    judges = {kind: newcomer_judge(options, kind, models, judge) for kind in NEWCOMERS if kind in options.kinds}
    if len(judges) == 1:  # in other prompts, too, it should know what does not belong there
        judge = next(iter(judges.values()))
    for kind, newer in judges.items():
        calibration |= judge_renders(newer, kind) | judge_renders(newer, kind, models)
    decibels = reconstruct_renders(options, models)

    rows, second, colours = {}, {}, {}
    runs = [
        (s, c, k, h) for s in options.samplers for c in options.cfg_scales for k in options.kinds for h in (False, True)
    ]
    for sampler, cfg_scale, kind, held_out in tqdm(runs, "drawing"):
        make_prompts = evaluation.newcomer_prompts if kind in NEWCOMERS else evaluation.make_prompts
        prompts = make_prompts(kind, options.prompts, held_out)
        texts = [prompt.text for prompt in prompts]
        images = evaluation.draw_prompts(models, texts, sampler, options.steps, cfg_scale, options.deep_cache)
        name = f"{kind}, {'held out' if held_out else 'seen'}"
        if len(options.samplers) * len(options.cfg_scales) > 1:
            name = f"{sampler}, scale {cfg_scale:g}: {name}"
        marks = [evaluation.marks(*pair) for pair in zip(prompts, judges.get(kind, judge).look(images))]
        rows[name] = evaluation.shares(marks)
        if kind in NEWCOMERS:
            colours[name] = by_colour(prompts, marks)
        if encoders and kind == "full":
            second[name] = evaluation.second_opinion(encoders, models.tokenizer, images, texts)

    counted = {f"{row} ({shares['right'][1]})": shares for row, shares in calibration.items()}
    print(table(counted, ("right",)), table(rows, (*evaluation.MARKS, "mean", "all")), sep="\n\n")
    low, high = evaluation.interval(0.95, options.prompts)
    print(f"\n{options.steps} steps. VAE: {decibels:.2f} dB. {options.prompts} prompts of each kind: the 95 % interval")
    print(f"of a share of .95 is {low:.3f} to {high:.3f}, and wider where not every prompt asks for it.")
    for name, each in colours.items():
        print(f"{name}, its colour is right: " + ", ".join(f"{colour} {n} of {of}" for colour, (n, of) in each.items()))
    for name, share in second.items():
        print(f"{name}: {share:.1%} of the images match their own prompt best, out of {options.prompts}.")
    result = {
        "checkpoint": str(options.checkpoint or "data/tiny.ckpt"),
        "lora": options.lora and str(options.lora),
        "embedding": options.embedding,
        "psnr": decibels,
        "prompts": options.prompts,
        "steps": options.steps,
        "judge": with_intervals(calibration),
        "accuracy": with_intervals(rows),
        "colours": colours,
        "retrieval": second,
    }
    write_json(options.out / "evaluation.json", result)


def by_colour(prompts: list[Prompt], marks: list[dict[str, bool]]) -> dict[str, tuple[int, int]]:
    """For each colour, how many images have the thing in it, out of how many that should."""
    right: dict[str, list[bool]] = {}
    for prompt, mark in zip(prompts, marks):
        right.setdefault(prompt.scene.colour, []).append(mark["colour"])
    return {colour: (sum(each), len(each)) for colour, each in sorted(right.items())}


def follow(options: argparse.Namespace) -> None:
    """Measure how well the ControlNet is followed, and write the results."""
    from sd.adapters.controlnet_files import load_controlnet
    from sd.training.evaluation import MARKS
    from sd.training.following import WITHIN, measure_following, measure_renders

    models = prepare(options)
    control, judge, size = load_controlnet(options.control, models), load_judge(), models.config.image_size
    rows = {
        f"renders of the same, {kind}, within {within} pixels": measure_renders(kind, options.prompts, size)
        for kind, within in WITHIN.items()
    }
    for sampler in options.samplers:
        for cfg_scale in options.cfg_scales:
            settings = (options.prompts, sampler, options.steps, cfg_scale)
            for kind, within in WITHIN.items():
                name = f"{kind}, within {within} pixels, {sampler}, {options.steps} steps, scale {cfg_scale:g}"
                rows[name] = measure_following(models, control, judge, kind, *settings)[0]
    print(table(rows, ("given", "found", *MARKS, "mean", "all")))
    print(f"\n{options.prompts} scenes. given: the share of the given lines that the pictures have. found: the share")
    print("of the pictures' edges that follow a line. The other columns are as without --control.")
    result = {
        "checkpoint": str(options.checkpoint or "data/tiny.ckpt"),
        "control": str(options.control),
        "lora": options.lora and str(options.lora),
        "scenes": options.prompts,
        "accuracy": with_intervals(rows),
    }
    write_json(options.out / "following.json", result)


def load_judge() -> Judge:
    from sd.training import judge

    return judge.load_judge(JUDGE_FILE)


def judge_renders(judge: Judge, newcomer: str | None = None, models: Models | None = None) -> dict[str, dict]:
    """The share of renders that the judge calls what they are, for those with none, one or two things as they should
    be, with two suns, with things of two colours, and with things that are not whole. With `newcomer`, about half of
    the things are of this kind; with `models`, their autoencoder has encoded and decoded them."""
    import torch

    from sd.images import from_uint8
    from sd.training.evaluation import called_right
    from sd.training.judge import JUDGE_SEED, category

    count = TEST_RECONSTRUCTIONS if models else TEST_PICTURES
    pixels, truths = judge_pictures(range(JUDGE_SEED - count, JUDGE_SEED), newcomer, models)
    seen = judge.look(from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    rows: dict[str, list[bool]] = {}
    for truth, one in zip(truths, seen):
        rows.setdefault(category(truth), []).append(called_right(truth, one))
    rows["all"] = [right for each in rows.values() for right in each]
    title = "reconstructions" if models else "renders"
    title += f" with a {newcomer}" if newcomer else ""
    return {f"{title}: {name}": {"right": (sum(each) / len(each), len(each))} for name, each in sorted(rows.items())}


def reconstruct_renders(options: argparse.Namespace, models: Models) -> float:
    """The mean PSNR of renders that the VAE encoded and decoded, in dB."""
    import torch

    from sd.training import evaluation
    from sd.training.data import load_scenes

    renders = load_scenes(options.out, TEST_SCENES, models.config.image_size, TEST_SEED, held_out=None)
    return evaluation.through_the_vae(models, renders.batch(torch.arange(TEST_SCENES)))[1]


def train_judge(options: argparse.Namespace) -> Judge:
    """Load the judge from `out`, or train it there first."""
    from sd.training.judge import JUDGE_SEED, JudgeStage, load_judge

    path = options.out / "judge.safetensors"
    if not path.exists():
        pictures = judge_pictures(range(JUDGE_SEED, JUDGE_SEED + JUDGE_PICTURES))
        train_judge_stage(JudgeStage(*pictures), path, options.judge_steps)
    return load_judge(path)


def newcomer_judge(options: argparse.Namespace, newcomer: str, models: Models, known: Judge) -> Judge:
    """Load the judge that also names a newcomer from `out`, or train the `known` one further there.

    Half of what it is shown was encoded and decoded by the models: that is how sharp a generated image can be at best.
    """
    import numpy as np

    from sd.training import judge
    from sd.training.record import weights_fingerprint

    fingerprint = weights_fingerprint(known, models.encoder, models.decoder)  # with others, it is another judge
    path = options.out / f"judge-{newcomer}-{fingerprint[:8]}.safetensors"
    if not path.exists():
        start, half = judge.JUDGE_SEED, NEWCOMER_PICTURES // 2
        sharp, true = judge_pictures(range(start, start + half), newcomer)
        soft, also_true = judge_pictures(range(start + half, start + 2 * half), newcomer, models)
        wider = known.with_kinds((newcomer,))
        stage = judge.JudgeStage(np.concatenate([sharp, soft]), true + also_true, wider)
        stage.batch_size = 32
        train_judge_stage(stage, path, NEWCOMER_STEPS)
    return judge.load_judge(path, (*judge.KINDS, newcomer))


def names_with(newcomer: str | None) -> tuple[str, ...]:
    """The names to choose from: a newcomer is there as often as all other things together. A tower without sails is in
    for windmills, because the judge should call it not whole."""
    from sd.training.world.scenes import THINGS

    if newcomer is None:
        return THINGS[1:]
    return (*THINGS[1:], *[newcomer] * len(THINGS[1:]), *["bare windmill"] * 2 * (newcomer == "windmill"))


def judge_pictures(
    seeds: range, newcomer: str | None = None, models: Models | None = None
) -> tuple[np.ndarray, list[Seen]]:
    """Images for the judge, uint8 (N, 64, 64, 3), and what they show. With `models`, their autoencoder has encoded and
    decoded them."""
    import numpy as np
    from tqdm import tqdm

    from sd.training.judge import SIDE, judge_picture

    size, names = models.config.image_size if models else SIDE, names_with(newcomer)
    drawn = (judge_picture(seed, size, names) for seed in tqdm(seeds, "drawing for the judge"))
    images, truths = zip(*((np.asarray(image), truth) for image, truth in drawn))
    pixels = np.stack(images)
    return (reconstructed(models, pixels) if models else pixels), list(truths)


def reconstructed(models: Models, pixels: np.ndarray) -> np.ndarray:
    """Images, uint8 (N, H, W, 3), encoded and decoded, and reduced to what the judge looks at, (N, 64, 64, 3)."""
    import torch

    from sd.images import from_uint8, to_uint8
    from sd.training.evaluation import through_the_vae
    from sd.training.judge import SIDE
    from sd.training.text import resize

    images = from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    small = resize(through_the_vae(models, images)[0], SIDE)
    return to_uint8(small).permute(0, 2, 3, 1).numpy()


def train_judge_stage(stage: JudgeStage, path: Path, steps: int) -> None:
    """Train a judge, and write it to `path`. Its state is beside it."""
    import torch
    from tqdm import tqdm

    from sd.checkpoints.files import write_checkpoint
    from sd.training.loop import Training

    stage.name = path.stem
    training = Training(stage, path.parent, torch.device("cpu"), minutes=0, steps=steps, seed=0)
    with tqdm(total=training.total, initial=training.step, desc=stage.name) as bar:
        training.run(lambda progress: bar.update(), save_every=60, pause=lambda: None)
    write_checkpoint(path, {name: t.half() for name, t in training.average["judge"].state_dict().items()})


def with_intervals(rows: dict[str, dict[str, tuple[float, int]]]) -> dict[str, dict[str, dict]]:
    """The same shares for a JSON file, each with its 95 % interval. Means and shares of pixels have none."""
    from sd.training.evaluation import interval

    def entry(name: str, share: float, count: int) -> dict:
        known = {} if name in ("mean", "given", "found") else {"interval": interval(share, count)}
        return {"share": share, "of": count} | known

    return {row: {name: entry(name, *pair) for name, pair in shares.items()} for row, shares in rows.items()}


def table(rows: dict[str, dict[str, tuple[float, int]]], columns: tuple[str, ...]) -> str:
    """The shares as a table in Markdown: a row for each kind of prompts, a column for each mark. "-" if no prompt of
    that kind asks for it."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, shares in rows.items():
        cells = [f"{shares[name][0]:.3f}".replace("0.", ".") if name in shares else "-" for name in columns]
        lines.append(f"| {row} | " + " | ".join(cell.replace("1.000", "1.00") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
