"""One DDPM step, against the paper's formulas worked by hand."""

import pytest
import torch

from sd.ddpm import DDPMSampler


def make_sampler(steps, seed=0):
    sampler = DDPMSampler(torch.Generator().manual_seed(seed))
    sampler.set_inference_timesteps(steps)
    return sampler


def test_step_is_the_posterior_of_the_paper():
    """2006.11239, eq. 7, with beta_t and alpha_t read from the schedule itself: every step is visited."""
    sampler = make_sampler(1000)
    t = 400
    beta, a, a_previous = sampler.betas[t], sampler.alphas_cumprod[t], sampler.alphas_cumprod[t - 1]
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    x_0 = (latents - (1 - a).sqrt() * noise) / a.sqrt()
    mean = a_previous.sqrt() * beta / (1 - a) * x_0 + (1 - beta).sqrt() * (1 - a_previous) / (1 - a) * latents
    variance = (1 - a_previous) / (1 - a) * beta
    fresh = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampler.step(t, latents, noise), mean + variance.sqrt() * fresh, rtol=1e-4, atol=1e-5)


def test_last_step_adds_no_noise_and_gives_the_prediction():
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    results = [make_sampler(50, seed).step(0, latents, noise) for seed in (1, 2)]
    assert torch.equal(*results)
    denoised, _ = make_sampler(50).predict(0, latents, noise)
    torch.testing.assert_close(results[0], denoised)


@pytest.mark.parametrize("steps", [10, 250])
def test_the_right_noise_leads_back_to_the_latents(steps):
    """A denoiser that knows x_0 must arrive at x_0, whatever noise is added on the way."""
    sampler = make_sampler(steps)
    x_0 = torch.randn(2, 4, 8, 8)
    x = torch.randn(2, 4, 8, 8)
    for t in sampler.timesteps:
        a = sampler.alphas_cumprod[t]
        x = sampler.step(t, x, (x - a.sqrt() * x_0) / (1 - a).sqrt())
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-4)


def test_keeps_the_dtype_and_never_makes_float64():
    latents = torch.randn(1, 4, 8, 8)
    assert make_sampler(5).step(torch.tensor(600), latents, latents).dtype == torch.float32
