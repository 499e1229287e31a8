"""DDIM, against the paper's formulas worked by hand."""

import pytest
import torch

from sd.ddpm import DDPMSampler
from sd.samplers.ddim import DDIMSampler
from tests.support.gaussian import order_of_convergence


def make_sampler(steps=10, seed=0, **options):
    sampler = DDIMSampler(torch.Generator().manual_seed(seed), **options)
    sampler.set_inference_timesteps(steps)
    return sampler


def test_timesteps_lead_by_one():
    assert make_sampler(50).timesteps.tolist() == list(range(981, 0, -20))
    assert make_sampler(1000).timesteps.tolist() == list(range(999, -1, -1))  # there is no room for the one


@pytest.mark.parametrize("eta", [0, 0.3, 1])
def test_step_is_the_one_of_the_paper(eta):
    """2010.02502, eq. 12 and 16."""
    sampler = make_sampler(eta=eta)
    a, a_previous = sampler.alphas_cumprod[601], sampler.alphas_cumprod[501]
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    sigma = eta * ((1 - a_previous) / (1 - a)).sqrt() * (1 - a / a_previous).sqrt()
    x_0 = (latents - (1 - a).sqrt() * noise) / a.sqrt()
    fresh = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = a_previous.sqrt() * x_0 + (1 - a_previous - sigma**2).sqrt() * noise + sigma * fresh
    torch.testing.assert_close(sampler.step(601, latents, noise), expected, rtol=1e-4, atol=1e-5)


def test_eta_1_is_ddpm(monkeypatch):
    """The same mean and the same variance at every step, where both visit the same timesteps."""
    monkeypatch.setattr(DDIMSampler, "steps_offset", 0)
    ddim, ddpm = make_sampler(20, eta=1), DDPMSampler(torch.Generator().manual_seed(0))
    ddpm.set_inference_timesteps(20)
    ours = theirs = torch.randn(1, 4, 8, 8)
    for t in ddpm.timesteps:
        ours, theirs = ddim.step(t, ours, ours.tanh()), ddpm.step(t, theirs, theirs.tanh())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_first_order():
    assert order_of_convergence(DDIMSampler(), 80) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="eta should be from 0 to 1, not"):
        DDIMSampler(eta=eta)
