"""The forward process of diffusion: seeds, the noise schedule, and how noise is added to latents.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   e ~ N(0, I),   a_t = prod_{s <= t} (1 - beta_s)      (2006.11239, eq. 4)

a_t, the paper's alpha-bar, falls from almost 1 (a clean image) to almost 0 (noise alone).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sd.config import ScheduleConfig

Generators = torch.Generator | list[torch.Generator] | None

LAST_ALPHA_BAR = 2**-24  # of a schedule that ends in noise alone


def make_generators(seed: int | None, batch_size: int) -> list[torch.Generator]:
    """One random generator per image, seeded with seed, seed + 1, ...; with a random seed if it is None."""
    if seed is None:
        seed = torch.Generator().seed() % 2**32
    return [torch.Generator().manual_seed(int(seed) + i) for i in range(batch_size)]


def draw_noise(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Standard normal noise (B, ...) in float32, drawn on the CPU: a seed gives the same image on every device. A list
    has one generator per image. Raises ValueError if its length is not B."""
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"generator should have {shape[0]} generators, one per image, not {len(generator)}.")
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generator])
    return torch.randn(shape, generator=generator)


def add_noise(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e (2006.11239, eq. 4): x_0 and noise (B, C, h, w), alpha_bar (B, 1, 1, 1)."""
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def make_betas(schedule: ScheduleConfig) -> Tensor:
    """The variances beta_0 ... beta_999 of the forward process. Raises ValueError for an unknown `beta_schedule`.

    "scaled_linear" is linear in sqrt(beta), as in the latent diffusion code; "linear" is 2006.11239, section 4.
    """
    start, end, n = schedule.beta_start, schedule.beta_end, schedule.num_training_steps
    if schedule.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, n) ** 2
    elif schedule.beta_schedule == "linear":
        betas = torch.linspace(start, end, n)
    else:
        raise ValueError(f'beta_schedule should be "scaled_linear" or "linear", not {schedule.beta_schedule!r}.')
    return rescale_to_zero_snr(betas) if schedule.rescale_betas_zero_snr else betas


def rescale_to_zero_snr(betas: Tensor) -> Tensor:
    """The variances (1000,), changed so that the last timestep is noise alone (2305.08891, algorithm 1).

    sqrt(a_t) is shifted so that it ends at 0, then scaled so that it begins where it did:

        sqrt(a_t)  ->  (sqrt(a_t) - sqrt(a_T)) sqrt(a_1) / (sqrt(a_1) - sqrt(a_T))

    The last a_t is 2^-24 instead of 0, as in diffusers: samplers divide by its root. It is a signal of 0.02 %.
    """
    signal = torch.cumprod(1 - betas, dim=0).sqrt()  # sqrt(a_t)
    first, last = signal[0], signal[-1]
    alpha_bar = ((signal - last) * first / (first - last)) ** 2
    alpha_bar[-1] = LAST_ALPHA_BAR
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def space_timesteps(n: int, total: int, spacing: str, offset: int = 0) -> np.ndarray:
    """n of the timesteps 0 ... total - 1, noisiest first, float64 (n,), in a spacing of 2305.08891, table 2:

    "leading"   0, k, 2k, ... for k = total // n, plus `offset` where there is room for it
    "trailing"  total - 1 and down, in equal steps of total / n, rounded
    "linspace"  total - 1 to 0 in equal steps, which may be fractions; 0 alone for n = 1

    Raises ValueError for an unknown spacing.
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
    """n noise levels, further apart where they are high, float64 (n,) (2206.00364, eq. 5):

    sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    """
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho
