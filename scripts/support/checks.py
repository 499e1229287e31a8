"""What demo.py checks before it loads anything: flags that need each other, files that are missing or used twice."""

from __future__ import annotations

import argparse
import os
from itertools import combinations
from pathlib import Path

from scripts.support.output_files import check_free

MAX_IMAGES = 10_000


def check_flags(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit together, and for files that are missing or cannot be written."""
    if not 1 <= options.n <= MAX_IMAGES:
        raise ValueError(f"--n should be from 1 to {MAX_IMAGES}, not {options.n}.")
    for flag, value in (("--mask", options.mask), ("--strength", options.strength)):
        if value is not None and not options.image:
            raise ValueError(f"--image should be given with {flag}: it is the image to change.")
    if options.feather is not None and not options.mask:
        raise ValueError("--mask should be given with --feather, which softens its edges.")
    files = {"--image": options.image, "--mask": options.mask, "--from": options.source}
    files["--prompts-file"] = options.prompts_file
    for flag, path in files.items():
        if path is not None and not path.is_file():
            raise ValueError(f"{flag} should be a file: there is none at {path}.")
    for flag, path in (("--checkpoint", options.checkpoint), ("--vae", options.vae)):
        if path is not None and not path.exists():
            remedy = "; `python scripts/download.py` fetches the real weights" if flag == "--checkpoint" else ""
            raise ValueError(f"{flag} should be a file or a folder: there is none at {path}{remedy}.")
    check_different_files(
        {**files, "--checkpoint": options.checkpoint, "--vae": options.vae},
        {"--out": options.out and Path(options.out), "--film": options.film, "--report": options.report},
    )
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


def check_different_files(read: dict[str, Path | None], written: dict[str, Path | None]) -> None:
    """Raises ValueError if a file that is to be written is also read, or written twice. Folders do not count."""
    outputs = [(flag, path) for flag, path in written.items() if path is not None and not path.is_dir()]
    inputs = [(flag, path) for flag, path in read.items() if path is not None and not path.is_dir()]
    pairs = [*((other, one) for one in outputs for other in inputs), *combinations(outputs, 2)]
    for (flag, path), (other_flag, other) in pairs:
        if same_file(path, other):
            raise ValueError(f"{other_flag} should be another file than {flag}, not {other} for both.")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, also through links. A file that does not exist yet is compared by its name,
    without regard to case, as some systems do."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one).casefold() == os.path.realpath(other).casefold()
