"""Makes images from the command line: a prompt, and perhaps an image to start from -> PNG, JPEG or WebP files.

    python scripts/demo.py "a lighthouse at night"
    python scripts/demo.py "a red house" --fast
    python scripts/demo.py "an astronaut" --checkpoint data/v1-5-pruned-emaonly.safetensors --steps 30 --seed 7
    python scripts/demo.py "a watercolour" --image photo.jpg --strength 0.6 --out watercolour.png
    python scripts/demo.py "a portrait <lora:style:0.8>" --lora detail.safetensors:0.5
    python scripts/demo.py "a red hat" --image photo.jpg --mask mask.png --feather 8
    python scripts/demo.py "a glass cat" --checkpoint sd15.ckpt --control canny.pth --control-image edges.png
    python scripts/demo.py "a {red|blue} house" "a white tent" --n 3 --grid
    python scripts/demo.py "a yellow balloon" --film balloon.webp --report balloon.html
    python scripts/demo.py --from picture.png --seed -1 --n 4

Every prompt is drawn with every seed, and {red|blue} turns one prompt into two. The file contains the prompt and the
settings, and --from uses them. Existing files are never overwritten, except with --overwrite.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from PIL import Image
    from torch import nn

    from scripts.support.loras import Lora
    from sd.inside.recording import Recording
    from sd.inside.tracer import Tracer
    from sd.models import Models
    from sd.request import Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.captions import DTYPES, command, details, grid
from scripts.support.checks import check_flags, note_crop, note_size, note_unknown_words, note_unquoted
from scripts.support.command_line import Once, Parser, demo_name, import_torch, run, say
from scripts.support.control import add_control_flags, controls, ready
from scripts.support.defaults import with_defaults
from scripts.support.embeddings import add_named, embeddings
from scripts.support.fast import use_fast
from scripts.support.flags import with_flags
from scripts.support.loras import hash_notes, titles
from scripts.support.output_files import candidates, first_path, save
from scripts.support.prompts import all_prompts
from scripts.support.saved_settings import parameters, use_saved

TINY_PROMPT = "a red lighthouse by the sea at sunset, on the right, with the sun"
PROMPT = "a photograph of an astronaut riding a horse"
PADDING = 32  # pixels, as in the AUTOMATIC1111 web UI


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("demo.py", __doc__, add_help=False)
    add = parser.add_argument
    add("--help", action="help", help="show this message and stop (also: -h)")
    add(
        "prompts",
        nargs="*",
        metavar="prompt",
        help=f'what to draw (default: "{TINY_PROMPT}"; with --checkpoint "{PROMPT}")',
    )
    help = "more prompts, one a line; lines that begin with # are ignored"
    add("--prompts-file", type=Path, metavar="FILE", help=help)
    help = "use the prompt and settings saved in a picture, also by the AUTOMATIC1111 web UI; flags override them"
    add("--from", type=Path, metavar="FILE", dest="source", help=help)
    add("--world", action="store_true", help="list the words that the tiny model can draw, and stop")
    add("--negative", metavar="TEXT", help="what the image should not show")
    add("--image", type=Path, metavar="FILE", help="an image to start from; it is never stretched")
    add("--mask", type=Path, metavar="FILE", help="where to repaint --image: white is repainted, black stays")
    add("--mask-from-alpha", action="store_true", help="repaint --image where it is transparent (erased)")
    add("--invert-mask", action="store_true", help="swap black and white in the mask")
    help = "repaint only the part of --image around the mask, enlarged to the model's size, and paste it back"
    add("--only-masked", action="store_true", help=help)
    add("--padding", type=int, metavar="PIXELS", help="how much --only-masked includes around the mask (32)")
    add("--feather", type=float, metavar="PIXELS", help="softens the edges of --mask (0)")
    add("--strength", type=float, metavar="S", help="how much of --image may change, up to 1 (0.8)")
    add("--fast", action="store_true", help="draw with the tiny model in 4 steps instead of 20; 1, 2 or 8 by --steps")
    add("--steps", type=int, metavar="N", help="sampling steps (default: the sampler's own)")
    add("--cfg-scale", type=float, metavar="S", help="how closely to follow the prompt, 1 to 14 (7.5; tiny model: 5)")
    help = "the part of the run that follows the prompt that closely; other steps take half the time (0 1)"
    add("--cfg-interval", type=float, nargs=2, metavar=("FROM", "TO"), help=help)
    add("--sampler", metavar="NAME", help="sampling algorithm (dpm++2m)")
    help = "trailing, leading or linspace: the sampler's timesteps; trailing for models and LoRAs of few steps"
    add("--spacing", metavar="NAME", help=help)
    add("--deep-cache", type=int, metavar="N", help="2 or 3: faster, and a slightly different image (1)")
    add("--clip-skip", type=int, metavar="N", help="2: without the text encoder's last layer; as web UIs count (1)")
    help = "other weights on the U-Net's way up; 1.5 1.6 0.9 0.2 for SD 1.5, 1.4 1.6 0.9 0.2 for SD 2.1"
    add("--freeu", type=float, nargs=4, metavar=("B1", "B2", "S1", "S2"), help=help)
    help = "draw, enlarge by this factor, and draw on: for images larger than the model's size"
    add("--hires", type=float, metavar="SCALE", help=help)
    add("--hires-strength", type=float, metavar="S", help="how much the second pass may change, up to 1 (0.6)")
    add("--hires-latents", action="store_true", help="enlarge the latents instead of the image")
    add("--seed", type=int, metavar="N", help="makes an image repeatable; image i of --n has seed + i - 1 (-1: random)")
    add("--n", type=int, default=1, metavar="N", help="number of images for each prompt (1)")
    add("--grid", action="store_true", help="also write one sheet of all images, with labels")
    add("--film", type=Path, action=Once, metavar="FILE", help="also write a .webp or .gif film of each image")
    add("--report", type=Path, action=Once, metavar="FILE", help="also write a .html report on each image")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own, in --image's shape)")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8 (default: the same)")
    add(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="Stable Diffusion 1.x or 2.x: a file, a folder or owner/name on the hub",
    )
    add("--vae", type=Path, metavar="PATH", help="a VAE, or a TAESD, instead of the checkpoint's own")
    help = "a LoRA, its strength (1), and that for the text encoder (the same); repeatable. In a prompt, "
    help += "<lora:name:0.8> takes it from data/loras"
    add("--lora", action="append", metavar="FILE[:S[:S]]", help=help)
    add_control_flags(add)
    help = "a tiny autoencoder (TAESD) that decodes every step for --film and --report"
    add("--preview", type=Path, metavar="PATH", help=help)
    help = "an embedding of textual inversion, with the word that stands for it (the file's name); repeatable"
    add("--embedding", action="append", metavar="FILE[:word]", help=help)
    parser.set_defaults(embedded={}, saved_embeddings={})
    add("--prediction-type", metavar="TYPE", help="epsilon or v_prediction, if the file does not say (epsilon)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first that is available)")
    add("--dtype", choices=DTYPES, help="precision (default: the fastest without a visible loss)")
    help = "a .png, .jpg or .webp file, or a folder (default: picture.png or the next free name)"
    add("--out", action=Once, metavar="PATH", help=help)
    add("--overwrite", action="store_true", help="replace the files that --out, --film and --report name")
    arguments = sys.argv[1:] if arguments is None else arguments
    dashes = arguments.index("--") if "--" in arguments else len(arguments)
    # argparse would also find -h in the prompt "-hat on a table".
    flags = ["--help" if word == "-h" else word for word in arguments[:dashes]]
    options = parser.parse_intermixed_args(flags)  # prompts may stand between the flags
    options.prompts += arguments[dashes + 1 :]  # argparse would look for flags among them, too
    if not (options.prompts or options.prompts_file or options.source):
        options.prompts = [PROMPT if options.checkpoint else TINY_PROMPT]
    return options


def main() -> int:
    options = parse()
    said = set()

    def show(message: Warning, *_: object) -> None:
        """Prints a warning once, although the images are checked here and again by the pipeline."""
        line = with_flags(str(message))
        if options.invert_mask:
            line = line.replace("add --invert-mask", "leave out --invert-mask")
        if line not in said:
            said.add(line)
            say(line)

    warnings.showwarning = show
    interrupted = "interrupted; the images printed above are complete."
    return run(demo_name(), lambda: work(options), interrupted, lambda error: with_flags(str(error)))


def work(options: argparse.Namespace) -> int:
    """Does what the options say. Returns the exit status."""
    if not options.world:
        return make_images(options)
    from sd.training.world.vocabulary import describe

    print(describe())
    return 0


def make_images(options: argparse.Namespace) -> int:
    """Checks everything, loads the weights, and writes one image after the other.

    Returns the exit status: 2 if a grid, film or report could not be made. The images are complete all the same.
    """
    use_fast(options)
    check_flags(options)
    first = first_path(options.out, options.overwrite)
    import_torch()
    from sd import images  # not before: torch takes a second to import, and bad input should be reported at once

    prompts, loras, request, lines = read_options(options)
    models, more = add_named(options, request, load(options, loras))
    request = ready(options, with_defaults(request, models), models)
    preview = load_preview(options, models)
    note_unquoted(options.prompts)
    for line in lines + more:
        say(line)
    if options.checkpoint is None:
        note_unknown_words(prompts, options.embedded, models)
    note_crop(options, request)
    note_size(request, models)
    names, films, reports = (candidates(path or first) for path in (first, options.film, options.report))
    drawn, texts = [], []  # for the grid
    complete = True
    seeds, titled = range(request.seed, request.seed + options.n), titles(prompts, loras)
    for (prompt, used, title), seed in itertools.product(zip(prompts, loras, titled), seeds):
        started = time.perf_counter()
        models = models if models.loras == used else models.with_loras(used)
        one = replace(request, prompt=prompt, seed=seed)
        text = parameters(options, one, used)
        image, recording, trace = draw(options, one, models, preview)
        path = save(images.write_image, names, replaced(options, options.out), image, text)
        seconds = time.perf_counter() - started
        print(f"{path}  seed {seed}  {seconds:.1f} s" + (f"  {title}" if len(prompts) > 1 else ""))
        if recording:
            complete &= write_extras(options, one, models, recording, trace, films, reports)
        if options.grid:
            drawn.append(image)
            texts.append(text)

    def write_grid() -> None:
        sheet = grid(titled, seeds, drawn)
        names = candidates(first.with_stem(f"{first.stem}-grid"))
        print(f"{save(images.write_image, names, None, sheet, texts[0])}  {len(drawn)} images")

    if options.grid:
        complete &= attempt("grid", write_grid)
    return 0 if complete else 2


def replaced(options: argparse.Namespace, path: str | Path | None) -> Path | None:
    """The file that may be replaced: only one that the user named, never one with the default name."""
    return Path(path) if path and options.overwrite else None


def draw(
    options: argparse.Namespace, request: Request, models: Models, preview: nn.Module | None = None
) -> tuple[np.ndarray, Recording | None, Tracer | None]:
    """The image, and for --film and --report what was recorded while it was drawn."""
    from sd import pipeline

    if not (options.film or options.report):
        return pipeline.draw(request, models)[0], None, None
    from sd.inside.recording import record
    from sd.inside.tracer import Tracer

    with Tracer(models, attention=bool(options.report)) as trace:
        recording = record(request, models, preview)
    return recording.image, recording, trace


def write_extras(
    options: argparse.Namespace,
    request: Request,
    models: Models,
    recording: Recording,
    trace: Tracer,
    films: Iterator[Path],
    reports: Iterator[Path],
) -> bool:
    """Writes the film and the report of an image, if they were asked for. Returns False if one of them failed."""
    from sd import images
    from sd.inside import film
    from sd.inside.report import report, write_report

    frames = cache(lambda: film.frames(recording))  # made once, for both

    def write_film() -> None:
        path = save(images.write_animation, films, replaced(options, options.film), frames())
        print(f"{path}  {frame_count(path)} frames")

    def write_page() -> None:
        texts = details(options, request, models), command(options, request, models)
        page = report(recording, frames(), trace, *texts)
        path = save(write_report, reports, replaced(options, options.report), page)
        print(f"{path}  {len(page) / 1e6:.1f} MB")

    complete = True
    if options.film:
        complete &= attempt("film", write_film)
    if options.report:
        complete &= attempt("report", write_page)
    return complete


def frame_count(film: Path) -> int:
    """The number of frames in a film's file, which stores equal neighbours as one frame."""
    from PIL import Image

    with Image.open(film) as file:
        return file.n_frames


