"""What must hold for every sampler, whatever its algorithm is."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd.config import ScheduleConfig
from sd.ddpm import DDPMSampler
from sd.samplers import SAMPLERS
from sd.samplers.ddim import DDIMSampler
from sd.samplers.dpm_solver import DPMSolverSampler, DPMSolverSDESampler
from sd.samplers.euler import EulerAncestralSampler, EulerSampler
from sd.samplers.heun import HeunSampler
from sd.samplers.lcm import LCMSampler
from sd.samplers.lms import LMSSampler
from sd.samplers.plms import PLMSSampler
from sd.samplers.tcd import TCDSampler
from tests.support.marks import slow

pytestmark = pytest.mark.filterwarnings("ignore:With 1 step this sampler starts")

STOCHASTIC = ("ddpm", "euler_a", "dpm++2m_sde", "dpm++2m_sde_karras", "lcm", "tcd")
FEW_STEPS = ("lcm", "tcd")
ASKS_TWICE = ("plms", "heun", "heun_karras")

every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_prediction = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def make_sampler(name, steps=10, prediction_type="epsilon", generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    sampler = SAMPLERS[name](generator, schedule=ScheduleConfig(prediction_type=prediction_type))
    sampler.set_inference_timesteps(steps)
    return sampler


def random_latents(seed=0, batch=2):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def run(sampler, latents):
    for t in sampler.timesteps:
        latents = sampler.step(t, latents, torch.tanh(latents + t / 500 - 1))
    return latents


def what_leads_to(x_0, x, a_t, prediction_type):
    """The output of a U-Net that knows x_0."""
    noise = (x - a_t.sqrt() * x_0) / (1 - a_t).sqrt()
    return noise if prediction_type == "epsilon" else a_t.sqrt() * noise - (1 - a_t).sqrt() * x_0


@every_prediction
@pytest.mark.parametrize("strength", [1, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 50])
@every_sampler
def test_the_right_prediction_leads_to_the_latents(name, steps, strength, prediction_type):
    """Whatever noise is added on the way. At every step, `predict` must find the same x_0 in what there is by then."""
    sampler = make_sampler(name, steps, prediction_type)
    sampler.set_strength(strength)
    x_0 = random_latents(1)
    x = sampler.add_noise(x_0, sampler.timesteps[0], random_latents(2))
    for i, t in enumerate(sampler.timesteps):
        output = what_leads_to(x_0, x, sampler.alpha_bar[i], prediction_type)
        denoised, _ = sampler.predict(t, x, output)
        torch.testing.assert_close(denoised, x_0, rtol=0, atol=1e-3)
        x = sampler.step(t, x, output)
    if name not in ("plms", "tcd"):  # which stop a little short of no noise: see there
        torch.testing.assert_close(x, x_0, rtol=0, atol=1e-3)


@every_sampler
def test_levels_belong_to_the_steps(name):
    """Also where a timestep comes twice, or was rounded: `add_noise` follows the run."""
    sampler = make_sampler(name, min(100, SAMPLERS[name].max_steps))
    assert len(sampler.sigmas) == len(sampler.alpha_bar) == len(sampler.timesteps) + 1
    torch.testing.assert_close(sampler.alpha_bar, 1 / (1 + sampler.sigmas**2))
    assert sampler.sigmas[-1] == 0
    assert (sampler.sigmas.diff() <= 0).all()
    assert (sampler.timesteps.diff() <= 0).all()
    x, noise = random_latents(1), random_latents(2)
    for i, t in enumerate(sampler.timesteps):
        a_t = sampler.alpha_bar[i]
        torch.testing.assert_close(sampler.add_noise(x, t, noise), a_t.sqrt() * x + (1 - a_t).sqrt() * noise)
        assert torch.equal(sampler.add_noise(x, t.item(), noise), sampler.add_noise(x, t, noise))
        assert torch.equal(sampler.add_noise(x, t.expand(2), noise), sampler.add_noise(x, t, noise))
        sampler.step(t, x, noise)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in FEW_STEPS])
def test_strength_leaves_the_last_steps(name):
    sampler = make_sampler(name, 20)
    every = sampler.timesteps
    sampler.set_strength(0.5)
    assert set(sampler.timesteps.tolist()) == set(every.unique()[:10].tolist())
    assert len(sampler.timesteps) == {"plms": 11, "heun": 19, "heun_karras": 19}.get(name, 10)
    sampler.set_strength(1)
    assert torch.equal(sampler.timesteps, every)


@every_sampler
def test_a_second_run_is_the_first(name):
    """What a sampler remembers of one run must not leak into the next, however the first one ended."""
    latents = random_latents()
    first = run(make_sampler(name), latents)
    sampler = make_sampler(name)
    for t in sampler.timesteps[:4]:
        sampler.step(t, latents, 3 * latents)
    sampler.generator.manual_seed(0)
    assert torch.equal(run(sampler, latents), first)
    sampler.generator.manual_seed(0)
    sampler.set_inference_timesteps(10)
    assert sampler.history == []
    assert torch.equal(run(sampler, latents), first)


@every_sampler
def test_strength_forgets_the_run_before(name):
    latents = random_latents()
    fresh, used = make_sampler(name), make_sampler(name)
    run(used, 2 * latents)
    used.generator.manual_seed(0)
    for sampler in (fresh, used):
        sampler.set_strength(0.5)
        assert sampler.history == []
    assert torch.equal(run(used, latents), run(fresh, latents))


@every_sampler
def test_noise_only_where_it_belongs(name):
    results = [run(make_sampler(name, generator=torch.Generator().manual_seed(s)), random_latents()) for s in (1, 2)]
    assert torch.equal(*results) == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_generator_per_image_gives_what_it_gives_alone(name):
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    together = run(make_sampler(name, generator=generators), random_latents())
    alone = run(make_sampler(name, generator=[torch.Generator().manual_seed(6)]), random_latents()[1:])
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("steps", [1, 3, slow(1000)])
@every_sampler
def test_any_number_of_steps(name, steps):
    steps = min(steps, SAMPLERS[name].max_steps)
    sampler = make_sampler(name, steps)
    assert len(sampler.timesteps) == steps + (min(steps - 1, 1) if name == "plms" else steps - 1) * (name in ASKS_TWICE)
    assert sampler.timesteps.min() >= 0
    assert sampler.timesteps.max() <= 999
    result = run(sampler, random_latents(batch=1)[..., :2, :2])
    assert result.isfinite().all()


@pytest.mark.parametrize("total", [1, 2, 20, 50])
@every_sampler
def test_a_schedule_may_be_shorter_than_the_default_number_of_steps(name, total):
    sampler = SAMPLERS[name](None, num_training_steps=total)
    timesteps = sampler.timesteps
    assert timesteps.max() == total - 1
    sampler.set_inference_timesteps(min(total, sampler.default_steps))
    assert torch.equal(sampler.timesteps, timesteps)


@every_sampler
def test_every_name_is_that_of_its_algorithm(name):
    algorithm = {
        "ddpm": DDPMSampler,
        "ddim": DDIMSampler,
        "plms": PLMSSampler,
        "lms": LMSSampler,
        "euler": EulerSampler,
        "euler_a": EulerAncestralSampler,
        "heun": HeunSampler,
        "dpm++2m": DPMSolverSampler,
        "dpm++2m_sde": DPMSolverSDESampler,
        "lcm": LCMSampler,
        "tcd": TCDSampler,
    }[name.removesuffix("_karras")]
    if name.endswith("_karras"):
        assert SAMPLERS[name].__bases__ == (algorithm,)
        assert SAMPLERS[name].karras
    else:
        assert SAMPLERS[name] is algorithm
        assert not algorithm.karras


@every_sampler
def test_default_steps(name):
    sampler = SAMPLERS[name]()
    algorithm = name.removesuffix("_karras")
    usual = {"ddpm": 50, "ddim": 50, "plms": 50, "heun": 15, "dpm++2m": 20, "lcm": 4, "tcd": 4}  # Heun calls twice
    assert sampler.default_steps == usual.get(algorithm, 30)
    assert len(set(sampler.timesteps.tolist())) == sampler.default_steps
    assert sampler.timesteps.dtype == (torch.long if sampler.whole_timesteps else torch.float32)


class NoFloat64(TorchDispatchMode):
    """MPS has no float64: fails where a tensor of it is made or used."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64), f"{function} on float64"
        return result


