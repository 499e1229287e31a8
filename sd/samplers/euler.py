"""Euler's method, as in "Elucidating the design space of diffusion-based generative models" (2206.00364, algorithm 1).

In: x and its slope at a noise level. Out: x at the next.
"""

from torch import Tensor

from sd.sampler import SigmaSampler


class EulerSampler(SigmaSampler):
    """The simplest way to solve the ODE: as if the slope were the same all along the step."""

    def sigma_step(self, i: int, x: Tensor, slope: Tensor) -> Tensor:
        """x_{i+1} = x_i + (sigma_{i+1} - sigma_i) d_i     (2206.00364, algorithm 1, without its correction)

        This is DDIM's step without fresh noise, in other units: what differs is only which timesteps it visits.
        """
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * slope


class EulerKarrasSampler(EulerSampler):
    """Euler's method at the noise levels of 2206.00364, eq. 5."""

    karras = True
