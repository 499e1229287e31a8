"""The settings in a picture: written into it, read back, and used by --from.

They are one text, as the AUTOMATIC1111 web UI writes it: the prompt, "Negative prompt: ...", and a last line of pairs
such as "Steps: 20, Sampler: Euler a". A PNG file has it in the text chunk "parameters", JPEG and WebP in the EXIF tag
UserComment. A .txt file may hold the text itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from scripts.support.control import saved_controls, take_controls
from scripts.support.embeddings import saved_embeddings, take_embeddings
from scripts.support.loras import Lora, hashes, with_tags

if TYPE_CHECKING:
    from sd.request import Request

# The web UI's names; a sampler that is missing keeps ours. `_karras` becomes " Karras".
SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m_sde": "DPM++ 2M SDE",
    "lcm": "LCM",
    "tcd": "TCD",
}
PLAIN_SCHEDULES = ("Automatic", "Uniform", "Normal")  # noise levels that are not Karras's

HIRES_LATENT = "Latent"  # how the web UI's names of latent upscalers begin
NEGATIVE = "Negative prompt:"
# How the web UI splits the last line: a name, and a value in quotes or up to the next comma. A match begins only where
# a run of a name's characters begins: if it could begin at each of them, the time for a long line would be quadratic.
PAIR = re.compile(r'(?<![\w \-/])[ \-/]*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
MIN_PAIRS = 3  # a last line with fewer belongs to the prompt
USUAL = {"Steps", "Sampler", "Seed"}  # without any of these, a last line with colons and commas is only a prompt
MAX_BYTES = 1_000_000
MAX_NAMES = 8  # of unused settings that a sentence lists
EXIF, USER_COMMENT = 0x8769, 0x9286


def parameters(options: argparse.Namespace, request: Request, loras: Sequence[Lora] = ()) -> str:
    """The prompt, the LoRAs and the settings as one text, in the format that other Stable Diffusion tools read and
    write."""
    lines = [_protect(with_tags(request.prompt, loras))]
    if request.uncond_prompt:
        lines.append(f"{NEGATIVE} {_protect(request.uncond_prompt)}")
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in settings(options, request, loras).items()))
    return "\n".join(lines)


def settings(options: argparse.Namespace, request: Request, loras: Sequence[Lora] = ()) -> dict[str, object]:
    """The settings of an image, under the names that other Stable Diffusion tools use."""
    base, karras, _ = request.sampler_name.partition("_karras")
    pairs = {
        "Steps": request.n_inference_steps,
        "Sampler": SAMPLER_NAMES.get(base, base) + (" Karras" if karras else ""),
        "CFG scale": f"{request.cfg_scale:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": _model_name(options.checkpoint),
    }
    if options.vae:
        pairs["VAE"] = options.vae.stem
    pairs |= saved_embeddings(options, request)
    if request.cfg_interval is not None:
        pairs["CFG interval"] = " ".join(f"{share:g}" for share in request.cfg_interval)
    if request.timestep_spacing:
        pairs["Timestep spacing"] = request.timestep_spacing
    if request.deep_cache > 1:
        pairs["Deep cache"] = request.deep_cache
    if options.image:
        pairs["Denoising strength"] = f"{request.strength:g}"
    if request.clip_skip > 1:
        pairs["Clip skip"] = request.clip_skip
    if request.freeu is not None:
        pairs["FreeU"] = " ".join(f"{factor:g}" for factor in request.freeu)
    if request.hires_scale > 1:
        pairs["Hires upscale"] = f"{request.hires_scale:g}"
        pairs["Hires upscaler"] = HIRES_LATENT if request.hires_latents else "Lanczos"
        pairs["Hires strength"] = f"{request.hires_strength:g}"
    if loras:
        pairs["Lora hashes"] = hashes(loras)
    return pairs | saved_controls(options, request)


def quote(value: object) -> str:
    """A value as the web UI writes it: in quotes, as JSON, if it would not be read back otherwise."""
    text = str(value)
    plain = text == text.strip() and not re.search(r'[,:"\n\r]', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _protect(prompt: str) -> str:
    r"""Writes \: for a colon, which means the same, in lines that would be read as the start of a negative prompt."""
    return re.sub(rf"(?m)^([^\S\n]*{NEGATIVE[:-1]}):", r"\1\\:", prompt)


def _model_name(checkpoint: Path | None) -> str:
    """The name of the model's file or folder, without the suffix."""
    return Path(os.path.abspath(checkpoint)).stem if checkpoint else "tiny"


@dataclass(frozen=True)
class SavedSettings:
    """What a picture says about itself. `pairs` are the names and values of its last line."""

    prompt: str
    negative: str
    pairs: dict[str, str]


def read(path: Path) -> SavedSettings:
    """The settings in a picture or in a .txt file. Raises ValueError or OSError, in one sentence, if there are none."""
    text = _text_file(path) if path.suffix.lower() == ".txt" else picture_text(path)
    saved = parse(text or "")
    if USUAL.isdisjoint(saved.pairs):
        raise ValueError(
            f"--from should be a picture with settings from this tool or the AUTOMATIC1111 web UI: {path} has none."
        )
    return saved


