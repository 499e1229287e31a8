"""Errors of `sd` name the arguments of its functions. Here they get the names of the command line's flags."""

from __future__ import annotations

import re

# Arguments -> flags.
FLAGS = {
    "uncond_prompt": "--negative",
    "input_image": "--image",
    "mask_image": "--mask",
    "feather": "--feather",
    "padding_mask_crop": "--padding",
    "strength": "--strength",
    "n_inference_steps": "--steps",
    "cfg_scale": "--cfg-scale",
    "cfg_interval": "--cfg-interval",
    "sampler_name": "--sampler",
    "timestep_spacing": "--spacing",
    "deep_cache": "--deep-cache",
    "seed": "--seed",
    "width": "--width",
    "height": "--height",
    "device": "--device",
    "prediction_type": "--prediction-type",
    "clip_skip": "--clip-skip",
    "freeu": "--freeu",
    "hires_scale": "--hires",
    "hires_strength": "--hires-strength",
    "hires_latents": "--hires-latents",
    "control": "--control",
    "control.net": "--control",
    "control.image": "--control-image",
    "control.strength": "--control-strength",
    "control.start": "--control-start",
    "control.end": "--control-end",
}

# Other code in errors -> how the command line says it.
PHRASES = {
    "height and width": "--height and --width",
    "dtype=torch.float32": "--dtype fp32",
    "dtype=torch.float16": "--dtype fp16",
    "dtype=torch.bfloat16": "--dtype bf16",
    "torch.bfloat16": "bf16",
    "`vae=`": "--vae",
    "`control=`": "--control",
    "invert the mask": "add --invert-mask",
}


def with_flags(message: str, flags: dict[str, str] = FLAGS) -> str:
    """An error message, with flags in place of arguments.

    A name that is also a plain word (seed, width) counts only at the beginning, where errors name what is wrong. Names
    in quotes, paths and calls are left alone: they may be the user's text.
    """
    first, blank, rest = message.partition(" ")
    message = flags.get(first, first) + blank + rest
    names = {**{name: flag for name, flag in flags.items() if "_" in name}, **PHRASES}
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w./\\'\"=-])(?:{pattern})(?![\w/\\'\"=(-]|\.\w)", lambda match: names[match[0]], message)
