"""What `generate` may be asked for: every argument is checked here, in one place, before anything is loaded.

In: the arguments. Out: nothing, or a ValueError of one sentence that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
import numbers

from sd.config import SD15
from sd.prompts import parse
from sd.samplers import SAMPLERS


def check_request(
    prompt: str | list[str],
    uncond_prompt: str | list[str] = "",
    input_image: object = None,
    mask_image: object = None,
    strength: float = 0.8,
    cfg_scale: float = 7.5,
    sampler_name: str = "dpm++2m",
    n_inference_steps: int | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    feather: float = 0,
    cfg_rescale: float = 0,
    **_: object,
) -> None:
    """Raises ValueError, in one sentence, for the first of `generate`'s arguments that cannot be."""
    _check_prompts([prompt] if isinstance(prompt, str) else prompt, uncond_prompt)
    _require(mask_image is None or input_image is not None, "input_image", input_image, "given with mask_image")
    _require(_is_number(strength, 0, 1) and strength > 0, "strength", strength, "a number above 0 and at most 1")
    _require(_is_number(feather, 0), "feather", feather, "a number of pixels, 0 or more")
    _require(_is_number(cfg_scale), "cfg_scale", cfg_scale, "a number; 1 to 14 is usual")
    _require(_is_number(cfg_rescale, 0, 1), "cfg_rescale", cfg_rescale, "a number from 0 to 1")
    named = isinstance(sampler_name, str) and sampler_name in SAMPLERS
    _require(named, "sampler_name", sampler_name, f"one of {', '.join(SAMPLERS)}")
    most = SD15.schedule.num_training_steps
    counted = n_inference_steps is None or _is_number(n_inference_steps, 1, most, whole=True)
    _require(counted, "n_inference_steps", n_inference_steps, f"a whole number from 1 to {most}")
    seeded = seed is None or _is_number(seed, 0, 2**63 - 1, whole=True)
    _require(seeded, "seed", seed, "a whole number from 0 to 2**63 - 1")
    check_size(height, width, SD15.vae.downscale)


def check_size(height: int | None, width: int | None, multiple: int) -> None:
    """Raises ValueError unless both are multiples of `multiple` pixels, or None."""
    for name, size in (("height", height), ("width", width)):
        ok = size is None or (_is_number(size, multiple, whole=True) and size % multiple == 0)
        _require(ok, name, size, f"a multiple of {multiple} pixels")


def _check_prompts(prompts: list[str], uncond_prompt: str | list[str]) -> None:
    _require(_is_texts(prompts), "prompt", prompts, "a text or a list of one text or more")
    unconds = [uncond_prompt] * len(prompts) if isinstance(uncond_prompt, str) else uncond_prompt
    _require(_is_texts(unconds), "uncond_prompt", uncond_prompt, "a text or a list of texts")
    paired = len(unconds) == len(prompts)
    _require(paired, "uncond_prompt", uncond_prompt, f"one text, or {len(prompts)} like the prompts")
    for name, texts in (("prompt", prompts), ("uncond_prompt", unconds)):
        for text in dict.fromkeys(texts):
            parse(text, name)


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} should be {allowed}, not {value!r}.")


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _is_number(value: object, low: float = -math.inf, high: float = math.inf, whole: bool = False) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