def attempt(what: str, write: Callable[[], None]) -> bool:
    """Calls `write`. If it fails, prints one line and returns False: other images may still be to draw."""
    try:
        write()
    except Exception as error:
        known = isinstance(error, (ValueError, OSError, MemoryError))
        say(f"no {what}: {with_flags(str(error)) if known else f'{type(error).__name__}: {error}'}")
        return False
    return True


def read_options(options: argparse.Namespace) -> tuple[list[str], list[tuple[Lora, ...]], Request, list[str]]:
    """All prompts, the LoRAs of each, the request for all of them, with the first seed, and sentences for the user.

    Raises ValueError as `Request.check` does.
    """
    from sd.images import fill_transparent
    from sd.request import Request

    lines = use_saved(options) if options.source else []
    padding = PADDING if options.padding is None else options.padding
    prompts, loras, notes = all_prompts(options)
    if options.source:
        lines += hash_notes(itertools.chain(*loras), options.lora_hashes, options.source)
    erased = options.mask_from_alpha and not options.invert_mask  # otherwise what is transparent stays: on white
    request = Request(
        prompts,
        options.negative,
        input_image=fill_transparent(options.image) if erased else options.image,
        mask_image=read_mask(options),
        strength=Request.strength if options.strength is None else options.strength,
        cfg_scale=options.cfg_scale,
        cfg_interval=options.cfg_interval,
        sampler_name=options.sampler,
        n_inference_steps=options.steps,
        timestep_spacing=options.spacing,
        seed=random.randrange(2**32) if options.seed in (None, -1) else options.seed,
        height=options.height,
        width=options.width,
        feather=options.feather or 0,
        padding_mask_crop=padding if options.only_masked else None,
        deep_cache=1 if options.deep_cache is None else options.deep_cache,
        control=controls(options),
        clip_skip=1 if options.clip_skip is None else options.clip_skip,
        freeu=options.freeu,
        hires_scale=1 if options.hires is None else options.hires,
        hires_strength=Request.hires_strength if options.hires_strength is None else options.hires_strength,
        hires_latents=options.hires_latents,
    )
    request.check()
    replace(request, seed=request.seed + options.n - 1).check()
    return prompts, loras, request.read_images(), lines + notes


