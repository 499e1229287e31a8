"""Data for which denoising has a known solution, to measure the error of samplers: every value is N(0, SCALE^2)."""

import math

import torch

SCALE = 0.5


def best_output(x, a_t):
    """What a perfect U-Net predicts for x_t: the mean of e given x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e."""
    return (1 - a_t).sqrt() * x / (a_t * SCALE**2 + 1 - a_t)


def consistent_output(x, a_t):
    """What a perfect consistency model predicts for x_t: the e that leads to the x_0 at the end of the ODE through x_t,
    which keeps x_t / sqrt(a_t SCALE^2 + 1 - a_t) constant."""
    x_0 = SCALE * x / (a_t * SCALE**2 + 1 - a_t).sqrt()
    return (x - a_t.sqrt() * x_0) / (1 - a_t).sqrt()


def error(sampler, steps):
    """The relative error of a run. The exact solution of the ODE keeps x_t / sqrt(a_t SCALE^2 + 1 - a_t) constant.

    The error is measured at the last timestep. The step after it, to zero noise, has about the same length for every
    number of steps.
    """
    sampler.set_inference_timesteps(steps)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ratio = []
    for i, t in enumerate(sampler.timesteps):
        ratio.append((x / (sampler.alpha_bar[i] * SCALE**2 + 1 - sampler.alpha_bar[i]).sqrt()).item())
        x = sampler.step(t, x, best_output(x, sampler.alpha_bar[i]))
    return abs(ratio[-1] / ratio[0] - 1)


def order_of_convergence(sampler, steps):
    """p, if steps of half the length divide the error by 2^p."""
    return math.log2(error(sampler, steps) / error(sampler, 2 * steps))
