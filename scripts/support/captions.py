"""The texts that demo.py writes into reports and on grids: details, labels, and the command that repeats an image."""

from __future__ import annotations

import argparse
import platform
import shlex
from importlib.metadata import version
from typing import TYPE_CHECKING

from scripts.support.command_line import demo_command
from scripts.support.embeddings import used_files
from scripts.support.loras import flag_value
from scripts.support.saved_settings import settings

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from sd.models import Models
    from sd.request import Request

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # the names of --dtype -> torch's


def details(options: argparse.Namespace, request: Request, models: Models) -> dict[str, str]:
    """The prompt, all settings, the machine, and the versions of the libraries. Empty values are left out."""
    import torch

    device, dtype = _place(models)
    pairs = {
        "Prompt": request.prompt,
        "Negative prompt": request.uncond_prompt,
    }
    pairs |= {"LoRA": ", ".join(lora.label for lora in models.loras)}
    pairs |= settings(options, request, models.loras)
    mask = "where the image is transparent" if options.mask_from_alpha else options.mask
    inverted = "yes" if options.invert_mask else None
    pairs |= {"Image": options.image, "Mask": mask, "Inverted mask": inverted, "Feather": options.feather}
    pairs |= {"Control images": ", ".join(map(str, options.control_image or []))}
    pairs |= {"Only masked, padding": request.padding_mask_crop, "Embeddings": used_files(options, request)}
    pairs |= {"Device": device, "Precision": DTYPES[dtype], "Machine": platform.machine()}
    pairs |= {"Threads": torch.get_num_threads()}
    pairs |= {"Python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {key: str(value) for key, value in pairs.items() if value not in ("", None)}


def command(options: argparse.Namespace, request: Request, models: Models) -> str:
    """The command line that makes this image again, quoted for a POSIX shell."""
    from sd.prompts.alternatives import escape

    device, dtype = _place(models)
    # A prompt must not look like a flag. An empty pair of braces adds nothing to it.
    prompt = ("{}" if request.prompt.startswith("-") else "") + escape(request.prompt)
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
        "--embedding": options.embedding,
        "--sampler": request.sampler_name,
        "--spacing": request.timestep_spacing,
        "--seed": request.seed,
        "--width": request.width,
        "--height": request.height,
        "--checkpoint": options.checkpoint,
        "--vae": options.vae,
        "--clip-skip": request.clip_skip if request.clip_skip > 1 else None,
        "--hires": request.hires_scale if request.hires_scale > 1 else None,
        "--hires-strength": options.hires_strength,
        "--hires-latents": options.hires_latents,
        "--control": options.control,
        "--control-image": options.control_image,
        "--control-strength": options.control_strength,
        "--control-start": options.control_start,
        "--control-end": options.control_end,
        "--guess-mode": options.guess_mode,
        "--control-from": options.control_from,
        "--prediction-type": options.prediction_type,
        "--device": device,
        "--dtype": dtype,
    }
    if request.cfg_interval is not None:
        arguments += ["--cfg-interval", *(f"{share:g}" for share in request.cfg_interval)]
    if request.freeu is not None:
        arguments += ["--freeu", *(f"{factor:g}" for factor in request.freeu)]
    for lora in models.loras:
        arguments += ["--lora", flag_value(lora)]
    for flag, value in [(flag, value) for flag, values in flags.items() for value in _each(values)]:
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:  # 0 is a value
            text = str(value)
            arguments += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(arguments)


def _each(value: object) -> list:
    """The values of a flag that can be given several times, or the one value of another."""
    return value if isinstance(value, list) else [value]


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


def _place(models: Models) -> tuple[str, str]:
    """The device and precision of the models, in the notation of --device and --dtype."""
    from sd.runtime.devices import device_and_dtype

    device, dtype = device_and_dtype(models.diffusion)
    return str(device), next(short for short, name in DTYPES.items() if f"torch.{name}" == str(dtype))
