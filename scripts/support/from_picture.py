"""`--from FILE`: options that were not given are taken from the settings in a picture."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from scripts.support.captions import SAMPLER_NAMES, model_name
from scripts.support.saved_settings import read

MAX_NAMES = 8  # of settings, in the sentence that lists those without use
PLAIN_SCHEDULES = ("Automatic", "Uniform", "Normal")


def fill(options: argparse.Namespace) -> list[str]:
    """Fills in the options, and returns sentences about what the picture has and this tool does not use.

    Raises ValueError or OSError if the file has no settings, or one that cannot be read.
    """
    path, saved = options.source, read(options.source)
    pairs = dict(saved.pairs)

    def take(option: str, setting: str, kind: Callable, allowed: str) -> None:
        text = pairs.pop(setting, None)
        if text is None or getattr(options, option) is not None:
            return
        try:
            setattr(options, option, kind(text))
        except ValueError:
            raise ValueError(f"{path}: {setting} should be {allowed}, not {text!r}.") from None

    if not options.prompts and not options.prompts_file:
        options.saved_prompt = saved.prompt
    if options.negative is None:
        options.negative = saved.negative
    take("steps", "Steps", int, "a whole number")
    take("cfg_scale", "CFG scale", float, "a number")
    take("seed", "Seed", int, "a whole number")
    take("deep_cache", "Deep cache", int, "a whole number")
    if options.image:
        take("strength", "Denoising strength", float, "a number")
    _take_size(options, pairs, path)
    _take_sampler(options, pairs)
    notes = _model_notes(options, pairs)
    if pairs:
        names = ", ".join([*pairs][:MAX_NAMES]) + (", ..." if len(pairs) > MAX_NAMES else "")
        notes.append(f"of the settings in {path}, these are not used: {names}.")
    return notes


def _take_size(options: argparse.Namespace, pairs: dict[str, str], path: Path) -> None:
    size = pairs.pop("Size", None)
    if size is None or (options.width and options.height):
        return
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not found:
        raise ValueError(f"{path}: Size should be a width and a height, such as 512x768, not {size!r}.")
    options.width, options.height = options.width or int(found[1]), options.height or int(found[2])


def _take_sampler(options: argparse.Namespace, pairs: dict[str, str]) -> None:
    """Takes the sampler and, in newer web UIs, "Schedule type". One that is unknown here stays in `pairs`."""
    from sd.samplers import SAMPLERS

    sampler, schedule = pairs.get("Sampler"), pairs.get("Schedule type", "Automatic")
    if sampler is None:
        return
    base = sampler.removesuffix(" Karras")
    ours = next((name for name, other in SAMPLER_NAMES.items() if other.lower() == base.lower()), base)
    karras = "_karras" if base != sampler or schedule == "Karras" else ""
    known = next((name for name in (ours + karras, ours) if name in SAMPLERS), None)
    if known is None and options.sampler is None:
        return
    options.sampler = options.sampler or known
    del pairs["Sampler"]
    if karras and known == ours:
        pairs["Schedule type"] = "Karras"
    elif karras or schedule in PLAIN_SCHEDULES:
        pairs.pop("Schedule type", None)


def _model_notes(options: argparse.Namespace, pairs: dict[str, str]) -> list[str]:
    """A sentence if the picture was made with another model or VAE. It uses those of the options in any case."""
    ours = {"Model": model_name(options.checkpoint), "VAE": options.vae.stem if options.vae else None}
    notes = []
    for setting, name in ours.items():
        theirs = pairs.pop(setting, None)
        if theirs is not None and theirs not in (name, options.vae.name if setting == "VAE" and options.vae else None):
            what, flag = ("model", "--checkpoint") if setting == "Model" else ("VAE", "--vae")
            now = repr(name) if name else "the checkpoint's own"
            notes.append(f"{options.source} was made with the {what} {theirs!r}, not {now}; {flag} chooses another.")
    return notes
