"""SD-Turbo's sampling, Euler's method on trailing timesteps, against diffusers' scheduler with its settings."""

from dataclasses import replace

import pytest
import torch

from sd import generate, pipeline
from sd.config import SD_TURBO, ScheduleConfig
from sd.request import Request
from sd.samplers import SAMPLERS
from tests.parity.test_pipeline_parity import PLAIN_PROMPT
from tests.parity.test_samplers_parity import (
    SHAPE,
    assert_same,
    diffusers_trajectory,
    make_scheduler,
    our_trajectory,
)
from tests.support.synthetic import SD2_MICRO, random_models

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:With 1 step this sampler starts"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("name", ["euler_a", "dpm++2m"])
def test_other_samplers_with_this_spacing(name, spacing, steps, prediction_type):
    """As for Hyper-SD's LoRAs. diffusers' leading timesteps have an offset of 0 by default, too."""
    scheduler, timesteps = make_scheduler(name, steps, 1.0, prediction_type, timestep_spacing=spacing)
    schedule = ScheduleConfig(prediction_type=prediction_type, timestep_spacing=spacing)
    sampler = SAMPLERS[name](torch.Generator().manual_seed(3), schedule=schedule)
    sampler.set_inference_timesteps(steps)
    assert sampler.timesteps.tolist() == timesteps.tolist()
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    expected = diffusers_trajectory(scheduler, latents, timesteps, seed=3)
    assert_same(our_trajectory(sampler, latents), expected, 2e-5)


@pytest.mark.parametrize("name", ["euler_a", "dpm++2m"])
def test_the_spacing_of_a_request(name):
    models, drawn = random_models(SD2_MICRO), []
    for spacing in ("trailing", None):
        request = Request("a cat", sampler_name=name, n_inference_steps=2, seed=1, timestep_spacing=spacing)
        sampler, _, _ = pipeline.prepare(models, request)
        drawn.append(sampler.timesteps.tolist())
    assert drawn[0] == [999, 499]
    assert drawn[1] != drawn[0]
    turbo = replace(models, config=replace(models.config, schedule=SD_TURBO.schedule))
    assert pipeline.prepare(turbo, request)[0].timesteps.tolist() == drawn[0]  # the model's own


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
