"""DPM-Solver++(2M), against the paper's formulas worked by hand."""

import pytest
import torch

from sd.sampler import at_karras_levels
from sd.samplers.dpm_solver import DPMSolverSampler
from tests.support.gaussian import order_of_convergence


def make_sampler(steps, sampler=DPMSolverSampler):
    sampler = sampler()
    sampler.set_inference_timesteps(steps)
    return sampler


def test_timesteps_leave_out_the_last_of_one_more():
    assert make_sampler(20).timesteps.tolist() == [round(999 * i / 20) for i in range(20, 0, -1)]
    assert make_sampler(1).timesteps.tolist() == [999]
    assert make_sampler(1000).timesteps.tolist() == list(range(999, -1, -1))


def test_karras_timesteps_are_whole_and_sigmas_reach_from_end_to_end():
    sampler = make_sampler(50, at_karras_levels(DPMSolverSampler))
    assert sampler.timesteps.dtype == torch.long
    assert sampler.timesteps[[0, -1]].tolist() == [999, 0]
    assert (sampler.timesteps.diff() == 0).any()  # two levels may round to one timestep,
    assert (sampler.sigmas.diff() < 0).all()  # but remain two


def test_steps_are_those_of_the_paper():
    """2211.01095, algorithm 2: of first order, then of second."""
    sampler = make_sampler(4)
    t = sampler.timesteps
    a = sampler.alphas_cumprod[t]
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    lam = (alpha / sigma).log()
    h = lam.diff()
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 4, 8, 8)

    x_0 = (latents - sigma[0] * noise[0]) / alpha[0]
    x_1 = sigma[1] / sigma[0] * latents - alpha[1] * ((-h[0]).exp() - 1) * x_0
    torch.testing.assert_close(sampler.step(t[0], latents, noise[0]), x_1)

    r = h[0] / h[1]
    d = (1 + 1 / (2 * r)) * (x_1 - sigma[1] * noise[1]) / alpha[1] - 1 / (2 * r) * x_0
    x_2 = sigma[2] / sigma[1] * x_1 - alpha[2] * ((-h[1]).exp() - 1) * d
    torch.testing.assert_close(sampler.step(t[1], x_1, noise[1]), x_2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_last_step_gives_the_prediction(steps):
    sampler = make_sampler(steps)
    latents = torch.randn(1, 4, 8, 8)
    for t in sampler.timesteps:
        denoised, _ = sampler.predict(t, latents, latents.tanh())
        latents = sampler.step(t, latents, latents.tanh())
    torch.testing.assert_close(latents, denoised)


def test_second_order():
    """At Karras's levels, which end at the same sigma for any n: with equal steps the last level falls with n."""
    assert order_of_convergence(at_karras_levels(DPMSolverSampler)(), 40) == pytest.approx(2, abs=0.15)
