"""Our samplers against diffusers' schedulers: whole trajectories, with the same denoiser and the same noise."""

import inspect

import pytest
import torch

from sd.config import ScheduleConfig
from sd.ddpm import DDPMSampler
from sd.samplers import SAMPLERS
from sd.samplers.ddim import DDIMSampler
from sd.samplers.euler import EulerSampler
from sd.samplers.lms import LMSSampler
from sd.samplers.tcd import TCDSampler
from tests.support.marks import slow
from tests.support.synthetic import MICRO, random_networks

diffusers = pytest.importorskip("diffusers")


SHAPE = (2, 4, 8, 8)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}

SCHEDULERS = {
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "steps_offset": 1}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
FEW_STEPS = ("lcm", "tcd")  # strength leaves out timesteps, but no step
IN_SIGMAS = tuple(SCHEDULERS[name][0] for name in ("lms", "euler", "euler_a", "heun"))  # these work on x / sqrt(a_t)

# The first warning is about arrays that diffusers makes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:With 1 step this sampler starts"),
]


def denoiser(latents, timestep):
    """Replaces the U-Net: a smooth function of unit scale that depends on both inputs."""
    return torch.tanh(0.8 * latents + timestep / 500 - 1)


def make_scheduler(name, steps, strength=1.0, prediction_type="epsilon", **options):
    """diffusers' scheduler for this algorithm, and the timesteps that it visits at this strength."""
    algorithm, karras, _ = name.partition("_karras")
    scheduler_class, defaults = SCHEDULERS[algorithm]
    options = {"beta_schedule": "scaled_linear", **BETAS, **defaults, **options}
    if karras:
        options["use_karras_sigmas"] = True
    scheduler = scheduler_class(prediction_type=prediction_type, **options)
    if algorithm in FEW_STEPS:
        scheduler.set_timesteps(min(steps, int(50 * strength)), strength=strength)
        return scheduler, scheduler.timesteps
    scheduler.set_timesteps(steps)
    start = (steps - max(1, int(steps * strength))) * scheduler.order
    if algorithm == "plms" and start:
        # diffusers cuts its list of timesteps here, but still treats the second one as repeated. Repeat it again.
        timesteps = scheduler.timesteps[start + 1 :]
        return scheduler, torch.cat([timesteps[:2], timesteps[1:]])
    if algorithm == "lms":
        # With set_begin_index, diffusers would use slopes from before the first step, which do not exist.
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[start:], scheduler.sigmas[start:]
        return scheduler, scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler, scheduler.timesteps[start:]


def make_sampler(name, steps, strength=1.0, prediction_type="epsilon"):
    sampler = SAMPLERS[name](torch.Generator().manual_seed(3), schedule=ScheduleConfig(prediction_type=prediction_type))
    sampler.set_inference_timesteps(steps)
    sampler.set_strength(strength)
    return sampler


