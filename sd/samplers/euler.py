"""Euler's method (2206.00364, algorithm 1), and its ancestral variant from k-diffusion.

In: x and its slope at a noise level. Out: x at the next.
"""

from torch import Tensor

from sd.noise import draw_noise
from sd.sampler import SigmaSampler


class EulerSampler(SigmaSampler):
    """The simplest way to solve the ODE: the slope is taken as constant over the step."""

    def sigma_step(self, i: int, x: Tensor, slope: Tensor) -> Tensor:
        """x_{i+1} = x_i + (sigma_{i+1} - sigma_i) d_i     (2206.00364, algorithm 1, without its correction)

        This is DDIM's step without fresh noise, written for x = x_0 + sigma e; only the timesteps differ.
        """
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * slope


class EulerAncestralSampler(SigmaSampler):
    """Euler's method with fresh noise in every step: it steps down too far, then adds noise. The image does
    not converge: more steps keep changing it."""

    def sigma_step(self, i: int, x: Tensor, slope: Tensor) -> Tensor:
        """x_{i+1} = x_i + (sigma_down - sigma_i) d_i + sigma_up z,    z ~ N(0, I), where

        sigma_up^2   = sigma_{i+1}^2 (sigma_i^2 - sigma_{i+1}^2) / sigma_i^2
        sigma_down^2 = sigma_{i+1}^2 - sigma_up^2 = (sigma_{i+1}^2 / sigma_i)^2

        sigma_up is the noise of DDPM, or of DDIM with eta = 1 (2010.02502, eq. 16), divided by sqrt(a_{i+1}).
        """
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        sigma_up = sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
        sigma_down = sigma_next**2 / sigma
        x = x + (sigma_down - sigma) * slope
        if sigma_up > 0:
            x = x + sigma_up * draw_noise(x.shape, self.generator).to(x.device)
        return x
