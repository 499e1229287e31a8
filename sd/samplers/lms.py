"""LMS: the linear multistep method of k-diffusion for the ODE of 2206.00364.

In: x and its slope at a noise level. Out: x at the next. PLMS weighs past outputs as if all steps had equal length;
this method computes the weights for the actual noise levels.
"""

import math
from typing import Any

from numpy.polynomial import Polynomial
from torch import Tensor

from sd.sampler import SigmaSampler

MAX_REACH = 2  # a step is at most this many times as long as the distance between its first and last slope


def lms_weights(sigmas: list[float], sigma_next: float) -> list[float]:
    """The weights of the slopes at `sigmas`, the latest first, for a step from sigmas[0] to `sigma_next`.

    The polynomial through all slopes is sum_j d_j l_j, where Lagrange's l_j is 1 at sigma_j and 0 at the other levels.
    The weight of slope j is the integral of l_j over the step.
    """
    weights = []
    for j, sigma in enumerate(sigmas):
        others = sigmas[:j] + sigmas[j + 1 :]
        factors = (Polynomial([-other, 1]) / (sigma - other) for other in others)
        lagrange = math.prod(factors, start=Polynomial([1]))
        integral = lagrange.integ()
        weights.append(float(integral(sigma_next) - integral(sigmas[0])))
    return weights


class LMSSampler(SigmaSampler):
    """The Adams-Bashforth method on uneven steps.

    `order`, from 1 to 4, is the number of slopes it keeps; 1 is Euler's method. Raises ValueError for another order.
    """

    def __init__(self, *args: Any, order: int = 4, **kwargs: Any):
        if order not in (1, 2, 3, 4):
            raise ValueError(f"order should be 1, 2, 3 or 4, not {order!r}.")
        super().__init__(*args, **kwargs)
        self.order = order

    def sigma_step(self, i: int, x: Tensor, slope: Tensor) -> Tensor:
        """x_{i+1} = x_i + sum_j w_j d_{i-j},    w_j the integral of l_j from sigma_i to sigma_{i+1}

        over the last `order` slopes, or fewer at the start of a run. With many Karras levels, the last step, to
        sigma = 0, is up to a hundred times as long as those before it. There, the polynomial through their slopes would
        multiply rounding errors by up to a million, so such a step is Euler's.
        """
        self.history = [slope, *self.history[: self.order - 1]]
        sigma_next, *sigmas = self.sigmas[: i + 2].tolist()[::-1]
        sigmas = sigmas[: len(self.history)]
        if sigmas[0] - sigma_next > MAX_REACH * (sigmas[-1] - sigmas[0]):
            sigmas = sigmas[:1]
        return x + sum(weight * d for weight, d in zip(lms_weights(sigmas, sigma_next), self.history))