def test_no_float64_can_fail():
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        torch.ones(2) * torch.tensor([0.5], dtype=torch.float64)


@every_prediction
@every_sampler
def test_no_float64(name, prediction_type):
    sampler = make_sampler(name, 5, prediction_type)
    latents = random_latents()
    with NoFloat64():
        latents = sampler.add_noise(latents, sampler.timesteps[0])
        for t in sampler.timesteps:
            denoised, _ = sampler.predict(t, latents, latents)
            latents = sampler.step(t, latents, denoised)
    assert latents.dtype == torch.float32


@every_sampler
def test_latents_stay_on_their_device(name):
    """The meta device, like an accelerator, refuses to be mixed with tensors on the CPU."""
    sampler = make_sampler(name, 5)
    latents = random_latents().to("meta")
    latents = sampler.add_noise(latents, sampler.timesteps[0])
    for t in sampler.timesteps:
        denoised, _ = sampler.predict(t, latents, latents)
        latents = sampler.step(t, latents, denoised)
    assert latents.device.type == "meta"


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
def test_a_timestep_that_is_not_visited(name):
    with pytest.raises(ValueError, match="timestep should be one of the sampler's timesteps, not 123.5"):
        make_sampler(name).step(123.5, random_latents(), random_latents())


@every_sampler
@pytest.mark.parametrize("timestep", [-1, 1000, 999.5])
def test_a_timestep_that_no_unet_knows(name, timestep):
    with pytest.raises(ValueError, match="timestep should be from 0 to 999, not"):
        make_sampler(name).add_noise(random_latents(), timestep)
    with pytest.raises(ValueError, match="timestep should be from 0 to 999, not"):
        make_sampler(name).predict(timestep, random_latents(), random_latents())
