"""LCM: its timesteps and its limits. `tests/parity` compares its steps with those of diffusers."""

import re

import pytest
import torch

from sd.config import ScheduleConfig
from sd.samplers import SAMPLERS
from sd.samplers.lcm import boundary_scalings

few_steps = pytest.mark.parametrize("name", ["lcm", "tcd"])


@few_steps
@pytest.mark.parametrize("steps, timesteps", [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])])
def test_timesteps(name, steps, timesteps):
    sampler = SAMPLERS[name]()
    sampler.set_inference_timesteps(steps)
    assert sampler.timesteps.tolist() == timesteps


@few_steps
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_do_not_depend_on_the_schedule(name, spacing, zero_snr):
    schedule = ScheduleConfig(rescale_betas_zero_snr=zero_snr, timestep_spacing=spacing)
    assert SAMPLERS[name](schedule=schedule).timesteps.tolist() == [999, 759, 499, 259]


@few_steps
def test_strength_starts_later_and_takes_as_many_steps(name):
    sampler = SAMPLERS[name]()
    sampler.set_strength(0.5)
    assert (sampler.timesteps.tolist(), sampler.skipped) == ([499, 379, 259, 139], 25)
    sampler.set_strength(0.04)  # only two timesteps are left
    assert (sampler.timesteps.tolist(), sampler.skipped) == ([39, 19], 48)
    sampler.set_strength(0.001)
    assert (sampler.timesteps.tolist(), sampler.skipped) == ([19], 49)
    sampler.set_strength(1)  # not of what was left
    assert (sampler.timesteps.tolist(), sampler.skipped) == ([999, 759, 499, 259], 0)
    with pytest.raises(ValueError, match="strength should be above 0 and at most 1, not 1.5"):
        sampler.set_strength(1.5)


@few_steps
def test_at_most_50_steps(name):
    sampler = SAMPLERS[name]()
    with pytest.raises(ValueError, match="^The number of steps should be a whole number from 1 to 50, not 51.$"):
        sampler.set_inference_timesteps(51)
    assert len(sampler.timesteps) == 4


def test_the_boundary():
    """At timestep 0 the consistency function returns its input; where the U-Net works, x_0."""
    assert boundary_scalings(0) == (1, 0)
    c_skip, c_out = boundary_scalings(19)
    assert c_skip == pytest.approx(7e-6, rel=0.02)
    assert c_out == pytest.approx(0.999997, abs=1e-6)


def test_a_consistency_model_draws_in_one_step_what_it_draws_in_four():
    """If the model finds the end of the ODE, more steps only repeat that: here, all data is one image."""
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for steps in (1, 4):
        sampler = SAMPLERS["lcm"](torch.Generator().manual_seed(1))
        sampler.set_inference_timesteps(steps)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        for i, timestep in enumerate(sampler.timesteps):
            a_t = sampler.alpha_bar[i]
            latents = sampler.step(timestep, latents, (latents - a_t.sqrt() * image) / (1 - a_t).sqrt())
        torch.testing.assert_close(latents, image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match=f"^eta should be from 0 to 1, not {re.escape(repr(eta))}.$"):
        SAMPLERS["tcd"](eta=eta)


def test_without_eta_there_is_no_fresh_noise():
    runs = []
    for seed in (1, 2):
        sampler = SAMPLERS["tcd"](torch.Generator().manual_seed(seed), eta=0)
        latents = torch.ones(1, 4, 8, 8)
        for timestep in sampler.timesteps:
            latents = sampler.step(timestep, latents, torch.tanh(latents))
        runs.append(latents)
    assert torch.equal(*runs)
