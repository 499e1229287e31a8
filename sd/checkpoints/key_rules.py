"""Rules that rename the keys of a state dict, and the prefixes that the published files use.

A rule is a pair of names, (old, new). It replaces whole dotted segments anywhere in a key. `#` stands for any number.
A rule that ends in a dot replaces the start of a key only.

    ("mlp.fc1", "mlp.0")                 layers.3.mlp.fc1.bias -> layers.3.mlp.0.bias
    ("down.#.block", "levels.#.blocks")  down.2.block.0.norm1  -> levels.2.blocks.0.norm1
    ("first_stage_model.", "vae.")       first_stage_model.a   -> vae.a

A list of rules applies from first to last. `inverse` gives the list that undoes it.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import TypeVar

# How the keys of the networks begin in the CompVis layout.
CLIP_PREFIX = "cond_stage_model.transformer."
OPENCLIP_PREFIX = "cond_stage_model.model."  # Stable Diffusion 2.x
SGM_PREFIX = "conditioner.embedders.0.model."  # SD-Turbo's name for the same
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
POSITION_IDS = f"{CLIP_PREFIX}text_model.embeddings.position_ids"  # 0..76: a constant, not a weight

# What DataParallel, torch.compile and FSDP put into the keys of the modules that they wrap.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

Rules = list[tuple[str, str]]
Value = TypeVar("Value")


def rename(key: str, rules: Rules) -> str:
    """The key after all rules, first to last. Rules that do not match leave it unchanged."""
    for old, new in rules:
        pattern, replacement = _compile(old, new)
        key = pattern.sub(replacement, key)
    return key


def inverse(rules: Rules) -> Rules:
    """Rules that undo `rules`: each one reversed, from last to first."""
    return [(new, old) for old, new in reversed(rules)]


def without_wrappers(state: dict[str, Value]) -> dict[str, Value]:
    """The entries under the keys that they had before anything wrapped the model:

    module.model.diffusion_model.a -> model.diffusion_model.a
    """
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    outer = {key.split(UNET_PREFIX)[0] for key in state if UNET_PREFIX in key}
    if len(outer) != 1:
        return state
    prefix = outer.pop()  # "" almost always; the name of a trainer's attribute
    return {key.removeprefix(prefix): value for key, value in state.items()}


@cache
def _compile(old: str, new: str) -> tuple[re.Pattern, str]:
    """A rule as a regular expression and the replacement for its matches."""
    text = re.escape(old).replace(r"\#", r"(\d+)")
    pattern = f"^{text}" if old.endswith(".") else rf"(?<![^.]){text}(?![^.])"
    numbers = itertools.count(1)
    return re.compile(pattern), re.sub("#", lambda _: rf"\g<{next(numbers)}>", new)
