"""Images of models in training: to show progress, to judge them, and to train others."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sd.images import from_uint8
from sd.models import Models
from sd.noise import make_generators
from sd.pipeline import decode_latents, denoise, encode_prompt, get_latents
from sd.samplers import SAMPLERS


def draw_latents(
    models: Models,
    prompts: list[str],
    sampler_name: str | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    deep_cache: int = 1,
) -> Tensor:
    """The latents (N, 4, h, w) of one image for each of N prompts, all drawn at once. Image i has `seed` + i. Settings
    are the model's own, unless given. Brackets in a prompt, which may be a caption, are plain text."""
    settings = models.config.sampling
    generators = make_generators(seed, len(prompts))
    sampler = SAMPLERS[sampler_name or settings.sampler](generators, schedule=models.config.schedule)
    sampler.set_inference_timesteps(steps or settings.steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `tokenise` has already logged how many captions are truncated
        context = encode_prompt(models, prompts, plain=True)
    latents = get_latents(models, len(prompts), height, width, generators)
    for step in denoise(models, latents, context, sampler, cfg_scale, deep_cache=deep_cache):
        latents = step.latents
    return latents


def decode(models: Models, latents: Tensor) -> Tensor:
    """Latents (N, 4, h, w) -> images (N, 3, H, W) in [-1, 1], of 256 levels each."""
    return from_uint8(torch.from_numpy(decode_latents(models, latents)).permute(0, 3, 1, 2))
