"""What all samplers share: which timesteps a run visits, and how a prediction turns into an image without noise.

At each timestep a sampler takes the noisy latents x_t and the U-Net's output for them, and returns the latents at the
next, less noisy timestep. For callers, latents are always x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, as in the training of
the U-Net (`sd.noise`; a_t is `alpha_bar`). `SigmaSampler` is for papers that use the noise level sigma:

    x = x_t / sqrt(a_t) = x_0 + sigma_t e,    sigma_t = sqrt((1 - a_t) / a_t)

A run starts from x_t ~ N(0, I). There x has the standard deviation sqrt(sigma_max^2 + 1); other implementations may
start with sigma_max, which is 0.2 % less.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from sd.config import PREDICTION_TYPES, ScheduleConfig
from sd.noise import Generators, add_noise, draw_noise, karras_sigmas, make_betas, space_timesteps
from sd.runtime import warn


class Sampler(ABC):
    """The base of all samplers. A subclass implements `take_step`, and overrides the defaults below where needed."""

    default_steps = 50  # or the number of training steps, if that is less
    max_steps: float = math.inf  # the same
    spacing = "leading"  # see `noise.space_timesteps`
    steps_offset = 0  # of leading timesteps
    whole_timesteps = True  # False: the U-Net gets fractional timesteps, between those it was trained on
    karras = False  # True: noise levels by `noise.karras_sigmas`, and timesteps that match them

    def __init__(
        self,
        generator: Generators = None,
        num_training_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        schedule: ScheduleConfig | None = None,
    ):
        """`generator`: one for all images, or a list of one per image. `schedule` replaces the three numbers. Raises
        ValueError for an unknown prediction type or beta schedule."""
        self.schedule = schedule or ScheduleConfig(num_training_steps, beta_start, beta_end)
        if self.schedule.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f'prediction_type should be "epsilon" or "v_prediction", not {self.schedule.prediction_type!r}.'
            )
        self.generator = generator
        self.betas = make_betas(self.schedule)  # (1000,)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # (1000,)
        # numpy computes schedules in float64; the tensors are float32, because MPS has no float64.
        a_t = self.alphas_cumprod.numpy().astype(float)
        self._training_sigmas = np.sqrt((1 - a_t) / a_t)  # (1000,)
        self.set_inference_timesteps(min(self.default_steps, self.schedule.num_training_steps))

    def set_inference_timesteps(self, n: int) -> None:
        """Chooses the n timesteps to visit, noisiest first (DDPM with n = 50: 980, 960, ... 20, 0).

        Warns if the first timestep has far less noise than a run starts from. Raises ValueError unless n is from 1 to
        the number of training steps, or to `max_steps`.
        """
        most = min(self.max_steps, self.schedule.num_training_steps)
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
            raise ValueError(f"The number of steps should be a whole number from 1 to {most}, not {n!r}.")
        self.steps = n
        timesteps = self.choose_timesteps(n)
        self.visit(timesteps)
        _warn_of_a_late_start(timesteps, self.schedule.num_training_steps)

    def visit(self, timesteps: np.ndarray) -> None:
        """Prepares runs that visit these timesteps (n,), noisiest first, and forgets the run before."""
        n, total = len(timesteps), self.schedule.num_training_steps
        sigmas = np.interp(timesteps, np.arange(total), self._training_sigmas)
        if self.karras:
            sigmas = karras_sigmas(n, sigmas[0], sigmas[-1])
            timesteps = np.interp(np.log(sigmas), np.log(self._training_sigmas), np.arange(total))
        if self.whole_timesteps:
            self._all_timesteps = torch.tensor(timesteps.round(), dtype=torch.long)  # (n,)
        else:
            self._all_timesteps = torch.tensor(timesteps, dtype=torch.float32)  # (n,)
        self._all_sigmas = np.append(sigmas, 0)  # (n + 1,): no noise after the last step
        self._start(0)

    def set_strength(self, strength: float) -> None:
        """Skips the noisiest steps, so that image-to-image keeps part of its image: strength 0.6 visits the last 60 %
        of the timesteps, and at least one. Raises ValueError unless 0 < strength <= 1."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength should be above 0 and at most 1, not {strength!r}.")
        n = len(self._all_timesteps)
        self._start(n - max(1, int(n * strength + 1e-4)))  # 50 * 0.58 is 28.999999999999996, and means 29

    def choose_timesteps(self, n: int) -> np.ndarray:
        """n timesteps, noisiest first, float64 (n,)."""
        spacing = self.schedule.timestep_spacing or self.spacing
        if spacing == "leading" and self.schedule.rescale_betas_zero_snr:
            spacing = "trailing"  # "leading" skips the only timestep that is noise alone (2305.08891, section 3.3)
        timesteps = space_timesteps(n, self.schedule.num_training_steps, spacing, self.steps_offset)
        return timesteps.round() if self.whole_timesteps else timesteps

    def visits(self, n: int) -> list[int]:
        """The order in which n timesteps are visited: some subclasses visit some of them twice."""
        return list(range(n))

    def _start(self, first: int) -> None:
        """Prepares a run that begins at timestep number `first` of n, and forgets the run before."""
        n = len(self._all_timesteps)
        visits = [first + i for i in self.visits(n - first)]
        sigmas = self._all_sigmas[[*visits, n]]
        self.skipped = first  # how many of the n timesteps strength left out
        self.timesteps = self._all_timesteps[visits]  # (m,)
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)  # (m + 1,): 0 at the end
        self.alpha_bar = torch.tensor(1 / (1 + sigmas**2), dtype=torch.float32)  # (m + 1,): 1 at the end
        self.step_index = 0  # which of the m steps comes next
        self.history: list[Tensor] = []  # what a multistep algorithm keeps of earlier steps, the latest first

    def step(self, timestep: int | float | Tensor, latents: Tensor, output: Tensor) -> Tensor:
        """Latents x_t (B, C, h, w) and the U-Net's output for them -> the latents at the next timestep, same shape.
        Raises ValueError for a timestep that is not one of `timesteps`."""
        i = self._index_of(float(timestep))
        if i is None:
            raise ValueError(f"timestep should be one of the sampler's timesteps, not {float(timestep):g}.")
        if i == 0:
            self.history = []
        self.step_index = i + 1
        return self.take_step(i, latents, output)

    @abstractmethod
    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """Step i of the run: from `timesteps[i]`, where a_t is `alpha_bar[i]`, to where it is `alpha_bar[i + 1]`."""

    def add_noise(self, latents: Tensor, timestep: int | float | Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents x_0 (B, C, h, w) -> x_t in one step: sqrt(a_t) x_0 + sqrt(1 - a_t) e (2006.11239, eq. 4).

        `timestep`: one, or (B,). Without `noise`, it is drawn. Raises ValueError outside the training schedule.
        """
        if noise is None:
            noise = draw_noise(latents.shape, self.generator)
        return add_noise(latents, noise.to(latents.device), self.alpha_bar_at(timestep).to(latents.device))

    def predict(self, timestep: int | float | Tensor, latents: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The denoised latents x_0 and the noise e in x_t that the U-Net's output implies, each (B, C, h, w).
        `timestep` and its errors are those of `add_noise`."""
        return self.x0_and_noise(self.alpha_bar_at(timestep).to(latents.device), latents, output)

    def x0_and_noise(self, alpha_bar: Tensor, latents: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """`predict` for a known a_t:

        epsilon:      e = output,  x_0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t)                (2006.11239, eq. 15)
        v_prediction: x_0 = sqrt(a_t) x_t - sqrt(1 - a_t) v,  e = sqrt(a_t) v + sqrt(1 - a_t) x_t  (2202.00512, app. D)
        """
        signal, noise_level = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.schedule.prediction_type == "v_prediction":
            return signal * latents - noise_level * output, signal * output + noise_level * latents
        return (latents - noise_level * output) / signal, output

    def alpha_bar_at(self, timestep: int | float | Tensor) -> Tensor:
        """a_t at one timestep, (1, 1, 1, 1), or at one per image, (B, 1, 1, 1); float32, on the CPU. Raises ValueError
        for a timestep outside the training schedule."""
        last = self.schedule.num_training_steps - 1
        values = []
        for t in np.ravel(timestep.tolist() if isinstance(timestep, Tensor) else timestep).tolist():
            if not 0 <= t <= last:
                raise ValueError(f"timestep should be from 0 to {last}, not {t:g}.")
            i = self._index_of(t)
            if i is None:
                sigma = np.interp(t, np.arange(last + 1), self._training_sigmas)
                values.append(1 / (1 + sigma**2))
            else:
                values.append(self.alpha_bar[i].item())  # the run's own; rounding can make it differ from the schedule
        return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)

    def _index_of(self, timestep: float) -> int | None:
        """The step of the run at this timestep: the next step if it fits, otherwise the first that fits, or None."""
        timesteps = self.timesteps.tolist()
        if timestep in timesteps[self.step_index : self.step_index + 1]:
            return self.step_index
        return timesteps.index(timestep) if timestep in timesteps else None


class SigmaSampler(Sampler):
    """The base of samplers that are written for x = x_0 + sigma e. A subclass implements `sigma_step`.

    They solve dx / dsigma = (x - x_0) / sigma (2206.00364, eq. 1 and 3, for sigma(t) = t). This slope is the noise e.
    """

    default_steps = 30
    spacing = "linspace"
    whole_timesteps = False

    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """Converts x_t to x, takes one `sigma_step`, and converts back."""
        _, slope = self.x0_and_noise(self.alpha_bar[i], latents, output)
        x = self.sigma_step(i, latents / self.alpha_bar[i].sqrt(), slope)
        return self.alpha_bar[i + 1].sqrt() * x

    @abstractmethod
    def sigma_step(self, i: int, x: Tensor, slope: Tensor) -> Tensor:
        """x at the noise level sigmas[i], and dx / dsigma there -> x at sigmas[i + 1]; all (B, C, h, w)."""


def at_karras_levels(sampler: type[Sampler]) -> type[Sampler]:
    """The same algorithm at the noise levels of 2206.00364, eq. 5."""
    return type(f"Karras{sampler.__name__}", (sampler,), {"karras": True, "__module__": sampler.__module__})


def _warn_of_a_late_start(timesteps: np.ndarray, total: int) -> None:
    """Warns if the first timestep, plus one spacing, is below 2/3 of `total`. This can happen with leading timesteps,
    which are total // n apart: for n = 501 they cover 501 of 1000. diffusers visits the same ones."""
    n, first = len(timesteps), timesteps[0]
    if first + (first - timesteps[1] if n > 1 else 1) < 2 / 3 * total:
        warn(
            f"With {n} step{'s' * (n > 1)} this sampler starts at timestep {first:.4g}, where the U-Net expects less "
            f"noise than a run starts from: take 2 to {total // 2} or {total} steps, or a trailing timestep_spacing."
        )
