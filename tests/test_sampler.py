"""The noise schedule and what all samplers share."""

import sys
import warnings

import numpy as np
import pytest
import torch

from scripts import demo
from sd.checkpoints.files import write_checkpoint
from sd.config import SD15, ScheduleConfig
from sd.ddpm import DDPMSampler
from sd.sampler import at_karras_levels
from sd.samplers import SAMPLERS
from sd.samplers.euler import EulerSampler
from tests.support.synthetic import MICRO, random_state


def make_sampler(**schedule):
    return DDPMSampler(torch.Generator().manual_seed(0), schedule=ScheduleConfig(**schedule))


def test_alphas_cumprod_fall_from_almost_one_to_almost_zero():
    a = make_sampler().alphas_cumprod
    assert a[0].item() == pytest.approx(1 - 0.00085)
    assert a[-1].item() == pytest.approx(0.0047, abs=1e-4)
    # The largest sigma of seeds' LMS table, sqrt((1 - a) / a) at timestep 999.
    assert ((1 - a[-1]) / a[-1]).sqrt().item() == pytest.approx(14.6146, abs=1e-3)
    assert (a.diff() < 0).all()


def test_defaults_of_stable_diffusion():
    sampling, schedule = SD15.sampling, SD15.schedule
    assert (sampling.sampler, sampling.steps, sampling.cfg_scale) == ("dpm++2m", 20, 7.5)
    assert (schedule.num_training_steps, schedule.beta_start, schedule.beta_end) == (1000, 0.00085, 0.012)
    assert (schedule.beta_schedule, schedule.prediction_type) == ("scaled_linear", "epsilon")


def test_timesteps_lead():
    sampler = make_sampler()
    sampler.set_inference_timesteps(50)
    assert sampler.timesteps.tolist() == list(range(980, -1, -20))
    sampler.set_inference_timesteps(1000)
    assert sampler.timesteps.tolist() == list(range(999, -1, -1))
    with pytest.warns(UserWarning, match="^With 1 step"):
        sampler.set_inference_timesteps(1)
    assert sampler.timesteps.tolist() == [0]


def test_karras_timesteps_belong_to_the_sigmas():
    """At a whole timestep the level is that timestep's own; between two the logarithm of sigma is interpolated."""
    sampler = at_karras_levels(EulerSampler)()
    sampler.set_inference_timesteps(12)
    a = sampler.alphas_cumprod
    log_sigmas = ((1 - a) / a).log() / 2
    low = sampler.timesteps.floor().long().clamp(max=998)
    expected = torch.lerp(log_sigmas[low], log_sigmas[low + 1], sampler.timesteps - low)
    torch.testing.assert_close(sampler.sigmas[:-1].log(), expected, rtol=0, atol=1e-3)
    assert sampler.timesteps[[0, -1]].tolist() == [999, 0]


def test_fractional_timesteps_have_interpolated_sigmas():
    sampler = EulerSampler()
    sampler.set_inference_timesteps(15)
    a = sampler.alphas_cumprod
    sigmas = ((1 - a) / a).sqrt()
    assert sampler.timesteps[7] == 499.5
    assert sampler.sigmas[7].item() == pytest.approx((sigmas[499] + sigmas[500]).item() / 2, rel=1e-5)
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    for timestep in (499.5, 100.5):  # one that it visits, one that it does not
        sigma = (sigmas[int(timestep)] + sigmas[int(timestep) + 1]) / 2
        expected = (latents + sigma * noise) / (1 + sigma**2).sqrt()
        torch.testing.assert_close(sampler.add_noise(latents, timestep, noise), expected)


def test_strength_skips_the_noisiest_steps():
    sampler = make_sampler()
    sampler.set_inference_timesteps(50)
    sampler.set_strength(0.6)
    assert sampler.timesteps.tolist() == list(range(580, -1, -20))
    assert sampler.skipped == 20
    sampler.set_strength(1)  # not of what was left, but of all steps
    assert len(sampler.timesteps) == 50
    assert sampler.skipped == 0
    sampler.set_strength(0.001)
    assert sampler.timesteps.tolist() == [0]
    assert sampler.skipped == 49


