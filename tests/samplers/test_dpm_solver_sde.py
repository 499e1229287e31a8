"""SDE-DPM-Solver++(2M)."""

import torch

from sd.samplers.dpm_solver import DPMSolverSampler, DPMSolverSDESampler


def make_sampler(steps=10, sampler=DPMSolverSDESampler):
    sampler = sampler(torch.Generator().manual_seed(0))
    sampler.set_inference_timesteps(steps)
    return sampler


def test_steps_are_those_of_the_paper():
    """Of first order, then of second, with the D of DPM-Solver++(2M)."""
    sampler = make_sampler(4)
    t = sampler.timesteps
    a = sampler.alphas_cumprod[t]
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    h = (alpha / sigma).log().diff()
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 4, 8, 8)
    generator = torch.Generator().manual_seed(0)

    def step(i, x, d):
        fresh = torch.randn(1, 4, 8, 8, generator=generator)
        decay = 1 - (-2 * h[i]).exp()
        mean = sigma[i + 1] / sigma[i] * (-h[i]).exp() * x + alpha[i + 1] * decay * d
        return mean + sigma[i + 1] * decay.sqrt() * fresh

    x_0 = (latents - sigma[0] * noise[0]) / alpha[0]
    x_1 = step(0, latents, x_0)
    torch.testing.assert_close(sampler.step(t[0], latents, noise[0]), x_1, rtol=1e-4, atol=1e-4)
    x_0_next = (x_1 - sigma[1] * noise[1]) / alpha[1]
    x_2 = step(1, x_1, x_0_next + h[1] / (2 * h[0]) * (x_0_next - x_0))
    torch.testing.assert_close(sampler.step(t[1], x_1, noise[1]), x_2, rtol=1e-4, atol=1e-4)


def test_it_keeps_the_noise_level():
    """With the true noise predicted, what is taken away and what is added make the next level again."""
    sampler = make_sampler()
    noise = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(1))
    x = (1 - sampler.alpha_bar[0]).sqrt() * noise
    for i, t in enumerate(sampler.timesteps[:-1]):
        x = sampler.step(t, x, x / (1 - sampler.alpha_bar[i]).sqrt())  # the picture is 0
        torch.testing.assert_close(x.std(), (1 - sampler.alpha_bar[i + 1]).sqrt(), rtol=0.01, atol=0)


def test_last_step_adds_no_noise():
    sde, ode = make_sampler(), make_sampler(sampler=DPMSolverSampler)
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    last = sde.timesteps[-1]
    torch.testing.assert_close(sde.step(last, latents, noise), ode.step(last, latents, noise))
