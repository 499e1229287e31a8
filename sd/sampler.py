"""What all samplers share: the noise schedule, the timesteps to visit, and the way from prediction to picture.

A sampler walks from noise to latents. At every timestep it takes the noisy latents x_t and what the U-Net predicts for
them, and gives x at the next, less noisy timestep. All of them work in the space in which the U-Net was trained,

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,    e ~ N(0, I),    a_t = prod_{s <= t} (1 - beta_s)

(2006.11239, eq. 4; `alphas_cumprod` is a_t), so whoever calls them need not know which algorithm is at work. Many
papers divide this by sqrt(a_t) and speak of the noise level sigma alone:

    x_t / sqrt(a_t) = x_0 + sigma_t e,    sigma_t = sqrt((1 - a_t) / a_t)

`SigmaSampler` is the door for algorithms written that way. A run starts from N(0, I), which in their space is noise of
scale sqrt(sigma_max^2 + 1); other implementations of them may start at sigma_max, which is 0.2 % less.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from sd.config import PREDICTION_TYPES, ScheduleConfig
from sd.noise import Generators, draw_noise, karras_sigmas, make_betas, space_timesteps


def _warn_of_a_late_start(timesteps: np.ndarray, total: int) -> None:
    """Warns if a run of these timesteps, noisiest first, begins below two thirds of `total`, where one spacing above
    the first of them counts as its beginning.

    Leading timesteps are total // n apart and cover n (total // n): two thirds at least for n up to total / 2, but 501
    of 1000 where n is 501. A single one is 0 with most samplers. diffusers visits the same, so the numbers stay.
    """
    n, first = len(timesteps), timesteps[0]
    if first + (first - timesteps[1] if n > 1 else 1) < 2 / 3 * total:
        warnings.warn(
            f"With {n} step{'s' * (n > 1)} this sampler starts at timestep {first:.4g}, where the U-Net expects less "
            f"noise than a run starts from: take 2 to {total // 2} or {total} steps.",
            stacklevel=3,
        )


class Sampler(ABC):
    """The base of all samplers: an algorithm adds `step`, and overrides the defaults below where its own are others."""

    default_steps = 50  # or the number of training steps, if that is less
    spacing = "leading"
    steps_offset = 0  # of leading timesteps
    whole_timesteps = True  # False: the U-Net sees fractional ones, between those it was trained on
    karras = False  # True: noise levels by `karras_sigmas`, and timesteps that match them

    def __init__(
        self,
        generator: Generators = None,
        num_training_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        schedule: ScheduleConfig | None = None,
    ):
        """`generator` draws the noise: one for all, or a list with one per image. `schedule` overrides the numbers.

        Raises ValueError for an unknown prediction type or beta schedule.
        """
        self.schedule = schedule or ScheduleConfig(num_training_steps, beta_start, beta_end)
        if self.schedule.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f'prediction_type should be "epsilon" or "v_prediction", not {self.schedule.prediction_type!r}.'
            )
        self.generator = generator
        self.betas = make_betas(self.schedule)  # (1000,)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # (1000,)
        # Schedules are worked out by numpy in float64 and handed on as float32 tensors: MPS has no float64.
        a_t = self.alphas_cumprod.numpy().astype(float)
        self._training_sigmas = np.sqrt((1 - a_t) / a_t)  # (1000,)
        self.set_inference_timesteps(min(self.default_steps, self.schedule.num_training_steps))

    def set_inference_timesteps(self, n: int) -> None:
        """Chooses the n timesteps to visit, noisiest first (for DDPM and n = 50: 980, 960, ... 20, 0).

        Warns where more than the noisiest third of the timesteps is left out: a run starts from pure noise, which the
        U-Net would take for a picture with noise on it. Raises ValueError unless 1 <= n <= the number of training
        steps.
        """
        total = self.schedule.num_training_steps
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= total:
            raise ValueError(f"The number of steps should be a whole number from 1 to {total}, not {n!r}.")
        timesteps = self._choose_timesteps(n)
        sigmas = np.interp(timesteps, np.arange(total), self._training_sigmas)
        if self.karras:
            sigmas = karras_sigmas(n, sigmas[0], sigmas[-1])
            timesteps = np.interp(np.log(sigmas), np.log(self._training_sigmas), np.arange(total))
        if self.whole_timesteps:
            self._all_timesteps = torch.tensor(timesteps.round(), dtype=torch.long)  # (n,)
        else:
            self._all_timesteps = torch.tensor(timesteps, dtype=torch.float32)  # (n,)
        self._all_sigmas = np.append(sigmas, 0)  # (n + 1,): after the last step there is no noise
        self._start(0)
        _warn_of_a_late_start(timesteps, total)

    def set_strength(self, strength: float) -> None:
        """Skips the first, noisiest steps, so that image-to-image keeps something of its image.

        strength is in (0, 1]: 1 visits all timesteps, 0.6 the last 60 % of them, and at least one is always left.
        Raises ValueError for another strength.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength should be above 0 and at most 1, not {strength!r}.")
        n = len(self._all_timesteps)
        self._start(n - max(1, int(n * strength)))

    def add_noise(self, latents: Tensor, timestep: int | float | Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents x_0 (B, C, h, w) -> x_t, in one go: sqrt(a_t) x_0 + sqrt(1 - a_t) e (2006.11239, eq. 4).

        `timestep` is one for all or one per image, (B,); `noise` is drawn from the generator when it is None.
        Raises ValueError for a timestep that no U-Net was trained on.
        """
        if noise is None:
            noise = draw_noise(latents.shape, self.generator)
        a_t = self.alpha_bar_at(timestep).to(latents.device)  # (B, 1, 1, 1)
        return a_t.sqrt() * latents + (1 - a_t).sqrt() * noise.to(latents.device)

    def predict(self, timestep: int | float | Tensor, latents: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """What the U-Net's output says: the denoised latents x_0 and the noise e in x_t, each (B, C, h, w).

        epsilon:      e = output,  x_0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t)                (2006.11239, eq. 15)
        v_prediction: x_0 = sqrt(a_t) x_t - sqrt(1 - a_t) v,  e = sqrt(a_t) v + sqrt(1 - a_t) x_t  (2202.00512, app. D)

        `timestep` and its errors are those of `add_noise`.
        """
        return self.x0_and_noise(self.alpha_bar_at(timestep).to(latents.device), latents, output)

    def alpha_bar_at(self, timestep: int | float | Tensor) -> Tensor:
        """a_t at one timestep, (1, 1, 1, 1), or at one per image, (B, 1, 1, 1); float32, on the CPU.

        Where the run visits a timestep, the level that it has there counts: rounding may have parted the two. Raises
        ValueError for a timestep that no U-Net was trained on.
        """
        last = self.schedule.num_training_steps - 1
        a = []
        for t in np.ravel(timestep.tolist() if isinstance(timestep, Tensor) else timestep).tolist():
            if not 0 <= t <= last:
                raise ValueError(f"timestep should be from 0 to {last}, not {t:g}.")
            i = self._find(t)
            if i is None:
                sigma = np.interp(t, np.arange(last + 1), self._training_sigmas)
                a.append(1 / (1 + sigma**2))
            else:
                a.append(self.alpha_bar[i].item())
        return torch.tensor(a, dtype=torch.float32).reshape(-1, 1, 1, 1)

    @abstractmethod
    def step(self, timestep: int | float | Tensor, latents: Tensor, output: Tensor) -> Tensor:
        """Latents x_t (B, C, h, w) and the U-Net's output for them -> x at the next timestep, the same shape.

        Raises ValueError for a timestep that is not one of `timesteps`.
        """

    def _choose_timesteps(self, n: int) -> np.ndarray:
        timesteps = space_timesteps(n, self.schedule.num_training_steps, self.spacing, self.steps_offset)
        return timesteps.round() if self.whole_timesteps else timesteps

    def _visits(self, n: int) -> list[int]:
        """In which order the U-Net is asked about n timesteps: an algorithm may ask about one of them twice."""
        return list(range(n))

    def _start(self, first: int) -> None:
        """Makes ready for a run that begins at this one of the n timesteps, and forgets the run before."""
        n = len(self._all_timesteps)
        visits = [first + i for i in self._visits(n - first)]
        sigmas = self._all_sigmas[[*visits, n]]
        self.skipped = first  # how many of the n timesteps strength left out
        self.timesteps = self._all_timesteps[visits]  # (m,)
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)  # (m + 1,)
        self.alpha_bar = torch.tensor(1 / (1 + sigmas**2), dtype=torch.float32)  # (m + 1,): 1 at the end
        self.history: list[Tensor] = []  # what a multistep algorithm remembers of the steps before, the latest first
        self._next = 0

    def _advance(self, timestep: int | float | Tensor) -> int:
        """For `step`: where in `timesteps` this one stands; the run goes on behind it."""
        i = self._find(float(timestep))
        if i is None:
            raise ValueError(f"timestep should be one of the sampler's timesteps, not {float(timestep):g}.")
        if i == 0:
            self.history = []
        self._next = i + 1
        return i

    def _find(self, timestep: float) -> int | None:
        """Where in `timesteps` this one stands; of two places, the one that the run has still to reach."""
        timesteps = self.timesteps.tolist()
        for start in (self._next, 0):
            if timestep in timesteps[start:]:
                return timesteps.index(timestep, start)
        return None

    def x0_and_noise(self, a_t: Tensor, latents: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """`predict`, for whom a_t is known."""
        signal, noise_level = a_t.sqrt(), (1 - a_t).sqrt()
        if self.schedule.prediction_type == "v_prediction":
            return signal * latents - noise_level * output, signal * output + noise_level * latents
        return (latents - noise_level * output) / signal, output


class SigmaSampler(Sampler):
    """The base of samplers that are written for x = x_0 + sigma e: an algorithm adds `sigma_step`.

    They solve the ODE along which x loses its noise (2206.00364, eq. 1 and 3, for sigma(t) = t):

        dx / dsigma = (x - x_0) / sigma

    whose right-hand side is the predicted noise e.
    """

    default_steps = 30
    spacing = "linspace"
    whole_timesteps = False

    def step(self, timestep: int | float | Tensor, latents: Tensor, output: Tensor) -> Tensor:
        """As `Sampler.step`: into the space of sigmas, one `sigma_step`, and back."""
        i = self._advance(timestep)
        _, slope = self.x0_and_noise(self.alpha_bar[i], latents, output)
        x = self.sigma_step(i, latents / self.alpha_bar[i].sqrt(), slope)
        return self.alpha_bar[i + 1].sqrt() * x

    @abstractmethod
    def sigma_step(self, i: int, x: Tensor, slope: Tensor) -> Tensor:
        """x at the noise level sigmas[i], and dx / dsigma there -> x at sigmas[i + 1]; all (B, C, h, w)."""
