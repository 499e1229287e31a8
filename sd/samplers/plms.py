"""PLMS: the linear multistep method of "Pseudo numerical methods for diffusion models on manifolds" (2202.09778).

In: x_t and the U-Net's output for it. Out: x at the next timestep. It was the default of the original Stable Diffusion
and is implemented as it was there: with a simpler start than the paper's, and ending at a_0 instead of 1.
"""

import torch
from torch import Tensor

from sd.sampler import Sampler

# The weights of one, two, three and four outputs, the latest first (2202.09778, eq. 12, for four).
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class PLMSSampler(Sampler):
    """DDIM's step with a better output: the last four outputs, extrapolated over the step."""

    steps_offset = 1

    def visits(self, n: int) -> list[int]:
        """0, 1, 1, 2, 3, ...: the first step has no earlier outputs, so it is taken again once its end is known."""
        return [*range(min(n, 2)), *range(1, n)]

    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """x_t -> x_{t'} = sqrt(a_t') x_0 + sqrt(1 - a_t') e, with x_0 and e from this combination of outputs:

        e'_t = (55 e_t - 59 e_{t+d} + 37 e_{t+2d} - 9 e_{t+3d}) / 24,    d = t - t'             (2202.09778, eq. 12)

        The outputs may predict e or v. Until there are four, Adams-Bashforth methods of lower order are used.
        The first step is taken twice, the second time with the mean of the outputs at its two ends.
        """
        if i == 0:
            self.first_latents = latents
        if i == 1:
            i, latents = 0, self.first_latents
            output = (output + self.history[0]) / 2
        else:
            self.history = [output, *self.history[:3]]
            weights = ADAMS_BASHFORTH[len(self.history) - 1]
            output = sum(weight * e for weight, e in zip(weights, self.history))
        a_next = torch.minimum(self.alpha_bar[i + 1], self.alphas_cumprod[0])
        denoised, noise = self.x0_and_noise(self.alpha_bar[i], latents, output)
        return a_next.sqrt() * denoised + (1 - a_next).sqrt() * noise
