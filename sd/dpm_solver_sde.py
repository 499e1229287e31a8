"""SDE-DPM-Solver++(2M): the multistep solver of "DPM-Solver++" (2211.01095) with fresh noise in every step.

In: x_t and the U-Net's output for it. Out: x at the next timestep.
"""

from torch import Tensor

from sd.dpm_solver import DPMSolverSampler
from sd.sampler import draw_noise


class DPMSolverSDESampler(DPMSolverSampler):
    """DPM-Solver++(2M) for the SDE of diffusion instead of its ODE: noise corrects what earlier steps got wrong."""

    default_steps = 30

    def update(self, i: int, latents: Tensor, denoised: Tensor) -> Tensor:
        """x_t = sigma_t / sigma_s exp(-h) x_s + alpha_t (1 - exp(-2 h)) D + sigma_t sqrt(1 - exp(-2 h)) z,  z ~ N(0, I)

        in the symbols of `DPMSolverSampler.step`, with the same D (2211.01095, SDE-DPM-Solver++(2M)).
        """
        alpha_t, alpha_s = self.a[i + 1].sqrt(), self.a[i].sqrt()
        sigma_t = alpha_t * self.sigmas[i + 1]
        decay = self.sigmas[i + 1] / self.sigmas[i]  # exp(-h), for these sigmas are exp(-lambda)
        latents = alpha_t / alpha_s * decay**2 * latents + alpha_t * (1 - decay**2) * denoised
        if sigma_t > 0:
            noise = draw_noise(latents.shape, self.generator).to(latents.device)
            latents = latents + sigma_t * (1 - decay**2).sqrt() * noise
        return latents


class DPMSolverSDEKarrasSampler(DPMSolverSDESampler):
    """SDE-DPM-Solver++(2M) at the noise levels of 2206.00364, eq. 5; the U-Net sees the nearest whole timesteps."""

    karras = True
