"""What demo.py checks before it loads anything: flags that need each other, files that are missing or used twice."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.support.output_files import check_different_files, check_free

MAX_IMAGES = 10_000
FEATURES = {".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}  # suffix -> what Pillow calls it: not every build has all


def check_flags(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit together, and for files that are missing or cannot be written."""
    from PIL import features

    if not 1 <= options.n <= MAX_IMAGES:
        raise ValueError(f"--n should be from 1 to {MAX_IMAGES}, not {options.n}.")
    alpha = options.mask_from_alpha
    for flag, given in {"--mask": options.mask, "--strength": options.strength, "--mask-from-alpha": alpha}.items():
        if given is not None and given is not False and not options.image:
            raise ValueError(f"--image should be given with {flag}: it is the image to change.")
    if alpha and options.mask:
        raise ValueError("--mask-from-alpha should be given without --mask: it makes the mask of --image itself.")
    effects = {"--feather": options.feather, "--invert-mask": options.invert_mask, "--only-masked": options.only_masked}
    for flag, given in effects.items():
        if given is not None and given is not False and not (options.mask or alpha):
            raise ValueError(f"--mask should be given with {flag}, or --mask-from-alpha.")
    if options.padding is not None and not options.only_masked:
        raise ValueError("--only-masked should be given with --padding, which is the space around the mask.")
    files = {"--image": options.image, "--mask": options.mask, "--from": options.source}
    files["--prompts-file"] = options.prompts_file
    for flag, path in files.items():
        pipe = flag == "--prompts-file" and path is not None and path.is_fifo()  # as in <(sort prompts.txt)
        if path is not None and not path.is_file() and not pipe:
            raise ValueError(f"{flag} should be a file: there is none at {path}.")
    for flag, path in (("--checkpoint", options.checkpoint), ("--vae", options.vae)):
        if path is not None and not path.exists():
            remedy = "; `python scripts/download.py` fetches the real weights" if flag == "--checkpoint" else ""
            raise ValueError(f"{flag} should be a file or a folder: there is none at {path}{remedy}.")
    check_different_files(
        {**files, "--checkpoint": options.checkpoint, "--vae": options.vae},
        {"--out": Path(options.out) if options.out else None, "--film": options.film, "--report": options.report},
    )
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
        if options.deep_cache not in (None, 1):
            raise ValueError("--report should be used without --deep-cache: it shows every stage at every step.")
