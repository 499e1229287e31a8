"""Ancestral Euler."""

import torch

from sd.samplers.ddim import DDIMSampler
from sd.samplers.euler import EulerAncestralSampler


def make_sampler(steps=10):
    sampler = EulerAncestralSampler(torch.Generator().manual_seed(0))
    sampler.set_inference_timesteps(steps)
    return sampler


def test_it_goes_down_too_far_and_back_up():
    """What it adds has the right size: with the true noise predicted, the noise level of x is sigma_{i+1} again."""
    sampler = make_sampler()
    noise = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(sampler.timesteps[:-1]):
        x = sampler.step(t, (1 - sampler.alpha_bar[i]).sqrt() * noise, noise)  # the picture is 0
        torch.testing.assert_close(x.std(), (1 - sampler.alpha_bar[i + 1]).sqrt(), rtol=0.01, atol=0)
        correlation = (x * noise).mean() / x.std()
        expected = sampler.sigmas[i + 1] / sampler.sigmas[i]  # sigma_down / sigma_{i+1}: what is left of the old noise
        torch.testing.assert_close(correlation, expected, rtol=0, atol=0.01)


def test_it_is_ddim_with_eta_1(monkeypatch):
    monkeypatch.setattr(DDIMSampler, "steps_offset", 0)
    monkeypatch.setattr(EulerAncestralSampler, "spacing", "leading")
    ddim, euler_a = DDIMSampler(torch.Generator().manual_seed(0), eta=1), make_sampler(50)
    ours = theirs = torch.randn(1, 4, 8, 8)
    for t in ddim.timesteps:
        ours, theirs = euler_a.step(t, ours, ours.tanh()), ddim.step(t, theirs, theirs.tanh())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_last_step_adds_no_noise():
    sampler = make_sampler()
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    denoised, _ = sampler.predict(0, latents, noise)
    torch.testing.assert_close(sampler.step(0, latents, noise), denoised)
