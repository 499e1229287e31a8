"""DDIM: the sampler of "Denoising diffusion implicit models" (2010.02502).

In: x_t and the U-Net's output for it. Out: x at the next timestep, with as much fresh noise as `eta` says.
"""

from typing import Any

from torch import Tensor

from sd.noise import draw_noise
from sd.sampler import Sampler


class DDIMSampler(Sampler):
    """Goes to the predicted image, then back out to the next noise level along the predicted noise.

    `eta`, from 0 to 1, is the share of fresh noise: with 0 the image depends on the first latents alone, with 1 this
    is DDPM. Raises ValueError for another `eta`.

    The last step ends at a_t = 1, without noise, as in the paper's eq. 12 and by default in diffusers' `DDIMScheduler`
    (which ends at a_0 when it takes more than half of the training steps). The settings published with Stable
    Diffusion (`set_alpha_to_one` false) end at a_0 = `alphas_cumprod[0]`, and so leave sqrt(1 - a_0) = 0.03 of the
    predicted noise in the latents.
    """

    steps_offset = 1

    def __init__(self, *args: Any, eta: float = 0.0, **kwargs: Any):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta should be from 0 to 1, not {eta!r}.")
        super().__init__(*args, **kwargs)
        self.eta = eta

    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """x_t -> x_{t'} (2010.02502, eq. 12, whose alpha_t is a_t here):

        x_{t'} = sqrt(a_t') x_0 + sqrt(1 - a_t' - sigma^2) e + sigma z,    z ~ N(0, I)
        sigma  = eta sqrt((1 - a_t') / (1 - a_t)) sqrt(1 - a_t / a_t')     (eq. 16)
        """
        a_t, a_next = self.alpha_bar[i], self.alpha_bar[i + 1]
        denoised, noise = self.x0_and_noise(a_t, latents, output)
        sigma = self.eta * ((1 - a_next) / (1 - a_t) * (1 - a_t / a_next)).sqrt()
        latents = a_next.sqrt() * denoised + (1 - a_next - sigma**2).sqrt() * noise
        if sigma > 0:
            latents = latents + sigma * draw_noise(latents.shape, self.generator).to(latents.device)
        return latents
