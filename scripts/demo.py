"""Makes pictures from the command line: a prompt, and perhaps a picture to start from -> PNG files.

    python scripts/demo.py "a lighthouse at night"
    python scripts/demo.py "an astronaut" --checkpoint data/v1-5-pruned-emaonly.safetensors --steps 30 --seed 7
    python scripts/demo.py "a watercolour" --image photo.jpg --strength 0.6 --out watercolour.png
    python scripts/demo.py "a red hat" --image photo.jpg --mask mask.png --feather 8
    python scripts/demo.py "a {red|blue} house" "a white tent" --n 3 --grid
    python scripts/demo.py "a yellow balloon" --film balloon.webp --report balloon.html

Every prompt is drawn with every seed, and {red|blue} in a prompt makes it two prompts. Every picture carries its
prompt and settings; an existing file is never overwritten unless --overwrite says so.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from sd.models import Models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.captions import DTYPES, command, details, grid, parameters
from scripts.support.command_line import Parser, import_torch
from scripts.support.output_files import candidates, check_free, first_path, save

TINY_PROMPT = "a red lighthouse by the sea at sunset, on the right, with the sun"
PROMPT = "a photograph of an astronaut riding a horse"

MAX_PICTURES = 10_000

# What `generate` calls its arguments, and what they are called here.
FLAGS = {
    "uncond_prompt": "--negative",
    "input_image": "--image",
    "mask_image": "--mask",
    "feather": "--feather",
    "strength": "--strength",
    "n_inference_steps": "--steps",
    "cfg_scale": "--cfg-scale",
    "sampler_name": "--sampler",
    "deep_cache": "--deep-cache",
    "seed": "--seed",
    "width": "--width",
    "height": "--height",
    "device": "--device",
    "prediction_type": "--prediction-type",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("demo.py", __doc__)
    add = parser.add_argument
    add(
        "prompts",
        nargs="*",
        metavar="prompt",
        help=f'what to draw (default: "{TINY_PROMPT}"; with --checkpoint "{PROMPT}")',
    )
    add("--world", action="store_true", help="say what the tiny model can draw, and stop")
    add("--negative", default="", metavar="TEXT", help="what the picture should not show")
    add("--image", type=Path, metavar="FILE", help="a picture to start from, cropped to the shape that is drawn")
    add("--mask", type=Path, metavar="FILE", help="where to repaint --image: white is painted, black stays")
    add("--feather", type=float, metavar="PIXELS", help="softens the edges of --mask (0)")
    add("--strength", type=float, metavar="S", help="how much of --image may change, up to 1 (0.8)")
    add("--steps", type=int, metavar="N", help="sampling steps (default: the sampler's own)")
    add("--cfg-scale", type=float, metavar="S", help="how closely to follow the prompt, 1 to 14 (7.5; tiny model: 5)")
    add("--sampler", metavar="NAME", help="sampling algorithm (dpm++2m)")
    add("--deep-cache", type=int, default=1, metavar="N", help="2 or 3: faster, and a slightly different picture (1)")
    add("--seed", type=int, metavar="N", help="makes the picture repeatable; picture i of --n has seed + i - 1")
    add("--n", type=int, default=1, metavar="N", help="how many pictures of each prompt (1)")
    add("--grid", action="store_true", help="also one sheet of all the pictures, with labels")
    add("--film", type=Path, metavar="FILE", help="also a .webp or .gif file for each picture, of how it comes to be")
    add("--report", type=Path, metavar="FILE", help="also a .html page for each picture, of how it came to be")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add("--checkpoint", type=Path, metavar="PATH", help="Stable Diffusion 1.x weights (default: the tiny model)")
    add("--vae", type=Path, metavar="PATH", help="a VAE to use instead of the checkpoint's own")
    add("--prediction-type", metavar="TYPE", help="epsilon or v_prediction, for files that do not say it (epsilon)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", choices=DTYPES, help="precision (default: the fastest without a visible loss)")
    add("--out", type=Path, metavar="PATH", help="a .png file or a folder (default: picture.png or the next free name)")
    add("--overwrite", action="store_true", help="let --out, --film and --report replace the very file they name")
    options = parser.parse_intermixed_args(arguments)  # prompts may stand between the flags
    options.prompts = options.prompts or [PROMPT if options.checkpoint else TINY_PROMPT]
    return options


def main() -> int:
    options = parse()
    sys.stdout.reconfigure(errors="backslashreplace")  # names and prompts may have letters that the terminal has not
    warnings.showwarning = lambda message, *_: print(f"demo.py: {message}", file=sys.stderr)
    try:
        if options.world:
            from sd.training.world.vocabulary import describe

            print(describe())
        else:
            make_pictures(options)
    except KeyboardInterrupt:
        print("demo.py: interrupted; the pictures printed above are complete.", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print(f"demo.py: {with_flag(str(error))}", file=sys.stderr)
        return 2
    return 0


def make_pictures(options: argparse.Namespace) -> None:
    """Checks everything, loads the weights, and writes one picture after the other."""
    first = first_path(options.out, options.overwrite)
    check_files(options)
    import_torch()
    from sd import images  # not before: torch takes a second, and bad input should not have to wait
    from sd.inside.report import write_report
    from sd.prompts.alternatives import expand

    prompts = [prompt for text in options.prompts for prompt in expand(text)]
    seed = random.randrange(2**32) if options.seed is None else options.seed
    settings = checked_settings(options, prompts, seed)
    settings |= with_defaults(settings, load(options, prompts))
    note_crop(options, settings)
    names, films, reports = (candidates(path or first) for path in (first, options.film, options.report))
    pictures, texts = [], []  # of the grid

    def replaced(path: Path | None) -> Path | None:  # a file that was named, not one that only has the usual name
        return path if options.overwrite else None

    for prompt, i in itertools.product(prompts, range(options.n)):
        started = time.perf_counter()
        picture, frames, page = draw(options, prompt, settings, seed + i)
        text = parameters(options, prompt, settings, seed + i, picture.shape)
        path = save(images.write_png, names, replaced(options.out), picture, text)
        seconds = time.perf_counter() - started
        print(f"{path}  seed {seed + i}  {seconds:.1f} s" + (f"  {prompt}" if len(prompts) > 1 else ""))
        if options.film:
            print(f"{save(images.write_animation, films, replaced(options.film), frames)}  {len(frames)} frames")
        if options.report:
            print(f"{save(write_report, reports, replaced(options.report), page)}  {len(page) / 1e6:.1f} MB")
        if options.grid:
            pictures.append(picture)
            texts.append(text)
    if options.grid:
        sheet = grid(prompts, range(seed, seed + options.n), pictures)
        names = candidates(first.with_stem(f"{first.stem}-grid"))
        print(f"{save(images.write_png, names, None, sheet, texts[0])}  {len(pictures)} pictures")


def draw(
    options: argparse.Namespace, prompt: str, settings: dict, seed: int
) -> tuple[np.ndarray, list[np.ndarray], str]:
    """The picture, the frames of its film and the page of its report; the last two are empty if nobody wants them."""
    from sd import pipeline

    if not (options.film or options.report):
        return pipeline.generate(prompt, **settings, seed=seed), [], ""
    from sd.inside import film
    from sd.inside.recording import record
    from sd.inside.report import report
    from sd.inside.tracer import Tracer
    from sd.request import Request

    with Tracer(settings["models"], attention=bool(options.report)) as trace:
        more = {name: value for name, value in settings.items() if name != "models"}
        recording = record(Request(prompt, **more, seed=seed), settings["models"])
    frames = film.frames(recording)
    if not options.report:
        return recording.picture, frames, ""
    about = (options, prompt, settings, seed, recording.picture.shape)
    return recording.picture, frames, report(recording, frames, trace, details(*about), command(*about))


def checked_settings(options: argparse.Namespace, prompts: list[str], seed: int) -> dict:
    """The arguments of `generate` that all pictures share. Raises ValueError for what cannot be."""
    from sd import images
    from sd.request import Request

    settings = {
        "uncond_prompt": options.negative,
        "strength": 0.8 if options.strength is None else options.strength,
        "cfg_scale": options.cfg_scale,
        "sampler_name": options.sampler,
        "n_inference_steps": options.steps,
        "height": options.height,
        "width": options.width,
        "feather": options.feather or 0,
        "deep_cache": options.deep_cache,
    }
    for one in (seed, seed + options.n - 1):
        Request(prompts, **settings, seed=one).check()
    image = images.read_image(options.image) if options.image else None
    mask = images.read_mask_image(options.mask, image) if options.mask else None
    return settings | {"input_image": image, "mask_image": mask}


def with_defaults(settings: dict, models: Models) -> dict:
    """The models, and how they make pictures where the options do not say it: the report and the file will tell."""
    from sd.samplers import SAMPLERS

    usual, name = models.config.sampling, settings["sampler_name"]
    default_steps = SAMPLERS[name].default_steps if name else usual.steps
    return {
        "models": models,
        "sampler_name": name or usual.sampler,
        "n_inference_steps": settings["n_inference_steps"] or default_steps,
        "cfg_scale": usual.cfg_scale if settings["cfg_scale"] is None else settings["cfg_scale"],
    }


def load(options: argparse.Namespace, prompts: list[str]) -> Models:
    """The models that the options ask for, with a line about how long it took."""
    import torch

    from sd import model_loader

    started = time.perf_counter()
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    models = model_loader.load_models(
        options.checkpoint, options.device, dtype, vae=options.vae, prediction_type=options.prediction_type
    )
    if options.checkpoint is None:
        hint(" ".join(prompts))
    print(f"loaded in {time.perf_counter() - started:.1f} s on {models.device}", file=sys.stderr)
    return models


def note_crop(options: argparse.Namespace, settings: dict) -> None:
    """One line for those whose picture loses more than a twentieth."""
    if settings["input_image"] is None:
        return
    side, (width, height) = settings["models"].config.image_size, settings["input_image"].size
    wanted = (settings["width"] or side) / (settings["height"] or side)
    if min(wanted * height / width, width / height / wanted) < 0.95:
        size = f"{settings['width'] or side} x {settings['height'] or side}"
        print(
            f"demo.py: {options.image}, {width} x {height}, is cropped about its centre to the shape of {size}; "
            "--width and --height choose another.",
            file=sys.stderr,
        )


def hint(prompt: str) -> None:
    """One line for those who ask the tiny model for what it has never seen."""
    from sd.training.world.vocabulary import unknown_words

    if words := unknown_words(prompt):
        unknown = ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
        print(f"demo.py: the tiny model does not know {unknown}: see --world for what it does.", file=sys.stderr)


def check_files(options: argparse.Namespace) -> None:
    """Raises ValueError for what can be told without loading anything."""
    if not 1 <= options.n <= MAX_PICTURES:
        raise ValueError(f"--n should be from 1 to {MAX_PICTURES}, not {options.n}.")
    for flag, value in (("--mask", options.mask), ("--strength", options.strength)):
        if value is not None and not options.image:
            raise ValueError(f"--image should be given with {flag}: it is the picture to change.")
    if options.feather is not None and not options.mask:
        raise ValueError("--mask should be given with --feather: it has the edges to soften.")
    for flag, path in (("--image", options.image), ("--mask", options.mask)):
        if path is not None and not path.is_file():
            raise ValueError(f"{flag} should be a file: there is none at {path}.")
    for flag, path in (("--checkpoint", options.checkpoint), ("--vae", options.vae)):
        if path is not None and not path.exists():
            remedy = "; `python scripts/download.py` fetches the real weights" if flag == "--checkpoint" else ""
            raise ValueError(f"{flag} should be a file or a folder: there is none at {path}{remedy}.")
    if options.film:
        if options.film.suffix.lower() not in (".webp", ".gif"):
            raise ValueError(f"--film should be a .webp or .gif file, not {options.film}.")
        check_free("--film", options.film, options.overwrite)
    if options.report:
        if options.report.suffix.lower() != ".html":
            raise ValueError(f"--report should be a .html file, not {options.report}.")
        check_free("--report", options.report, options.overwrite)
        if options.deep_cache != 1:
            raise ValueError("--report should go without --deep-cache: it shows what every stage made of every step.")


def with_flag(message: str) -> str:
    """An error of `generate` with the argument under its name on the command line."""
    name, _, rest = message.partition(" ")
    return f"{FLAGS.get(name, name)} {rest}"


if __name__ == "__main__":
    sys.exit(main())
