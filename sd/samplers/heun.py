"""Heun's method, as in "Elucidating the design space of diffusion-based generative models" (2206.00364, algorithm 1).

In: x and its slope at a noise level. Out: x at the next. Every step but the last calls the U-Net twice, so `timesteps`
has 2 n - 1 entries for n steps.
"""

from torch import Tensor

from sd.sampler import SigmaSampler


class HeunSampler(SigmaSampler):
    """Looks ahead with Euler's method, then steps by the mean of the slopes at both ends: second order."""

    default_steps = 15

    def visits(self, n: int) -> list[int]:
        """0, 1, 1, 2, 2, ...: each timestep ends one step and begins the next."""
        return sorted([*range(n), *range(1, n)])

    def sigma_step(self, i: int, x: Tensor, slope: Tensor) -> Tensor:
        """One of the two calls that make a step from sigma to sigma' (2206.00364, algorithm 1):

        x' = x + (sigma' - sigma) d             and then, unless sigma' = 0, with the slope d' at this x':
        x' = x + (sigma' - sigma) (d + d') / 2
        """
        if i % 2 == 0:
            self.history = [x, slope]
            return x + (self.sigmas[i + 1] - self.sigmas[i]) * slope
        first_x, first_slope = self.history
        return first_x + (self.sigmas[i] - self.sigmas[i - 1]) * (first_slope + slope) / 2
