"""Makes images from the command line: a prompt, and perhaps an image to start from -> PNG files.

    python scripts/demo.py "a lighthouse at night"
    python scripts/demo.py "an astronaut" --checkpoint data/v1-5-pruned-emaonly.safetensors --steps 30 --seed 7
    python scripts/demo.py "a watercolour" --image photo.jpg --strength 0.6 --out watercolour.png
    python scripts/demo.py "a red hat" --image photo.jpg --mask mask.png --feather 8
    python scripts/demo.py "a {red|blue} house" "a white tent" --n 3 --grid
    python scripts/demo.py "a yellow balloon" --film balloon.webp --report balloon.html

Every prompt is drawn with every seed, and {red|blue} turns one prompt into two. The PNG contains the prompt and the
settings. Existing files are never overwritten, except with --overwrite.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from sd.models import Models
    from sd.request import Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.captions import DTYPES, command, details, grid, parameters
from scripts.support.command_line import Parser, demo_command, import_torch
from scripts.support.output_files import candidates, check_free, first_path, save

TINY_PROMPT = "a red lighthouse by the sea at sunset, on the right, with the sun"
PROMPT = "a photograph of an astronaut riding a horse"

MAX_IMAGES = 10_000

# The names of `generate`'s arguments -> the flags here.
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
    add("--world", action="store_true", help="list the words that the tiny model can draw, and stop")
    add("--negative", default="", metavar="TEXT", help="what the image should not show")
    add("--image", type=Path, metavar="FILE", help="an image to start from; it is cropped to --width and --height")
    add("--mask", type=Path, metavar="FILE", help="where to repaint --image: white is repainted, black stays")
    add("--feather", type=float, metavar="PIXELS", help="softens the edges of --mask (0)")
    add("--strength", type=float, metavar="S", help="how much of --image may change, up to 1 (0.8)")
    add("--steps", type=int, metavar="N", help="sampling steps (default: the sampler's own)")
    add("--cfg-scale", type=float, metavar="S", help="how closely to follow the prompt, 1 to 14 (7.5; tiny model: 5)")
    add("--sampler", metavar="NAME", help="sampling algorithm (dpm++2m)")
    add("--deep-cache", type=int, default=1, metavar="N", help="2 or 3: faster, and a slightly different image (1)")
    add("--seed", type=int, metavar="N", help="makes the image repeatable; image i of --n has seed + i - 1")
    add("--n", type=int, default=1, metavar="N", help="number of images for each prompt (1)")
    add("--grid", action="store_true", help="also write one sheet of all images, with labels")
    add("--film", type=Path, metavar="FILE", help="also write a .webp or .gif film of how each image forms")
    add("--report", type=Path, metavar="FILE", help="also write a .html report on how each image formed")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add("--checkpoint", type=Path, metavar="PATH", help="Stable Diffusion 1.x weights (default: the tiny model)")
    add("--vae", type=Path, metavar="PATH", help="a VAE to use instead of the checkpoint's own")
    add("--prediction-type", metavar="TYPE", help="epsilon or v_prediction, if the file does not say (epsilon)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first that is available)")
    add("--dtype", choices=DTYPES, help="precision (default: the fastest without a visible loss)")
    add("--out", type=Path, metavar="PATH", help="a .png file or a folder (default: picture.png or the next free name)")
    add("--overwrite", action="store_true", help="replace the files that --out, --film and --report name")
    options = parser.parse_intermixed_args(arguments)  # prompts may stand between the flags
    options.prompts = options.prompts or [PROMPT if options.checkpoint else TINY_PROMPT]
    return options


def main() -> int:
    options = parse()
    sys.stdout.reconfigure(errors="backslashreplace")  # names and prompts may have characters that the terminal lacks
    warnings.showwarning = lambda message, *_: print(f"{name()}: {message}", file=sys.stderr)
    try:
        if options.world:
            from sd.training.world.vocabulary import describe

            print(describe())
        else:
            make_images(options)
    except KeyboardInterrupt:
        print(f"{name()}: interrupted; the images printed above are complete.", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print(f"{name()}: {with_flag(str(error))}", file=sys.stderr)
        return 2
    return 0


def make_images(options: argparse.Namespace) -> None:
    """Checks everything, loads the weights, and writes one image after the other."""
    first = first_path(options.out, options.overwrite)
    check_files(options)
    import_torch()
    from sd import images  # not before: torch takes a second to import, and bad input should be reported at once
    from sd.inside.report import write_report
    from sd.prompts.alternatives import expand

    prompts = [prompt for text in options.prompts for prompt in expand(text)]
    request = make_request(options, prompts)
    models = load(options, prompts)
    request = with_defaults(request, models)
    note_crop(options, request)
    names, films, reports = (candidates(path or first) for path in (first, options.film, options.report))
    drawn, texts = [], []  # for the grid

    def replaced(path: Path | None) -> Path | None:  # only a file that the user named, never one with the default name
        return path if options.overwrite else None

    seeds = range(request.seed, request.seed + options.n)
    for prompt, seed in itertools.product(prompts, seeds):
        started = time.perf_counter()
        one = replace(request, prompt=prompt, seed=seed)
        image, frames, page = draw(options, one, models)
        text = parameters(options, one)
        path = save(images.write_png, names, replaced(options.out), image, text)
        seconds = time.perf_counter() - started
        print(f"{path}  seed {seed}  {seconds:.1f} s" + (f"  {prompt}" if len(prompts) > 1 else ""))
        if options.film:
            print(f"{save(images.write_animation, films, replaced(options.film), frames)}  {len(frames)} frames")
        if options.report:
            print(f"{save(write_report, reports, replaced(options.report), page)}  {len(page) / 1e6:.1f} MB")
        if options.grid:
            drawn.append(image)
            texts.append(text)
    if options.grid:
        sheet = grid(prompts, seeds, drawn)
        names = candidates(first.with_stem(f"{first.stem}-grid"))
        print(f"{save(images.write_png, names, None, sheet, texts[0])}  {len(drawn)} images")


def draw(options: argparse.Namespace, request: Request, models: Models) -> tuple[np.ndarray, list[np.ndarray], str]:
    """The image, the frames of its film and the page of its report; without these options, the last two are empty."""
    from sd import pipeline

    if not (options.film or options.report):
        return pipeline.draw(request, models)[0], [], ""
    from sd.inside import film
    from sd.inside.recording import record
    from sd.inside.report import report
    from sd.inside.tracer import Tracer

    with Tracer(models, attention=bool(options.report)) as trace:
        recording = record(request, models)
    frames = film.frames(recording)
    if not options.report:
        return recording.image, frames, ""
    page = report(recording, frames, trace, details(options, request, models), command(options, request, models))
    return recording.image, frames, page


def make_request(options: argparse.Namespace, prompts: list[str]) -> Request:
    """What all images share, with all prompts and the first seed. Raises ValueError as `Request.check` does."""
    from sd.request import Request

    request = Request(
        prompts,
        options.negative,
        input_image=options.image,
        mask_image=options.mask,
        strength=Request.strength if options.strength is None else options.strength,
        cfg_scale=options.cfg_scale,
        sampler_name=options.sampler,
        n_inference_steps=options.steps,
        seed=random.randrange(2**32) if options.seed is None else options.seed,
        height=options.height,
        width=options.width,
        feather=options.feather or 0,
        deep_cache=options.deep_cache,
    )
    request.check()
    replace(request, seed=request.seed + options.n - 1).check()
    return request.read_images()


def with_defaults(request: Request, models: Models) -> Request:
    """The request with the model's defaults filled in, for the report and the settings in the file."""
    from sd.samplers import SAMPLERS

    defaults, name, side = models.config.sampling, request.sampler_name, models.config.image_size
    default_steps = SAMPLERS[name].default_steps if name else defaults.steps
    return replace(
        request,
        sampler_name=name or defaults.sampler,
        n_inference_steps=request.n_inference_steps or default_steps,
        cfg_scale=defaults.cfg_scale if request.cfg_scale is None else request.cfg_scale,
        height=request.height or side,
        width=request.width or side,
    )


