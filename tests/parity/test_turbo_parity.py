"""SD-Turbo's sampling, Euler's method on trailing timesteps, against diffusers' scheduler with its settings."""

import pytest
import torch

from sd import generate
from sd.config import SD_TURBO
from sd.samplers import SAMPLERS
from tests.parity.test_pipeline_parity import PLAIN_PROMPT
from tests.support.synthetic import SD2_MICRO, random_models

diffusers = pytest.importorskip("diffusers")

SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


def smooth(latents, timestep):
    """Replaces the U-Net."""
    return torch.tanh(0.8 * latents + float(timestep) / 500 - 1)


@pytest.mark.parametrize("steps, timesteps", [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_one_two_and_four_steps(steps, timesteps):
    sampler, scheduler = SAMPLERS["euler"](schedule=SD_TURBO.schedule), diffusers.EulerDiscreteScheduler(**SETTINGS)
    sampler.set_inference_timesteps(steps)
    scheduler.set_timesteps(steps)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist() == timesteps
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = noise * scheduler.init_noise_sigma
    # Ours starts with the standard deviation sqrt(sigma^2 + 1) instead: 0.2 % more.
    ours = theirs * sampler.alpha_bar[0].sqrt()
    for t in scheduler.timesteps:
        ours = sampler.step(t, ours, smooth(ours, t))
        output = smooth(scheduler.scale_model_input(theirs, t), t)
        theirs = scheduler.step(output, t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_its_defaults_are_one_step_without_guidance():
    models = random_models(SD2_MICRO)
    models.config = type(models.config)(
        models.config.text, models.config.vae, models.config.unet, SD_TURBO.schedule, SD_TURBO.sampling, 64
    )
    default = generate(PLAIN_PROMPT, models=models, seed=1)
    spelled = generate(
        PLAIN_PROMPT, models=models, seed=1, sampler_name="euler", n_inference_steps=1, cfg_scale=1.0, do_cfg=False
    )
    assert (default == spelled).all()
