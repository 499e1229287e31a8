"""Euler's method."""

import pytest
import torch

from sd.sampler import at_karras_levels
from sd.samplers.ddim import DDIMSampler
from sd.samplers.euler import EulerSampler
from tests.support.gaussian import order_of_convergence


def test_step_follows_the_slope():
    sampler = EulerSampler()
    sampler.set_inference_timesteps(10)
    sigma, sigma_next = sampler.sigmas[:2]
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    x = latents * (1 + sigma**2).sqrt() + (sigma_next - sigma) * noise
    torch.testing.assert_close(sampler.step(999, latents, noise), x / (1 + sigma_next**2).sqrt())


def test_last_step_gives_the_prediction():
    sampler = EulerSampler()
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    denoised, _ = sampler.predict(0, latents, noise)
    torch.testing.assert_close(sampler.step(0, latents, noise), denoised)


def test_it_is_ddim_in_other_units(monkeypatch):
    monkeypatch.setattr(DDIMSampler, "steps_offset", 0)
    monkeypatch.setattr(EulerSampler, "spacing", "leading")
    ddim, euler = DDIMSampler(), EulerSampler()
    euler.set_inference_timesteps(50)
    assert euler.timesteps.tolist() == ddim.timesteps.tolist()
    ours = theirs = torch.randn(1, 4, 8, 8)
    for t in ddim.timesteps:
        ours, theirs = euler.step(t, ours, ours.tanh()), ddim.step(t, theirs, theirs.tanh())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", [EulerSampler, at_karras_levels(EulerSampler)])
def test_first_order(sampler):
    assert order_of_convergence(sampler(), 80) == pytest.approx(1, abs=0.1)
