"""What `generate` may be asked for: every argument is checked here, in one place, before anything is loaded.

In: the arguments. Out: nothing, or a ValueError of one sentence that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
import numbers
import os
from itertools import chain

import numpy as np
from PIL import Image

from sd.config import SD15
from sd.models import Models
from sd.prompts.weights import parse
from sd.runtime.devices import best_device
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer, clean

MAX_PIXELS = 8192  # of a side: one feature map of SD 1.5's decoder then takes 34 GB in 16 bits
MAX_FEATHER = 1000
MAX_SCALE = 1000
QUOTED = 200  # characters of a value that an error quotes


def check_request(
    prompt: str | list[str],
    uncond_prompt: str | list[str] | None = "",
    input_image: object = None,
    mask_image: object = None,
    strength: float = 0.8,
    do_cfg: bool = True,
    cfg_scale: float | None = None,
    sampler_name: str | None = None,
    n_inference_steps: int | None = None,
    models: object = None,
    seed: int | None = None,
    device: object = None,
    idle_device: object = None,
    tokenizer: object = None,
    height: int | None = None,
    width: int | None = None,
    feather: float = 0,
    cfg_rescale: float = 0,
    deep_cache: int = 1,
) -> None:
    """Raises ValueError, in one sentence, for the first of `generate`'s arguments that cannot be."""
    uncond_prompt = "" if uncond_prompt is None else uncond_prompt
    check_prompts(prompt, uncond_prompt)
    _check_notation(prompt, uncond_prompt)
    for name, picture in (("input_image", input_image), ("mask_image", mask_image)):
        _require(
            picture is None or _is_picture(picture), name, picture, "a path, an open file, a PIL image or an array"
        )
    _require(mask_image is None or input_image is not None, "input_image", input_image, "given with mask_image")
    _require(isinstance(do_cfg, (bool, np.bool_)), "do_cfg", do_cfg, "True or False")
    _check_numbers(strength, 1 if cfg_scale is None else cfg_scale, cfg_rescale, feather)
    named = sampler_name is None or (isinstance(sampler_name, str) and sampler_name in SAMPLERS)
    _require(named, "sampler_name", sampler_name, f"one of {', '.join(SAMPLERS)}")
    most = SD15.schedule.num_training_steps
    counted = n_inference_steps is None or _is_number(n_inference_steps, 1, most, whole=True)
    _require(counted, "n_inference_steps", n_inference_steps, f"a whole number from 1 to {most}")
    check_deep_cache(deep_cache)
    seeded = seed is None or _is_number(seed, 0, 2**63 - 1, whole=True)
    _require(seeded, "seed", seed, "a whole number from 0 to 2**63 - 1")
    check_size(height, width, SD15.vae.downscale)
    _require(models is None or isinstance(models, Models), "models", models, "what load_models gives")
    _require(tokenizer is None or isinstance(tokenizer, Tokenizer), "tokenizer", tokenizer, "a Tokenizer")
    for name, value in (("device", device), ("idle_device", idle_device)):
        _require(_is_device(value), name, value, "one that torch can use here, such as 'cpu'")


def check_size(height: int | None, width: int | None, multiple: int) -> None:
    """Raises ValueError unless both are multiples of `multiple` pixels, 8192 at most, or None."""
    for name, size in (("height", height), ("width", width)):
        ok = size is None or (_is_number(size, multiple, whole=True) and size % multiple == 0)
        _require(ok, name, size, f"a multiple of {multiple} pixels")
        _require(size is None or size <= MAX_PIXELS, name, size, f"at most {MAX_PIXELS} pixels")


def check_deep_cache(deep_cache: int) -> None:
    """Raises ValueError unless it is a number of steps that can share what the deep stages of the U-Net make."""
    most = SD15.schedule.num_training_steps
    _require(_is_number(deep_cache, 1, most, whole=True), "deep_cache", deep_cache, f"a whole number from 1 to {most}")


def check_prompts(prompt: str | list[str], uncond_prompt: str | list[str] | None) -> None:
    """Raises ValueError unless these are texts, and as many of both, or one `uncond_prompt` for all, or None."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    _require(_is_texts(prompts), "prompt", prompt, "a text or a list of one text or more")
    if uncond_prompt is None or isinstance(uncond_prompt, str):
        return
    _require(_is_texts(uncond_prompt), "uncond_prompt", uncond_prompt, "a text or a list of texts")
    paired = len(uncond_prompt) == len(prompts)
    _require(paired, "uncond_prompt", uncond_prompt, f"one text, or {len(prompts)} like the prompts")


def _check_numbers(strength: float, cfg_scale: float, cfg_rescale: float, feather: float) -> None:
    _require(_is_number(strength, 0, 1) and strength > 0, "strength", strength, "a number above 0 and at most 1")
    _require(_is_number(feather, 0), "feather", feather, "a number of pixels, 0 or more")
    _require(feather <= MAX_FEATHER, "feather", feather, f"at most {MAX_FEATHER} pixels")
    _require(_is_number(cfg_scale), "cfg_scale", cfg_scale, "a number; 1 to 14 is usual")
    _require(abs(cfg_scale) <= MAX_SCALE, "cfg_scale", cfg_scale, f"from -{MAX_SCALE} to {MAX_SCALE}")
    _require(_is_number(cfg_rescale, 0, 1), "cfg_rescale", cfg_rescale, "a number from 0 to 1")


def _check_notation(prompt: str | list[str], uncond_prompt: str | list[str]) -> None:
    """Raises ValueError for a text that cannot be read, or whose brackets are not in pairs."""
    for name, texts in (("prompt", prompt), ("uncond_prompt", uncond_prompt)):
        for text in dict.fromkeys([texts] if isinstance(texts, str) else texts):
            for piece, _ in chain(*parse(text, name)):
                _check_text(piece, name)


def _check_text(text: str, name: str) -> None:
    try:
        clean(text)
    except ValueError as error:
        reason = str(error)
        raise ValueError(f"{name} should be text that can be read: {reason[0].lower()}{reason[1:]}") from None


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} should be {allowed}, not {_shown(value)}.")


def _shown(value: object) -> str:
    """A value as an error quotes it: on one line, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever an object of someone else's class raises, and an int of thousands of digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _is_number(value: object, low: float = -math.inf, high: float = math.inf, whole: bool = False) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and bool(low <= value <= high)
    except OverflowError:  # an int that no float can hold
        return False


def _is_picture(value: object) -> bool:
    return isinstance(value, (str, os.PathLike, Image.Image, np.ndarray)) or hasattr(value, "read")


def _is_device(value: object) -> bool:
    try:
        best_device(value)
    except (ValueError, OverflowError):
        return False
    return True