def load(options: argparse.Namespace, prompts: list[str]) -> Models:
    """Loads the models for the options, and prints how long that took."""
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


def note_crop(options: argparse.Namespace, request: Request) -> None:
    """Prints a line if cropping --image removes more than a twentieth of it."""
    if request.input_image is None:
        return
    width, height = request.input_image.size
    wanted = request.width / request.height
    if min(wanted * height / width, width / height / wanted) < 0.95:
        print(
            f"{name()}: {options.image}, {width} x {height}, is cropped around its centre to the shape of "
            f"{request.width} x {request.height}; --width and --height choose another.",
            file=sys.stderr,
        )


def hint(prompt: str) -> None:
    """Prints a line if the prompt has words that the tiny model was never trained on."""
    from sd.training.world.vocabulary import unknown_words

    if words := unknown_words(prompt):
        unknown = ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
        print(f"{name()}: the tiny model was not trained on {unknown}: --world lists its words.", file=sys.stderr)


def check_files(options: argparse.Namespace) -> None:
    """Raises ValueError for what can be checked without loading anything."""
    if not 1 <= options.n <= MAX_IMAGES:
        raise ValueError(f"--n should be from 1 to {MAX_IMAGES}, not {options.n}.")
    for flag, value in (("--mask", options.mask), ("--strength", options.strength)):
        if value is not None and not options.image:
            raise ValueError(f"--image should be given with {flag}: it is the image to change.")
    if options.feather is not None and not options.mask:
        raise ValueError("--mask should be given with --feather, which softens its edges.")
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
            raise ValueError("--report should be used without --deep-cache: it shows every stage at every step.")


def name() -> str:
    """What was started, as errors call it: demo.py, or the command sd."""
    return Path(demo_command()[-1]).name


def with_flag(message: str) -> str:
    """An error message of `generate`, with the flag in place of the argument's name."""
    name, _, rest = message.partition(" ")
    return f"{FLAGS.get(name, name)} {rest}"


if __name__ == "__main__":
    sys.exit(main())
