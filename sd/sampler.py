"""What all samplers share: the noise schedule, the timesteps to visit, and the way from prediction to picture.

A sampler walks from noise to latents. At every timestep it takes the noisy latents x_t and what the U-Net predicts for
them, and gives x at the next, less noisy timestep. All of them work in the space in which the U-Net was trained,

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,    e ~ N(0, I),    a_t = prod_{s <= t} (1 - beta_s)

(2006.11239, eq. 4; `alphas_cumprod` is a_t), so whoever calls them need not know which algorithm is at work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sd.config import ScheduleConfig

Generators = torch.Generator | list[torch.Generator] | None


def draw_noise(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Standard normal noise (B, ...) in float32, drawn on the CPU: a seed gives the same picture on every device.

    With a list of B generators, image i gets the noise that its own generator would give it alone.
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


class Sampler(ABC):
    """The base of all samplers: an algorithm adds `step`, and `default_steps` where 50 is not its own best number."""

    default_steps = 50

    def __init__(
        self,
        generator: Generators = None,
        num_training_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        schedule: ScheduleConfig | None = None,
    ):
        """`generator` draws the noise: one for all, or a list with one per image. `schedule` overrides the numbers."""
        self.schedule = schedule or ScheduleConfig(num_training_steps, beta_start, beta_end)
        if self.schedule.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f'prediction_type should be "epsilon" or "v_prediction", not {self.schedule.prediction_type!r}.'
            )
        self.generator = generator
        self.betas = make_betas(self.schedule)  # (1000,)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # (1000,)
        self.set_inference_timesteps(self.default_steps)

    def set_inference_timesteps(self, n: int) -> None:
        """Chooses the n timesteps to visit, noisiest first: 980, 960, ... 20, 0 for n = 50 of 1000.

        Raises ValueError unless 1 <= n <= the number of training steps.
        """
        total = self.schedule.num_training_steps
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= total:
            raise ValueError(f"The number of steps should be a whole number from 1 to {total}, not {n!r}.")
        self.stride = total // n
        self.timesteps = torch.arange(n).flip(0) * self.stride  # (n,)
        self._all_timesteps = self.timesteps

    def set_strength(self, strength: float) -> None:
        """Skips the first, noisiest steps, so that image-to-image keeps something of its image.

        strength is in (0, 1]: 1 visits all timesteps, 0.6 the last 60 % of them, and at least one is always left.
        Raises ValueError for another strength.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength should be above 0 and at most 1, not {strength!r}.")
        n = len(self._all_timesteps)
        kept = max(1, int(n * strength))
        self.timesteps = self._all_timesteps[n - kept :]

    def add_noise(self, latents: Tensor, timestep: int | Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents x_0 (B, C, h, w) -> x_t, in one go: sqrt(a_t) x_0 + sqrt(1 - a_t) e (2006.11239, eq. 4).

        `timestep` is one for all or one per image, (B,); `noise` is drawn from the generator when it is None.
        """
        if noise is None:
            noise = draw_noise(tuple(latents.shape), self.generator)
        a_t = self.alphas_cumprod[timestep].to(latents.device).reshape(-1, 1, 1, 1)
        return a_t.sqrt() * latents + (1 - a_t).sqrt() * noise.to(latents.device)

    def predict(self, timestep: int | Tensor, latents: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """What the U-Net's output says: the denoised latents x_0 and the noise e in x_t, each (B, C, h, w).

        epsilon:      e = output,  x_0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t)                (2006.11239, eq. 15)
        v_prediction: x_0 = sqrt(a_t) x_t - sqrt(1 - a_t) v,  e = sqrt(a_t) v + sqrt(1 - a_t) x_t  (2202.00512, app. D)
        """
        a_t = self.alphas_cumprod[int(timestep)]
        signal, noise_level = a_t.sqrt(), (1 - a_t).sqrt()
        if self.schedule.prediction_type == "v_prediction":
            return signal * latents - noise_level * output, signal * output + noise_level * latents
        return (latents - noise_level * output) / signal, output

    @abstractmethod
    def step(self, timestep: int | Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        """Latents x_t (B, C, h, w) and the U-Net's output for them -> x at the next timestep, the same shape."""