def parse(text: str) -> SavedSettings:
    """Splits a text as the web UI does."""
    *lines, last = text.replace("\r\n", "\n").strip().split("\n")
    pairs = PAIR.findall(last)
    if len(pairs) < MIN_PAIRS:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:]).strip().removeprefix(NEGATIVE)
    return SavedSettings(prompt.strip(), negative.strip(), {name: _unquote(value) for name, value in pairs})


def _unquote(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:  # quotes that are not JSON belong to the value
            pass
    return value.strip()


def _text_file(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--from should be a picture or a text file in UTF-8, and {path} is neither.") from None


def picture_text(path: Path | BinaryIO) -> str | None:
    """The text that a web UI saved in a picture, or None. Raises ValueError for what is not a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            text = image.info.get("parameters")
            if text is None and image.format == "PNG":
                text = image.text.get("parameters")  # decodes the picture, to reach the chunks behind it
            if text is None:
                text = image.getexif().get_ifd(EXIF).get(USER_COMMENT)
    except UnidentifiedImageError:
        raise ValueError(f"--from should be a PNG, JPEG or WebP picture, and {path} is none of these.") from None
    except Exception as error:  # on a damaged file, Pillow's readers can raise anything
        raise ValueError(f"--from {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    return _comment(text) if isinstance(text, bytes) else text


def _comment(comment: bytes) -> str:
    """The text of an EXIF UserComment, whose first 8 bytes name its encoding."""
    kind, text = comment[:8], comment[8:]
    if kind == b"UNICODE\0":
        little = text[1::2].count(0) > text[::2].count(0)  # most tools write big-endian, some little-endian
        return text.decode("utf-16-le" if little else "utf-16-be", "replace")
    known = kind in (b"ASCII\0\0\0", bytes(8))
    return (text if known else comment).decode("utf-8", "replace").strip("\0")


def use_saved(options: argparse.Namespace) -> list[str]:
    """Sets the options that were not given to what the picture of --from says.

    Returns sentences on what this tool does not use. Raises ValueError or OSError, in one sentence, if the picture has
    no settings, or one that cannot be read.
    """
    from sd.prompts.alternatives import escape

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
        options.prompts = [escape(saved.prompt)]  # alternatives in braces were chosen before it was saved
    if options.negative is None:
        options.negative = saved.negative
    take("steps", "Steps", int, "a whole number")
    take("cfg_scale", "CFG scale", float, "a number")
    take("cfg_interval", "CFG interval", lambda text: [float(share) for share in text.split()], "two numbers")
    take("seed", "Seed", int, "a whole number")
    take("spacing", "Timestep spacing", str, "a text")
    if not options.report:  # it shows every stage at every step
        take("deep_cache", "Deep cache", int, "a whole number")
    take("clip_skip", "Clip skip", int, "a whole number")
    take("freeu", "FreeU", lambda text: [float(factor) for factor in text.split()], "four numbers")
    of_text = options.image is None or "Hires strength" in pairs  # the web UI has no second pass for --image
    if of_text and not (options.film or options.report):  # films and reports show one pass
        take("hires", "Hires upscale", float, "a number")
    if options.hires is not None:
        if "Hires strength" not in pairs and not options.image and "Denoising strength" in pairs:
            pairs["Hires strength"] = pairs.pop("Denoising strength")  # the web UI's name for it
        take("hires_strength", "Hires strength", float, "a number")
        options.hires_latents = options.hires_latents or pairs.pop("Hires upscaler", "").startswith(HIRES_LATENT)
    if options.image:
        take("strength", "Denoising strength", float, "a number")
    options.lora_hashes = pairs.pop("Lora hashes", "")
    _take_size(options, pairs)
    _take_sampler(options, pairs)
    take_embeddings(options, pairs)
    notes = _model_notes(options, pairs) + take_controls(options, pairs)
    if pairs:
        names = ", ".join([*pairs][:MAX_NAMES]) + (", ..." if len(pairs) > MAX_NAMES else "")
        notes.append(f"these settings in {path} are not used: {names}.")
    return notes


def _take_size(options: argparse.Namespace, pairs: dict[str, str]) -> None:
    size = pairs.pop("Size", None)
    if size is None or (options.width and options.height):
        return
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not found:
        raise ValueError(f"{options.source}: Size should be a width and a height, such as 512x768, not {size!r}.")
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
    """A sentence if the picture was made with another model or VAE. --from does not change either."""
    model, vae = pairs.pop("Model", None), pairs.pop("VAE", None)
    our_model = _model_name(options.checkpoint)
    our_vae = (options.vae.stem, options.vae.name) if options.vae else ()  # without the suffix, or as in the web UI
    notes = []
    if model not in (None, our_model):
        notes.append(
            f"{options.source} was made with the model {model!r}, not {our_model!r}; --checkpoint chooses another."
        )
    if vae not in (None, *our_vae):
        ours = repr(our_vae[0]) if our_vae else "the checkpoint's own"
        notes.append(f"{options.source} was made with the VAE {vae!r}, not {ours}; --vae chooses another.")
    return notes
