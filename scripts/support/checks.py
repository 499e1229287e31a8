"""What demo.py says about its options: errors before it loads anything, and notes before it draws."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.support.command_line import say
from scripts.support.control import check_control
from scripts.support.embeddings import check_embeddings
from scripts.support.loras import given_loras
from scripts.support.output_files import check_different_files, check_free

if TYPE_CHECKING:
    from sd.models import Models
    from sd.request import Request

MAX_IMAGES = 10_000
# As `sd.checkpoints.hub` has them, whose import takes torch's second.
WEIGHT_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:@]+))?(:(?P<file>[^:]+))?")
FEATURES = {".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}  # what Pillow calls the formats that some builds lack
FAR_ABOVE = 2  # times the pixels that the model was trained on


def check_flags(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit together, and for files that are missing or cannot be written."""
    from PIL import features

    if not 1 <= options.n <= MAX_IMAGES:
        raise ValueError(f"--n should be from 1 to {MAX_IMAGES}, not {options.n}.")
    _check_pairs(options)
    check_control(options)
    check_embeddings(options)
    files = {"--image": options.image, "--mask": options.mask, "--from": options.source}
    files["--prompts-file"] = options.prompts_file
    for flag, path in files.items():
        pipe = flag == "--prompts-file" and path is not None and path.is_fifo()  # as in <(sort prompts.txt)
        if path is not None and not path.is_file() and not pipe:
            raise ValueError(f"{flag} should be a file: there is none at {path}.")
    for flag, path in [
        ("--checkpoint", options.checkpoint),
        ("--vae", options.vae),
        ("--preview", options.preview),
        *(("--control", path) for path in options.control or []),
    ]:
        if path is not None and not path.exists() and not may_be_on_hub(path):
            remedy = "; `sh scripts/download.sh` fetches the real weights" if flag == "--checkpoint" else ""
            raise ValueError(f"{flag} should be a file or a folder: there is none at {path}{remedy}.")
    loras = {f"--lora {path}": path for path, _, _ in given_loras(options)}
    read = {**files, "--checkpoint": options.checkpoint, "--vae": options.vae, "--preview": options.preview, **loras}
    written = {"--out": Path(options.out) if options.out else None, "--film": options.film, "--report": options.report}
    check_different_files(read, written)
    for control, image in zip(options.control or [], options.control_image or []):
        check_different_files({"--control": control, "--control-image": image}, written)
    for flag, path in (("--out", Path(options.out or "")), ("--film", options.film or Path())):
        if path.suffix.lower() in FEATURES and not features.check(FEATURES[path.suffix.lower()]):
            raise ValueError(f"{flag} should have another suffix, not {path.suffix}: this Pillow cannot write it.")
    if options.film:
        if options.film.suffix.lower() not in (".webp", ".gif"):
            raise ValueError(f"--film should be a .webp or .gif file, not {options.film}.")
        check_free("--film", options.film, options.overwrite)
    if options.report:
        if options.report.suffix.lower() != ".html":
            raise ValueError(f"--report should be a .html file, not {options.report}.")
        check_free("--report", options.report, options.overwrite)


def may_be_on_hub(path: Path) -> bool:
    """Whether this could be a model's name on the hub, owner/name. `load_models` decides: it needs torch."""
    match = HUB_NAME.fullmatch(path.as_posix())
    return match is not None and (match["file"] is not None or path.suffix.lower() not in WEIGHT_SUFFIXES)


def _check_pairs(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that need or exclude each other."""
    has_mask = options.mask or options.mask_from_alpha
    has_strength, has_feather, has_padding = (
        value is not None for value in (options.strength, options.feather, options.padding)
    )
    of_image = {"--mask": options.mask, "--strength": has_strength, "--mask-from-alpha": options.mask_from_alpha}
    for flag, given in of_image.items():
        if given and not options.image:
            raise ValueError(f"--image should be given with {flag}: it is the image to change.")
    if options.mask_from_alpha and options.mask:
        raise ValueError("--mask-from-alpha should be given without --mask: it makes the mask from --image itself.")
    of_mask = {"--feather": has_feather, "--invert-mask": options.invert_mask, "--only-masked": options.only_masked}
    for flag, given in of_mask.items():
        if given and not has_mask:
            raise ValueError(f"--mask or --mask-from-alpha should be given with {flag}.")
    if has_padding and not options.only_masked:
        raise ValueError("--only-masked should be given with --padding, which is the space around the mask.")
    if options.preview and not (options.film or options.report):
        raise ValueError("--film or --report should be given with --preview, which draws their images of every step.")
    if (options.hires_strength is not None or options.hires_latents) and options.hires is None:
        raise ValueError("--hires should be given with --hires-strength and --hires-latents: it is the second pass.")
    if options.hires is not None and (options.film or options.report):
        raise ValueError("--film and --report should be used without --hires: they show one pass.")
    if options.report and options.deep_cache not in (None, 1):
        raise ValueError("--report should be used without --deep-cache: it shows every stage at every step.")


def note_unquoted(prompts: list[str]) -> None:
    """For several prompts of one word each: quotes may be missing."""
    if len(prompts) > 1 and all(prompt and len(prompt.split()) == 1 for prompt in prompts):
        one = " ".join(prompts)
        say(f'{len(prompts)} prompts were given, and each is drawn. For a single prompt, add quotes: "{one}".')


def note_unknown_words(prompts: list[str], embedded: Iterable[str] = (), models: Models | None = None) -> None:
    """For words that the tiny model was never trained on, except those of embeddings and LoRAs."""
    from sd.prompts.added_words import any_of
    from sd.prompts.other_tools import without_notation
    from sd.training.world.vocabulary import unknown_words

    text = without_notation(" ".join(prompts))
    added = [*embedded, *getattr(models and models.tokenizer, "added", ())]
    if words := unknown_words(any_of(added).sub(" ", text.lower()), models):
        unknown = ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
        say(f"the tiny model was not trained on {unknown}: --world lists the main words.")


def note_crop(options: argparse.Namespace, request: Request) -> None:
    """If cropping --image removes more than a twentieth of it."""
    if request.input_image is None or request.padding_mask_crop is not None:
        return
    width, height = request.input_image.size
    wanted = request.width / request.height
    if min(wanted * height / width, width / height / wanted) < 0.95:
        say(
            f"{options.image}, {width} x {height}, is cropped around its centre to the shape of "
            f"{request.width} x {request.height}; --width and --height choose another."
        )


def note_size(request: Request, models: Models) -> None:
    """If the image is far larger than those that the model was trained on."""
    side = models.config.image_size
    times = request.width * request.height / side**2
    if times > FAR_ABOVE:
        say(
            f"{request.width} x {request.height} is {times:.3g} times the {side} x {side} pixels that the model was "
            f"trained on: expect repeated objects, and steps that take at least {times:.3g} times as long."
        )
