"""The texts that demo.py writes into images and reports: settings, labels, and the command that repeats an image."""

from __future__ import annotations

import argparse
import platform
import shlex
from importlib.metadata import version
from typing import TYPE_CHECKING

from scripts.support.command_line import demo_command

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from sd.models import Models

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # the names of --dtype -> torch's

# The AUTOMATIC1111 web UI's names. For our `_karras` samplers, " Karras" is appended.
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


def parameters(options: argparse.Namespace, prompt: str, settings: dict, seed: int, shape: tuple[int, ...]) -> str:
    """The prompt and settings as one text, in the format that other Stable Diffusion tools read and write."""
    lines = [prompt]
    if options.negative:
        lines.append(f"Negative prompt: {options.negative}")
    lines.append(", ".join(f"{key}: {value}" for key, value in _settings(options, settings, seed, shape).items()))
    return "\n".join(lines)


def details(
    options: argparse.Namespace, prompt: str, settings: dict, seed: int, shape: tuple[int, ...]
) -> dict[str, str]:
    """The prompt, all settings, the machine, and the versions of the libraries; none of the values is empty."""
    import torch

    device, dtype = _place(settings["models"])
    pairs = {"Prompt": prompt, "Negative prompt": options.negative, **_settings(options, settings, seed, shape)}
    pairs |= {"Image": options.image, "Mask": options.mask, "Feather": options.feather}
    pairs |= {"Device": device, "Precision": DTYPES[dtype], "Machine": platform.machine()}
    pairs |= {"Threads": torch.get_num_threads()}
    pairs |= {"Python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {key: str(value) for key, value in pairs.items() if value not in ("", None)}


def command(options: argparse.Namespace, prompt: str, settings: dict, seed: int, shape: tuple[int, ...]) -> str:
    """The command line that makes this image again, quoted for a POSIX shell."""
    device, dtype = _place(settings["models"])
    # A prompt must not look like a flag. An empty pair of braces adds nothing to it.
    arguments = [*demo_command(), "{}" + prompt if prompt.startswith("-") else prompt]
    flags = {
        "--negative": options.negative or None,
        "--image": options.image,
        "--mask": options.mask,
        "--feather": options.feather,
        "--strength": settings["strength"] if options.image else None,
        "--steps": settings["n_inference_steps"],
        "--cfg-scale": settings["cfg_scale"],
        "--sampler": settings["sampler_name"],
        "--seed": seed,
        "--width": shape[1],
        "--height": shape[0],
        "--checkpoint": options.checkpoint,
        "--vae": options.vae,
        "--prediction-type": options.prediction_type,
        "--device": device,
        "--dtype": dtype,
    }
    for flag, value in flags.items():
        if value is not None:
            text = str(value)
            arguments += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(arguments)


def grid(prompts: list[str], seeds: range, pictures: list[np.ndarray]) -> Image.Image:
    """All images on one labelled sheet. With several prompts and seeds, a row is a prompt and a column is a seed."""
    from sd.inside.contact_sheet import contact_sheet, square_sheet

    labels = [f"{prompt}, seed {seed}" for prompt in prompts for seed in seeds]
    if len(prompts) == 1:
        labels = [f"seed {seed}" for seed in seeds]
    elif len(seeds) == 1:
        labels = prompts
    if len(prompts) == 1 or len(seeds) == 1:
        return square_sheet(pictures, labels)
    starts = range(0, len(pictures), len(seeds))
    rows, texts = ([cells[i : i + len(seeds)] for i in starts] for cells in (pictures, labels))
    return contact_sheet(rows, texts)


def _settings(options: argparse.Namespace, settings: dict, seed: int, shape: tuple[int, ...]) -> dict[str, object]:
    """The settings of an image, under the names that other Stable Diffusion tools use."""
    base, karras, _ = settings["sampler_name"].partition("_karras")
    pairs = {
        "Steps": settings["n_inference_steps"],
        "Sampler": SAMPLER_NAMES[base] + (" Karras" if karras else ""),
        "CFG scale": f"{settings['cfg_scale']:g}",
        "Seed": seed,
        "Size": f"{shape[1]}x{shape[0]}",
        "Model": options.checkpoint.stem if options.checkpoint else "tiny",
    }
    if options.vae:
        pairs["VAE"] = options.vae.stem
    if settings["deep_cache"] > 1:
        pairs["Deep cache"] = settings["deep_cache"]
    if options.image:
        pairs["Denoising strength"] = f"{settings['strength']:g}"
    return pairs


def _place(models: Models) -> tuple[str, str]:
    """The device and precision of the models, in the notation of --device and --dtype."""
    from sd.runtime.devices import device_and_dtype

    device, dtype = device_and_dtype(models.diffusion)
    return str(device), next(short for short, name in DTYPES.items() if f"torch.{name}" == str(dtype))
