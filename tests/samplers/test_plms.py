"""PLMS, against its formulas worked by hand."""

import pytest
import torch

from sd.config import ScheduleConfig
from sd.samplers.ddim import DDIMSampler
from sd.samplers.plms import ADAMS_BASHFORTH, PLMSSampler
from tests.support.gaussian import order_of_convergence

pytestmark = pytest.mark.filterwarnings("ignore:With 1 step this sampler starts")


def make_sampler(steps, **schedule):
    sampler = PLMSSampler(schedule=ScheduleConfig(**schedule))
    sampler.set_inference_timesteps(steps)
    return sampler


def ddim_step(sampler, t, latents, output):
    ddim = DDIMSampler(schedule=sampler.schedule)
    ddim.set_inference_timesteps(len(sampler.timesteps) - 1)
    return ddim.step(t, latents, output)


@pytest.mark.parametrize("steps, timesteps", [(1, [1]), (2, [501, 1, 1]), (4, [751, 501, 501, 251, 1])])
def test_the_second_timestep_comes_twice(steps, timesteps):
    assert make_sampler(steps).timesteps.tolist() == timesteps


def test_strength_begins_like_any_run():
    sampler = make_sampler(10)
    sampler.set_strength(0.3)
    assert sampler.timesteps.tolist() == [201, 101, 101, 1]
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    second = sampler.step(201, latents, noise)
    torch.testing.assert_close(sampler.step(101, second, noise), second)  # the same slope at both ends


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_outputs_are_extrapolated(prediction_type):
    """Every step is DDIM's, with a mixture of the outputs so far."""
    sampler = make_sampler(10, prediction_type=prediction_type)
    latents = torch.randn(1, 4, 8, 8)
    o = list(torch.randn(6, 1, 4, 8, 8))
    first = sampler.step(901, latents, o[0])
    torch.testing.assert_close(first, ddim_step(sampler, 901, latents, o[0]))
    again = sampler.step(801, first, o[1])
    torch.testing.assert_close(again, ddim_step(sampler, 901, latents, (o[0] + o[1]) / 2))
    mixtures = {
        801: (3 * o[2] - o[0]) / 2,
        701: (23 * o[3] - 16 * o[2] + 5 * o[0]) / 12,
        601: (55 * o[4] - 59 * o[3] + 37 * o[2] - 9 * o[0]) / 24,
        501: (55 * o[5] - 59 * o[4] + 37 * o[3] - 9 * o[2]) / 24,
    }
    for (t, mixture), output in zip(mixtures.items(), o[2:], strict=True):
        torch.testing.assert_close(sampler.step(t, latents, output), ddim_step(sampler, t, latents, mixture))


def test_weights_add_up():
    assert [len(weights) for weights in ADAMS_BASHFORTH] == [1, 2, 3, 4]
    assert [sum(weights) for weights in ADAMS_BASHFORTH] == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_ends_at_the_lowest_level_of_training(steps):
    sampler = make_sampler(steps)
    x_0, noise = torch.randn(2, 1, 4, 8, 8)
    x = sampler.add_noise(x_0, sampler.timesteps[0], noise)
    for t in sampler.timesteps:
        x = sampler.step(t, x, noise)
    torch.testing.assert_close(x, sampler.add_noise(x_0, 0, noise), rtol=0, atol=1e-3)


def test_second_order():
    assert order_of_convergence(PLMSSampler(), 160) == pytest.approx(2, abs=0.2)
