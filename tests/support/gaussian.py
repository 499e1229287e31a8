"""Data for which denoising has a known solution, to measure samplers by: every value is N(0, SCALE^2)."""

import math

import torch

SCALE = 0.5


def best_output(x, a_t):
    """What a perfect U-Net predicts for x_t: the mean of e given x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e."""
    return (1 - a_t).sqrt() * x / (a_t * SCALE**2 + 1 - a_t)


def error(sampler, steps):
    """By how much a run misses the ODE's solution, which keeps x_t / sqrt(a_t SCALE^2 + 1 - a_t) as it was.

    It is judged at the last timestep. What remains is one step to no noise at all, whose length hardly depends on n.
    """
    sampler.set_inference_timesteps(steps)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ratio = []
    for i, t in enumerate(sampler.timesteps):
        ratio.append((x / (sampler.alpha_bar[i] * SCALE**2 + 1 - sampler.alpha_bar[i]).sqrt()).item())
        x = sampler.step(t, x, best_output(x, sampler.alpha_bar[i]))
    return abs(ratio[-1] / ratio[0] - 1)


def order_of_convergence(sampler, steps):
    """p, where halving the steps' length divides the error by 2^p."""
    return math.log2(error(sampler, steps) / error(sampler, 2 * steps))
