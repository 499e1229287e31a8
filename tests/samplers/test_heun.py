"""Heun's method."""

import pytest
import torch

from sd.sampler import at_karras_levels
from sd.samplers.heun import HeunSampler
from tests.support.gaussian import order_of_convergence


@pytest.mark.filterwarnings("ignore:With 1 step this sampler starts")
@pytest.mark.parametrize("steps, timesteps", [(1, [0]), (2, [999, 0, 0]), (4, [999, 666, 666, 333, 333, 0, 0])])
def test_all_but_the_first_timestep_come_twice(steps, timesteps):
    sampler = HeunSampler()
    sampler.set_inference_timesteps(steps)
    assert sampler.timesteps.tolist() == timesteps


def test_strength_counts_steps_not_calls():
    sampler = HeunSampler()
    sampler.set_inference_timesteps(10)
    sampler.set_strength(0.3)
    assert sampler.timesteps.tolist() == [222, 111, 111, 0, 0]


def test_two_halves_of_a_step():
    sampler = HeunSampler()
    sampler.set_inference_timesteps(4)
    sigma, sigma_next = sampler.sigmas[:2]
    latents, slope, slope_next = torch.randn(3, 1, 4, 8, 8)
    x, scale = latents * (1 + sigma**2).sqrt(), (1 + sigma_next**2).sqrt()
    ahead = sampler.step(999, latents, slope)
    torch.testing.assert_close(ahead, (x + (sigma_next - sigma) * slope) / scale)
    corrected = sampler.step(666, ahead, slope_next)
    torch.testing.assert_close(corrected, (x + (sigma_next - sigma) * (slope + slope_next) / 2) / scale)


@pytest.mark.parametrize("sampler", [HeunSampler, at_karras_levels(HeunSampler)])
def test_second_order(sampler):
    assert order_of_convergence(sampler(), 40) == pytest.approx(2, abs=0.15)
