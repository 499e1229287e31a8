"""Samplers on a schedule that ends in noise alone (2305.08891), against diffusers' schedulers on the same one."""

import pytest
import torch

from sd.config import ScheduleConfig
from sd.noise import LAST_ALPHA_BAR, make_betas
from sd.samplers import SAMPLERS

diffusers = pytest.importorskip("diffusers")

from tests.parity.test_samplers_parity import SHAPE, assert_same, diffusers_trajectory, our_trajectory  # noqa: E402

SCHEDULE = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
OPTIONS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OPTIONS |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def v_of(latents, timestep):
    """Replaces a U-Net that predicts v: a smooth function of unit scale."""
    return torch.tanh(0.8 * latents + timestep / 500 - 1)


def first_latents():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def test_the_schedule():
    alpha_bar = torch.cumprod(1 - make_betas(SCHEDULE), dim=0)
    theirs = diffusers.DDIMScheduler(**OPTIONS).alphas_cumprod
    assert theirs[-1] == 0
    torch.testing.assert_close(alpha_bar, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha_bar[-1].item(), LAST_ALPHA_BAR, rtol=1e-4, atol=0)


@pytest.mark.parametrize("exact", [False, True], ids=["a_T = 0", "a_T = 2^-24"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_ddim_with_trailing_timesteps(steps, exact):
    """diffusers' DDIM takes a_T = 0. Ours is 2^-24, so that sigmas are finite: a signal of 2^-12 = 0.02 %."""
    sampler = SAMPLERS["ddim"](schedule=SCHEDULE)
    sampler.set_inference_timesteps(steps)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **OPTIONS)
    if exact:
        scheduler.alphas_cumprod[-1] = LAST_ALPHA_BAR
    scheduler.set_timesteps(steps)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    assert sampler.timesteps[0] == 999
    expected = diffusers_trajectory(scheduler, first_latents(), scheduler.timesteps, 0, v_of)
    assert_same(our_trajectory(sampler, first_latents(), v_of), expected, 5e-6 if exact else 1e-3)


def test_euler():
    """It starts at sigma = 4096, the root of (1 - a_T) / a_T, where float32 keeps a few digits less."""
    sampler = SAMPLERS["euler"](schedule=SCHEDULE)
    sampler.set_inference_timesteps(20)
    scheduler = diffusers.EulerDiscreteScheduler(**OPTIONS)
    scheduler.set_timesteps(20)
    expected = diffusers_trajectory(scheduler, first_latents(), scheduler.timesteps, 0, v_of)
    assert_same(our_trajectory(sampler, first_latents(), v_of), expected, 5e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_at_noise_alone(name):
    assert SAMPLERS[name](schedule=SCHEDULE).timesteps[0] == 999


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_at_the_image_of_a_perfect_prediction(name):
    """A U-Net that knows the one image of its data set: x_0 = 0.5 everywhere, so v = sqrt(a) e - sqrt(1 - a) x_0."""
    sampler = SAMPLERS[name](torch.Generator().manual_seed(1), schedule=SCHEDULE)
    sampler.set_inference_timesteps(20)
    latents = first_latents()
    for t in sampler.timesteps:
        a = sampler.alpha_bar_at(t)
        noise = (latents - a.sqrt() * 0.5) / (1 - a).sqrt()
        latents = sampler.step(t, latents, a.sqrt() * noise - (1 - a).sqrt() * 0.5)
    assert latents.isfinite().all()
    left = 0.15 if name in ("plms", "tcd") else 0.05  # these end at a_0, with 3 % of the noise
    torch.testing.assert_close(latents, torch.full(SHAPE, 0.5), rtol=0, atol=left)
