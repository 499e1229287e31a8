"""What `generate` may be asked for: every argument is checked here, in one place, before anything is loaded.

In: the arguments. Out: nothing, or a ValueError of one sentence that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
import numbers

from sd.config import SD15
from sd.samplers import SAMPLERS


def check_request(
    prompts: list[str],
    uncond_prompt: str | list[str] = "",
    strength: float = 0.8,
    cfg_scale: float = 7.5,
    sampler_name: str = "ddpm",
    n_inference_steps: int | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    feather: float = 0,
) -> None:
    """Raises ValueError, in one sentence, for the first of `generate`'s arguments that cannot be."""
    max_steps = SD15.schedule.num_training_steps
    _require(_is_texts(prompts), "prompt", prompts, "a text or a list of one text or more")
    unconds = [uncond_prompt] * len(prompts) if isinstance(uncond_prompt, str) else uncond_prompt
    _require(_is_texts(unconds), "uncond_prompt", uncond_prompt, "a text or a list of texts")
    _require(
        len(unconds) == len(prompts), "uncond_prompt", uncond_prompt, f"one text, or {len(prompts)} like the prompts"
    )
    _require(_is_number(strength, 0, 1) and strength > 0, "strength", strength, "a number above 0 and at most 1")
    _require(_is_number(cfg_scale), "cfg_scale", cfg_scale, "a number; 1 to 14 is usual")
    _require(sampler_name in SAMPLERS, "sampler_name", sampler_name, f"one of {', '.join(SAMPLERS)}")
    _require(
        n_inference_steps is None or _is_number(n_inference_steps, 1, max_steps, whole=True),
        "n_inference_steps",
        n_inference_steps,
        f"a whole number from 1 to {max_steps}",
    )
    _require(
        seed is None or _is_number(seed, 0, 2**63 - len(prompts), whole=True),
        "seed",
        seed,
        "a whole number from 0 to 2**63 - 1",
    )
    check_size(height, width, SD15.vae.downscale)
    _require(_is_number(feather, 0), "feather", feather, "a number of pixels, 0 or more")


def check_size(height: int | None, width: int | None, multiple: int) -> None:
    """Raises ValueError unless both are multiples of `multiple` pixels, or None."""
    for name, size in (("height", height), ("width", width)):
        ok = size is None or (_is_number(size, multiple, whole=True) and size % multiple == 0)
        _require(ok, name, size, f"a multiple of {multiple} pixels")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} should be {allowed}, not {value!r}.")


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _is_number(value: object, low: float = -math.inf, high: float = math.inf, whole: bool = False) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
