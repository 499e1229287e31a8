"""DPM-Solver++(2M), the multistep solver of "DPM-Solver++" (2211.01095, algorithm 2), and its stochastic variant.

In: x_t and the U-Net's output for it. Out: x at the next timestep.
"""

import numpy as np
from torch import Tensor

from sd.noise import draw_noise, space_timesteps
from sd.sampler import Sampler


class DPMSolverSampler(Sampler):
    """Extrapolates the predicted image from the last two predictions: second order, for one U-Net call a step."""

    default_steps = 20

    def choose_timesteps(self, n: int) -> np.ndarray:
        """The first n of n + 1 equally spaced timesteps: the last one, 0, is replaced by the end of the run. Trailing
        timesteps do not include 0."""
        total, spacing = self.schedule.num_training_steps, self.schedule.timestep_spacing or "linspace"
        if self.karras:
            return np.linspace(total - 1, 0, n)  # `karras_sigmas` chooses the levels between the first and the last
        more = spacing != "trailing"
        return space_timesteps(min(n + more, total), total, spacing).round()[:n]

    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """x_s -> x_t (2211.01095, algorithm 2), with s one timestep, t the next, and r the one before s:

        x_t = sigma_t / sigma_s x_s - alpha_t (exp(-h) - 1) D
        D   = x_0(s) + h / (2 h_last) (x_0(s) - x_0(r)),    h = lambda_t - lambda_s,    h_last = lambda_s - lambda_r

        In the paper's symbols alpha_t = sqrt(a_t), sigma_t = sqrt(1 - a_t) and lambda_t = log(alpha_t / sigma_t). The
        first step has no x_0(r), and in the last step h is infinite: both are of first order, D = x_0(s).
        """
        denoised, _ = self.x0_and_noise(self.alpha_bar[i], latents, output)
        extrapolated = denoised
        if self.history and i + 1 < len(self.timesteps):
            lambda_r, lambda_s, lambda_t = -self.sigmas[i - 1 : i + 2].log()
            slope = (denoised - self.history[0]) / (lambda_s - lambda_r)
            extrapolated = denoised + (lambda_t - lambda_s) / 2 * slope
        self.history = [denoised]
        return self.update(i, latents, extrapolated)

    def update(self, i: int, latents: Tensor, denoised: Tensor) -> Tensor:
        """The first line of the formula, for D = `denoised`."""
        alpha_t, alpha_s = self.alpha_bar[i + 1].sqrt(), self.alpha_bar[i].sqrt()
        decay = self.sigmas[i + 1] / self.sigmas[i]  # exp(-h), because these sigmas are exp(-lambda)
        # sigma_t / sigma_s is written without 1 - a_t, which would lose digits near a_t = 1.
        return alpha_t / alpha_s * decay * latents - alpha_t * (decay - 1) * denoised


class DPMSolverSDESampler(DPMSolverSampler):
    """DPM-Solver++(2M) for the SDE of diffusion instead of its ODE: fresh noise corrects errors of earlier steps."""

    default_steps = 30

    def update(self, i: int, latents: Tensor, denoised: Tensor) -> Tensor:
        """x_t = sigma_t / sigma_s exp(-h) x_s + alpha_t (1 - exp(-2 h)) D + sigma_t sqrt(1 - exp(-2 h)) z,  z ~ N(0, I)

        in the symbols of `DPMSolverSampler.take_step`, with the same D (2211.01095, SDE-DPM-Solver++(2M)).
        """
        alpha_t, alpha_s = self.alpha_bar[i + 1].sqrt(), self.alpha_bar[i].sqrt()
        sigma_t = alpha_t * self.sigmas[i + 1]
        decay = self.sigmas[i + 1] / self.sigmas[i]  # exp(-h), because these sigmas are exp(-lambda)
        latents = alpha_t / alpha_s * decay**2 * latents + alpha_t * (1 - decay**2) * denoised
        if sigma_t > 0:
            noise = draw_noise(latents.shape, self.generator).to(latents.device)
            latents = latents + sigma_t * (1 - decay**2).sqrt() * noise
        return latents