def diffusers_trajectory(scheduler, latents, timesteps, seed, denoiser=denoiser, **options):
    """diffusers' latents after every step. These and `latents` are in our space, sqrt(a_t) x_0 + sqrt(1 - a_t) e."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(seed)
    in_sigmas = isinstance(scheduler, IN_SIGMAS)
    if in_sigmas:
        scheduler._init_step_index(timesteps[0])
        latents = latents * (1 + scheduler.sigmas[scheduler.step_index] ** 2).sqrt()
    trajectory = []
    for t in timesteps:
        output = denoiser(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, **options).prev_sample
        scale = (1 + scheduler.sigmas[scheduler.step_index] ** 2).sqrt() if in_sigmas else 1
        trajectory.append(latents / scale)
    return trajectory


def our_trajectory(sampler, latents, denoiser=denoiser):
    trajectory = []
    for t in sampler.timesteps:
        latents = sampler.step(t, latents, denoiser(latents, t))
        trajectory.append(latents)
    return trajectory


def assert_same(actual, expected, tolerance):
    worst = max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))
    print(f"maximum relative difference {worst:.1e}")  # shown by pytest -rP
    assert worst <= tolerance


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 7, 50, slow(1000)])
def test_ddpm(steps, strength, beta_schedule, prediction_type):
    schedule = ScheduleConfig(beta_schedule=beta_schedule, prediction_type=prediction_type)
    sampler = DDPMSampler(torch.Generator().manual_seed(3), schedule=schedule)
    sampler.set_inference_timesteps(steps)
    sampler.set_strength(strength)
    scheduler, timesteps = make_scheduler("ddpm", steps, strength, prediction_type, beta_schedule=beta_schedule)
    assert sampler.timesteps.tolist() == timesteps.tolist()

    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    first = sampler.timesteps[0]
    noisy = sampler.add_noise(latents, first, noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, first[None]), rtol=0, atol=1e-6)

    assert_same(our_trajectory(sampler, noisy), diffusers_trajectory(scheduler, noisy, timesteps, seed=3), 1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, slow(50)])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
def test_trajectory(name, steps, strength, prediction_type):
    sampler = make_sampler(name, steps, strength, prediction_type)
    scheduler, timesteps = make_scheduler(name, steps, strength, prediction_type)
    torch.testing.assert_close(sampler.timesteps.float(), timesteps.float(), rtol=0, atol=2e-3)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    expected = diffusers_trajectory(scheduler, latents, timesteps, seed=3)
    assert_same(our_trajectory(sampler, latents), expected, 2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("steps", [3, 4, 7, 8])  # 3 and 7 do not divide the 50 timesteps; 1, 2 and 5 are above
@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_steps(name, steps, strength, prediction_type):
    test_trajectory(name, steps, strength, prediction_type)


@pytest.mark.parametrize("name", FEW_STEPS)
def test_the_choice_of_timesteps(name):
    """For every number of steps, from image to noise and back: also where diffusers refuses, with fewer steps."""
    for percent in (100, 80, 58, 33, 10, 1):
        m = max(1, percent // 2)
        for steps in range(1, 51):
            sampler, scheduler = make_sampler(name, steps, percent / 100), SCHEDULERS[name][0]()
            scheduler.set_timesteps(min(steps, m), strength=m / 50 + 1e-6)
            assert sampler.timesteps.tolist() == scheduler.timesteps.tolist(), (percent, steps)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_tcd_with_other_shares_of_noise(steps, eta):
    sampler = TCDSampler(torch.Generator().manual_seed(3), eta=eta)
    sampler.set_inference_timesteps(steps)
    scheduler, timesteps = make_scheduler("tcd", steps)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    expected = diffusers_trajectory(scheduler, latents, timesteps, seed=3, eta=eta)
    assert_same(our_trajectory(sampler, latents), expected, 2e-5)


@pytest.mark.parametrize("beta_start", [1e-4, 1e-6])
@pytest.mark.parametrize("steps", [5, 50, slow(333)])
@pytest.mark.parametrize("name", ["dpm++2m_karras", "dpm++2m_sde_karras"])
def test_a_schedule_that_begins_with_little_noise(name, steps, beta_start):
    """The lowest Karras noise levels, where 1 - a_t has few digits left in float32."""
    options = {"beta_schedule": "linear", "beta_start": beta_start, "beta_end": 0.02}
    sampler = SAMPLERS[name](torch.Generator().manual_seed(3), schedule=ScheduleConfig(**options))
    sampler.set_inference_timesteps(steps)
    scheduler, timesteps = make_scheduler(name, steps, **options)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    expected = diffusers_trajectory(scheduler, latents, timesteps, seed=3)
    assert_same(our_trajectory(sampler, latents), expected, 2e-5)


@pytest.fixture(scope="module")
def unet():
    return random_networks(MICRO).diffusion


@pytest.mark.parametrize("name", [name if name in ("heun", "dpm++2m") else slow(name) for name in SAMPLERS])
def test_trajectory_with_the_unet(name, unet):
    context = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(4))

    def denoiser(latents, timestep):
        return unet(latents, context, timestep.expand(2))

    scheduler, timesteps = make_scheduler(name, 6)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    expected = diffusers_trajectory(scheduler, latents, timesteps, 3, denoiser)
    assert_same(our_trajectory(make_sampler(name, 6), latents, denoiser), expected, 1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 20, 500])
def test_ddim_with_fresh_noise(steps, eta):
    sampler = DDIMSampler(torch.Generator().manual_seed(3), eta=eta)
    sampler.set_inference_timesteps(steps)
    scheduler, timesteps = make_scheduler("ddim", steps)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    expected = diffusers_trajectory(scheduler, latents, timesteps, seed=3, eta=eta)
    assert_same(our_trajectory(sampler, latents), expected, 2e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_of_every_order(order):
    sampler = LMSSampler(order=order)
    sampler.set_inference_timesteps(10)
    scheduler, timesteps = make_scheduler("lms", 10)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    expected = diffusers_trajectory(scheduler, latents, timesteps, seed=3, order=order)
    assert_same(our_trajectory(sampler, latents), expected, 2e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name, base", [("ddim", DDIMSampler), ("euler", EulerSampler)])
def test_spacing(name, base, spacing, steps):
    class Spaced(base):
        pass

    Spaced.spacing = spacing
    sampler = Spaced()
    sampler.set_inference_timesteps(steps)
    _, timesteps = make_scheduler(name, steps, timestep_spacing=spacing)
    torch.testing.assert_close(sampler.timesteps, timesteps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["lms", "euler_karras", "heun", "dpm++2m", "dpm++2m_karras"])
def test_levels_and_noising(name, strength):
    sampler = make_sampler(name, 50, strength)
    scheduler, timesteps = make_scheduler(name, 50, strength)
    torch.testing.assert_close(sampler.sigmas, scheduler.sigmas[-len(sampler.sigmas) :], rtol=1e-5, atol=0)
    latents, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind()
    expected = scheduler.add_noise(latents, noise, timesteps[:1].expand(2))
    if not name.startswith("dpm"):
        expected = expected / (1 + sampler.sigmas[0] ** 2).sqrt()
    torch.testing.assert_close(sampler.add_noise(latents, sampler.timesteps[0], noise), expected, rtol=0, atol=1e-5)