@pytest.mark.parametrize(
    "steps, strength, visited", [(5, 0.5, 2), (5, 0.7, 3), (3, 0.9, 2), (10, 0.99, 9), (7, 0.25, 1), (4, 0.2, 1)]
)
def test_strength_cuts_to_whole_steps(steps, strength, visited):
    sampler = make_sampler()
    sampler.set_inference_timesteps(steps)
    last = sampler.timesteps[steps - visited :].tolist()
    sampler.set_strength(strength)
    assert sampler.timesteps.tolist() == last
    assert sampler.skipped == steps - visited


@pytest.mark.parametrize("number", [float, np.float32])
@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100])
def test_a_whole_number_of_steps_is_not_cut_by_rounding(steps, number):
    """0.58 of 50 steps is 29, although 50 * 0.58 is 28.999999999999996 to a computer."""
    sampler = make_sampler()
    sampler.set_inference_timesteps(steps)
    for percent in range(1, 101):
        if percent * steps % 100 == 0:
            sampler.set_strength(number(percent / 100))
            assert len(sampler.timesteps) == percent * steps // 100


def test_add_noise_is_the_forward_process():
    sampler = make_sampler()
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    a = sampler.alphas_cumprod[700]
    torch.testing.assert_close(sampler.add_noise(latents, 700, noise), a.sqrt() * latents + (1 - a).sqrt() * noise)
    # One timestep per image gives each what it would get alone.
    both = sampler.add_noise(latents, torch.tensor([10, 900]), noise)
    torch.testing.assert_close(both[1:], sampler.add_noise(latents[1:], 900, noise[1:]))


def test_add_noise_draws_from_the_generator():
    latents = torch.zeros(1, 4, 8, 8)
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler()
    a = sampler.alphas_cumprod[999]
    torch.testing.assert_close(sampler.add_noise(latents, 999), (1 - a).sqrt() * expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_predict_finds_what_add_noise_mixed(prediction_type, timestep):
    sampler = make_sampler(prediction_type=prediction_type)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    noisy = sampler.add_noise(latents, timestep, noise)
    a = sampler.alphas_cumprod[timestep]
    output = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    denoised, predicted_noise = sampler.predict(timestep, noisy, output)
    torch.testing.assert_close(denoised, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predicted_noise, noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "20", None])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="number of steps should be a whole number from 1 to 1000"):
        make_sampler().set_inference_timesteps(steps)


@pytest.mark.parametrize(
    "name, steps, first",
    [
        ("ddpm", 501, "500"),
        ("ddim", 501, "501"),
        ("plms", 600, "600"),
        ("ddpm", 666, "665"),
        ("ddpm", 1, "0"),
        ("ddim", 1, "1"),
        ("euler", 1, "0"),
        ("heun_karras", 1, "0"),
    ],
)
def test_a_run_that_starts_with_less_noise_than_there_is_warns(name, steps, first):
    plural = "" if steps == 1 else "s"
    sentence = (
        f"^With {steps} step{plural} this sampler starts at timestep {first}, where the U-Net expects less noise than "
        "a run starts from: take 2 to 500 or 1000 steps, or a trailing timestep_spacing.$"
    )
    sampler = SAMPLERS[name]()
    with pytest.warns(UserWarning, match=sentence) as caught:
        sampler.set_inference_timesteps(steps)
    assert len(caught) == 1


@pytest.mark.filterwarnings("default:With 1 step this sampler starts")
def test_the_demo_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "micro.ckpt", random_state(MICRO), MICRO.to_dict())
    monkeypatch.chdir(tmp_path)
    options = ["--checkpoint", "micro.ckpt", "--steps", "1", "--sampler", "euler", "--device", "cpu", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["demo.py", "a cat", *options])
    assert demo.main() == 0
    said = [line for line in capsys.readouterr().err.split("\n") if line.startswith("demo.py: ")]
    assert said == [
        "demo.py: With 1 step this sampler starts at timestep 0, where the U-Net expects less noise than a run starts "
        "from: take 2 to 500 or 1000 steps, or a trailing --spacing."
    ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_usual_numbers_of_steps_do_not_warn(name):
    sampler = SAMPLERS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = range(1, 51) if sampler.max_steps == 50 else (*range(2, 501), 1000)
        for steps in usual:
            sampler.set_inference_timesteps(steps)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan")])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match="strength should be above 0 and at most 1"):
        make_sampler().set_strength(strength)
