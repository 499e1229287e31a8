"""DDPM: the sampler of "Denoising diffusion probabilistic models" (2006.11239, algorithm 2).

In: x_t and the noise that the U-Net predicts in it. Out: x at the next timestep, drawn from the posterior.
"""

import torch
from torch import Tensor

from sd.sampler import Sampler, draw_noise


class DDPMSampler(Sampler):
    """Ancestral sampling: every step removes the predicted noise and adds a little fresh noise."""

    def step(self, timestep: int | Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        """x_t, predicted noise -> x_{t'} ~ q(x_{t'} | x_t, x_0), a normal distribution (2006.11239, eq. 6 and 7):

        mean      sqrt(a_t') beta / (1 - a_t) x_0 + sqrt(alpha) (1 - a_t') / (1 - a_t) x_t
        variance  (1 - a_t') / (1 - a_t) beta

        where alpha = a_t / a_t' and beta = 1 - alpha: for t' = t - 1 the paper's alpha_t and beta_t, and for the longer
        steps taken here the product of those skipped. After the last step there is no noise: a_t' = 1.
        """
        t = int(timestep)
        previous = t - self.stride
        a_t = self.alphas_cumprod[t]
        a_previous = self.alphas_cumprod[previous] if previous >= 0 else torch.ones(())
        alpha = a_t / a_previous
        beta = 1 - alpha

        denoised, _ = self.predict(t, latents, noise)
        mean = (a_previous.sqrt() * beta * denoised + alpha.sqrt() * (1 - a_previous) * latents) / (1 - a_t)
        if previous < 0:
            return mean
        variance = (1 - a_previous) / (1 - a_t) * beta
        return mean + variance.sqrt() * draw_noise(tuple(latents.shape), self.generator).to(latents.device)
