"""Whole trajectories of our samplers against diffusers' schedulers, with the same denoiser and the same noise."""

import pytest
import torch

from sd.config import ScheduleConfig
from sd.ddpm import DDPMSampler

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 8, 8)


def denoiser(latents, timestep):
    """Stands in for the U-Net: any smooth function of unit scale that depends on both its inputs."""
    return torch.tanh(0.8 * latents + timestep / 500 - 1)


def diffusers_trajectory(scheduler, latents, timesteps, seed):
    generator = torch.Generator().manual_seed(seed)
    trajectory = []
    for t in timesteps:
        latents = scheduler.step(denoiser(latents, t), t, latents, generator=generator).prev_sample
        trajectory.append(latents)
    return trajectory


def our_trajectory(sampler, latents):
    trajectory = []
    for t in sampler.timesteps:
        latents = sampler.step(t, latents, denoiser(latents, t))
        trajectory.append(latents)
    return trajectory


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_ddpm(steps, strength, beta_schedule, prediction_type):
    schedule = ScheduleConfig(beta_schedule=beta_schedule, prediction_type=prediction_type)
    sampler = DDPMSampler(torch.Generator().manual_seed(3), schedule=schedule)
    sampler.set_inference_timesteps(steps)
    sampler.set_strength(strength)
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        timestep_spacing="leading",
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    start = steps - max(1, int(steps * strength))
    assert sampler.timesteps.tolist() == scheduler.timesteps[start:].tolist()

    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    first = sampler.timesteps[0]
    noisy = sampler.add_noise(latents, first, noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, first[None]), rtol=0, atol=1e-6)

    expected = diffusers_trajectory(scheduler, noisy, sampler.timesteps, seed=3)
    actual = our_trajectory(sampler, noisy)
    worst = max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))
    print(f"maximum relative difference {worst:.1e}")  # shown by pytest -rP
    assert worst <= 1e-5
