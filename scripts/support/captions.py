"""The texts that demo.py writes into images and reports: settings, labels, and the command that repeats an image."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.support.command_line import demo_command
from scripts.support.saved_settings import protect, quote

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from sd.models import Models
    from sd.request import Request

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # the names of --dtype -> torch's

PADDING = 32  # pixels, as in the AUTOMATIC1111 web UI

# The AUTOMATIC1111 web UI's names; a sampler that is missing keeps ours. `_karras` becomes " Karras".
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
}


def parameters(options: argparse.Namespace, request: Request) -> str:
    """The prompt and settings as one text, in the format that other Stable Diffusion tools read and write."""
    lines = [protect(request.prompt)]
    if request.uncond_prompt:
        lines.append(f"Negative prompt: {protect(request.uncond_prompt)}")
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in _settings(options, request).items()))
    return "\n".join(lines)


def model_name(checkpoint: Path | None) -> str:
    """What the settings call the model: the name of its file or folder, without the suffix."""
    return Path(os.path.abspath(checkpoint)).stem if checkpoint else "tiny"


def padding(options: argparse.Namespace) -> int | None:
    """The pixels around the mask that --only-masked shows the model; None without it."""
    if not options.only_masked:
        return None
    return PADDING if options.padding is None else options.padding


def details(options: argparse.Namespace, request: Request, models: Models) -> dict[str, str]:
    """The prompt, all settings, the machine, and the versions of the libraries. Empty values are left out."""
    import torch

    device, dtype = _place(models)
    pairs = {"Prompt": request.prompt, "Negative prompt": request.uncond_prompt, **_settings(options, request)}
    mask = "where the image is transparent" if options.mask_from_alpha else options.mask
    pairs |= {"Image": options.image, "Mask": mask, "Feather": options.feather}
    pairs |= {"Inverted mask": "yes" * options.invert_mask, "Only masked, padding": padding(options)}
    pairs |= {"Device": device, "Precision": DTYPES[dtype], "Machine": platform.machine()}
    pairs |= {"Threads": torch.get_num_threads()}
    pairs |= {"Python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {key: str(value) for key, value in pairs.items() if value not in ("", None)}


def command(options: argparse.Namespace, request: Request, models: Models) -> str:
    """The command line that makes this image again, quoted for a POSIX shell."""
    from sd.prompts.alternatives import escape

    device, dtype = _place(models)
    # A prompt must not look like a flag. An empty pair of braces adds nothing to it.
    prompt = "{}" * request.prompt.startswith("-") + escape(request.prompt)
    arguments = [*demo_command(), prompt]
    flags = {
        "--negative": request.uncond_prompt or None,
        "--image": options.image,
        "--mask": options.mask,
        "--mask-from-alpha": options.mask_from_alpha,
        "--invert-mask": options.invert_mask,
        "--only-masked": options.only_masked,
        "--padding": options.padding,
        "--feather": options.feather,
        "--strength": request.strength if options.image else None,
        "--steps": request.n_inference_steps,
        "--cfg-scale": request.cfg_scale,
        "--sampler": request.sampler_name,
        "--seed": request.seed,
        "--width": request.width,
        "--height": request.height,
        "--checkpoint": options.checkpoint,
        "--vae": options.vae,
        "--prediction-type": options.prediction_type,
        "--device": device,
        "--dtype": dtype,
    }
    for flag, value in flags.items():
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:  # 0 is a value
            text = str(value)
            arguments += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(arguments)


def grid(prompts: list[str], seeds: range, images: list[np.ndarray]) -> Image.Image:
    """All images on one labelled sheet. With several prompts and seeds, a row is a prompt and a column is a seed."""
    from sd.inside.contact_sheet import contact_sheet, square_sheet

    labels = [f"{prompt}, seed {seed}" for prompt in prompts for seed in seeds]
    if len(prompts) == 1:
        labels = [f"seed {seed}" for seed in seeds]
    elif len(seeds) == 1:
        labels = prompts
    if len(prompts) == 1 or len(seeds) == 1:
        return square_sheet(images, labels)
    starts = range(0, len(images), len(seeds))
    rows, texts = ([cells[i : i + len(seeds)] for i in starts] for cells in (images, labels))
    return contact_sheet(rows, texts)


def _settings(options: argparse.Namespace, request: Request) -> dict[str, object]:
    """The settings of an image, under the names that other Stable Diffusion tools use."""
    base, karras, _ = request.sampler_name.partition("_karras")
    pairs = {
        "Steps": request.n_inference_steps,
        "Sampler": SAMPLER_NAMES.get(base, base) + (" Karras" if karras else ""),
        "CFG scale": f"{request.cfg_scale:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": model_name(options.checkpoint),
    }
    if options.vae:
        pairs["VAE"] = options.vae.stem
    if request.deep_cache > 1:
        pairs["Deep cache"] = request.deep_cache
    if options.image:
        pairs["Denoising strength"] = f"{request.strength:g}"
    return pairs


def _place(models: Models) -> tuple[str, str]:
    """The device and precision of the models, in the notation of --device and --dtype."""
    from sd.runtime.devices import device_and_dtype

    device, dtype = device_and_dtype(models.diffusion)
    return str(device), next(short for short, name in DTYPES.items() if f"torch.{name}" == str(dtype))
