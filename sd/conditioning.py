"""Prompts -> context: what the U-Net reads of them, the prompts' rows and those of the negative prompts.

In: texts, and `Models`: the networks, tokenizer and configuration that `model_loader` loads. Out: context (B, 77 k, D)
from the text encoder, or (2B, 77 k, D) for classifier-free guidance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd.arguments import check_prompts
from sd.model_loader import Models, place
from sd.prompts.weights import join_chunks, layout, weigh
from sd.runtime.not_finite import check_finite


@torch.no_grad()
def encode_prompt(
    models: Models, prompt: str | list[str], uncond_prompt: str | list[str] | None = "", plain: bool = False
) -> Tensor:
    """B prompts -> context (2B, 77 k, D), the unconditional half first; (B, 77 k, D) where `uncond_prompt` is None.

    One `uncond_prompt` serves all prompts; of a list each has its own. Weights, as in "(word:1.3)", and BREAK are
    obeyed. k is the least common multiple of the numbers of chunks that the texts take, and the context of a text that
    takes fewer is repeated, which changes no picture: see `sd.prompts`. With `plain` brackets and BREAK are text like
    any other, a prompt that is longer than 75 tokens is truncated, with a warning, and k is 1.

    Raises ValueError for anything but texts, for another number of negative prompts than of prompts, and as
    `prompts.layout` does; NotFiniteError if the text encoder gives NaN or infinity.
    """
    check_prompts(prompt, uncond_prompt)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    unconds = [] if uncond_prompt is None else uncond_prompt
    unconds = [unconds] * len(prompts) if isinstance(unconds, str) else unconds
    texts = [*unconds, *prompts]
    if plain:
        return _read(models, models.tokenizer(texts))  # (2B, 77, D)
    tokens, weights, counts = layout(texts, models.tokenizer)  # (N, 77) both
    return join_chunks(weigh(_read(models, tokens), weights), counts)  # (2B, 77 k, D), from (N, 77, D)


def _read(models: Models, tokens: Tensor) -> Tensor:
    """Token ids (N, 77) -> their context (N, 77, D)."""
    return check_finite(models.clip(tokens.to(place(models.clip)[0])), models.clip, "text encoder")