def read_mask(options: argparse.Namespace) -> Path | Image.Image | None:
    """The mask that --mask, --mask-from-alpha and --invert-mask give."""
    from PIL import ImageOps

    from sd.images import alpha_mask, read_mask_image

    mask = alpha_mask(options.image) if options.mask_from_alpha else options.mask
    return ImageOps.invert(read_mask_image(mask)) if options.invert_mask else mask


def load(options: argparse.Namespace, loras: list[tuple[Lora, ...]]) -> Models:
    """Loads the models for the options, with the LoRAs of the first prompt, and prints how long that took. Those of the
    other prompts are only checked."""
    import torch

    from sd import model_loader
    from sd.adapters.lora_files import check_loras

    started = time.perf_counter()
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    models = model_loader.load_models(
        options.checkpoint,
        options.device,
        dtype,
        vae=options.vae,
        prediction_type=options.prediction_type,
        loras=loras[0],
        embeddings=embeddings(options),
    )
    check_loras({lora for used in loras[1:] for lora in used if lora not in loras[0]}, models.config)
    print(f"loaded in {time.perf_counter() - started:.1f} s on {models.device}", file=sys.stderr)
    return models


def load_preview(options: argparse.Namespace, models: Models) -> nn.Module | None:
    """The decoder of --preview."""
    if options.preview is None:
        return None
    from sd.adapters.tiny_autoencoder import load_tiny_autoencoder

    return load_tiny_autoencoder(options.preview, models.device, argument="--preview")["decoder"]


if __name__ == "__main__":
    sys.exit(main())
