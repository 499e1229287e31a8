"""The forward process: the noise schedule, seeds, and what timesteps a run visits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sd.config import ScheduleConfig

Generators = torch.Generator | list[torch.Generator] | None


def make_generators(seed: int | None, batch_size: int) -> list[torch.Generator]:
    """One random generator per image, seeded with seed, seed + 1, ...; at random without a seed."""
    if seed is None:
        seed = torch.Generator().seed() % 2**32
    return [torch.Generator().manual_seed(int(seed) + i) for i in range(batch_size)]


def draw_noise(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Standard normal noise (B, ...) in float32, drawn on the CPU: a seed gives the same picture on every device.

    With a list of B generators, image i gets the noise that its own generator would give it alone. Raises ValueError
    for another number of generators.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"A batch of {shape[0]} needs as many generators, not {len(generator)}.")
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generator])
    return torch.randn(shape, generator=generator)


def make_betas(schedule: ScheduleConfig) -> Tensor:
    """The variances of the forward process, beta_0 .. beta_999. Raises ValueError for an unknown `beta_schedule`.

    "scaled_linear" is linear in sqrt(beta), as in the latent diffusion code; "linear" is 2006.11239, section 4.
    """
    start, end, n = schedule.beta_start, schedule.beta_end, schedule.num_training_steps
    if schedule.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n) ** 2
    if schedule.beta_schedule == "linear":
        return torch.linspace(start, end, n)
    raise ValueError(f'beta_schedule should be "scaled_linear" or "linear", not {schedule.beta_schedule!r}.')


def space_timesteps(n: int, total: int, spacing: str, offset: int = 0) -> np.ndarray:
    """n of the timesteps 0 .. total - 1, noisiest first, float64 (n,); 2305.08891, table 2, names the spacings.

    "leading"   0, k, 2k, ... for the whole number k = total // n, and `offset` added where there is room for it
    "trailing"  total - 1 and on down, in equal steps of total / n, rounded
    "linspace"  total - 1 to 0 in equal steps, which need not be whole; 0 alone for n = 1

    Raises ValueError for another spacing.
    """
    if spacing == "leading":
        timesteps = np.arange(n)[::-1] * (total // n)
        room = total - 1 - timesteps[0]
        return (timesteps + min(offset, room)).astype(float)
    if spacing == "trailing":
        return np.round(total - np.arange(n) * (total / n)) - 1
    if spacing == "linspace":
        return np.linspace(0, total - 1, n)[::-1].copy()
    raise ValueError(f'spacing should be "leading", "trailing" or "linspace", not {spacing!r}.')


def karras_sigmas(n: int, sigma_max: float, sigma_min: float, rho: float = 7) -> np.ndarray:
    """n noise levels, the higher the further apart, float64 (n,) (2206.00364, eq. 5):

    sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    """
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho
