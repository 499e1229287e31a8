"""TCD: the sampler of "Trajectory consistency distillation" (2402.19159), for U-Nets distilled to need few steps.

In: x_t and the U-Net's output for it. Out: x at the next timestep, with as much fresh noise as `eta` says.
"""

from typing import Any

from torch import Tensor

from sd.noise import draw_noise
from sd.samplers.lcm import LCMSampler


class TCDSampler(LCMSampler):
    """Strategic stochastic sampling: goes further than the next timestep, then back to it with fresh noise.

    `eta`, the paper's gamma, from 0 to 1, says how much further: with 0 there is no fresh noise, with 1 each step goes
    to the image, as LCM does. More is better for more steps. Raises ValueError for another `eta`.

    The timesteps are LCM's. Like the published scheduler, a run ends at a_0, with 3 % of the predicted noise.
    """

    def __init__(self, *args: Any, eta: float = 0.3, **kwargs: Any):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta should be from 0 to 1, not {eta!r}.")
        super().__init__(*args, **kwargs)
        self.eta = eta

    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """x_t -> x_s -> x_{t'}, with s = (1 - eta) t' rounded down (2402.19159, algorithm 4):

        x_s    = sqrt(a_s) x_0 + sqrt(1 - a_s) e
        x_{t'} = sqrt(a_t' / a_s) x_s + sqrt(1 - a_t' / a_s) z,    z ~ N(0, I)
        """
        last = i + 1 == len(self.timesteps)
        t_next = 0 if last else int(self.timesteps[i + 1])
        a_next, a_s = self.alphas_cumprod[[t_next, int((1 - self.eta) * t_next)]]
        denoised, noise = self.x0_and_noise(self.alpha_bar[i], latents, output)
        latents = a_s.sqrt() * denoised + (1 - a_s).sqrt() * noise
        if a_next < a_s:
            noise = draw_noise(latents.shape, self.generator).to(latents.device)
            latents = (a_next / a_s).sqrt() * latents + (1 - a_next / a_s).sqrt() * noise
        return latents
