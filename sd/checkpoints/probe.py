"""What a U-Net predicts, found by running it once: noise, or v (2202.00512, appendix D).

Most files of SD 2.x do not say it, and their tensors have the same names and shapes either way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sd.config import SD2_BASE, ModelConfig
from sd.runtime import warn

if TYPE_CHECKING:
    from sd.models import Models

LAST_TIMESTEP = 999
SIDE = 16  # of the latents
NOISE = 0.5  # a slope above it shows that a U-Net predicts noise


@torch.no_grad()
def slope(models: Models) -> float:
    """The part of its input that the U-Net returns where the input is noise: <out, x> / <x, x> at the last timestep.

    There, x = sqrt(a) x_0 + sqrt(1 - a) noise with a = 0.0047. So a U-Net that predicts noise returns nearly all of x,
    0.998. One that predicts v = sqrt(a) noise - sqrt(1 - a) x_0 returns 0.07 of it.
    """
    context = models.clip(models.tokenizer([""]).to(models.device))  # (1, 77, W)
    x = torch.randn(1, models.config.unet.in_channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    out = models.diffusion(x.to(context), context, torch.tensor([LAST_TIMESTEP], device=models.device)).float().cpu()
    return ((out * x).sum() / (x * x).sum()).item()


def settle_prediction(models: Models) -> ModelConfig:
    """The configuration of a model of SD 2.x whose own is a guess from its weights: with what the U-Net predicts.

    Where the U-Net returns noise, it predicts noise. Otherwise the guess stands. Warns if the two disagree.
    """
    guess = models.config
    guessed = guess.schedule.prediction_type
    noise = slope(models) > NOISE
    if noise == (guessed == "epsilon"):
        return guess
    config = replace(guess, schedule=SD2_BASE.schedule, image_size=SD2_BASE.image_size) if noise else guess
    warn(
        "This model of Stable Diffusion 2 does not say what its U-Net predicts. Its weights look like "
        f"{guessed}, its output does not: {config.schedule.prediction_type} was chosen. If images are noise or brown "
        "blobs, give the other one as prediction_type: epsilon or v_prediction."
    )
    return config
