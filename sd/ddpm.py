"""DDPM: the sampler of "Denoising diffusion probabilistic models" (2006.11239, algorithm 2). Read this sampler first.

In: x_t and the U-Net's output for it. Out: x at the next timestep, drawn from the posterior.
"""

from torch import Tensor

from sd.noise import draw_noise
from sd.sampler import Sampler


class DDPMSampler(Sampler):
    """Ancestral sampling: every step removes the predicted noise and adds a little fresh noise."""

    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """x_t, the U-Net's output for it -> x_{t'} ~ q(x_{t'} | x_t, x_0), a normal distribution with

        mean      sqrt(a_t') beta / (1 - a_t) x_0 + sqrt(alpha) (1 - a_t') / (1 - a_t) x_t
        variance  (1 - a_t') / (1 - a_t) beta                                        (2006.11239, eq. 6 and 7)

        Here alpha = a_t / a_t' and beta = 1 - alpha. For t' = t - 1 they are the paper's alpha_t and beta_t; for longer
        steps, alpha is the product of the alphas in between. After the last step a_t' = 1, and no noise is added.
        """
        a_t, a_next = self.alpha_bar[i], self.alpha_bar[i + 1]
        alpha = a_t / a_next
        beta = 1 - alpha

        denoised, _ = self.x0_and_noise(a_t, latents, output)
        mean = (a_next.sqrt() * beta * denoised + alpha.sqrt() * (1 - a_next) * latents) / (1 - a_t)
        if a_next == 1:
            return mean
        variance = (1 - a_next) / (1 - a_t) * beta
        return mean + variance.sqrt() * draw_noise(latents.shape, self.generator).to(latents.device)
