"""Latent consistency models in the pipeline: the guidance scale goes to the U-Net, which runs once a step."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from sd import generate, load_models, pipeline
from sd.checkpoints.files import write_checkpoint
from sd.inside.recording import record
from sd.model_converter import to_compvis
from sd.request import Request
from tests.support.accelerator import accelerator
from tests.support.control import random_controlnet
from tests.support.marks import slow
from tests.support.synthetic import LCM_MICRO, MICRO, random_models

SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def models():
    return random_models(LCM_MICRO)


@pytest.fixture
def calls(models):
    """The scales that the U-Net gets, and the sizes of its batches."""
    seen = []

    def note(_unet, arguments):
        seen.append((len(arguments[0]), arguments[4].tolist()))

    handle = models.diffusion.register_forward_pre_hook(note)
    yield seen
    handle.remove()


def test_one_pass_a_step_by_default_four_at_scale_8(models, calls):
    generate("a cat", models=models, seed=1, **SIZE)
    assert calls == [(1, [8.0])] * 4
    calls.clear()
    generate(["a cat", "a dog"], models=models, cfg_scale=3, n_inference_steps=1, **SIZE)
    assert calls == [(2, [3.0, 3.0])]


def test_without_guidance_the_scale_is_1(models, calls):
    images = [
        generate("a cat", models=models, seed=1, **options, **SIZE)
        for options in ({"do_cfg": False}, {"cfg_scale": 1}, {"cfg_scale": 8})
    ]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])
    assert [scales for _, scales in calls] == [[1.0]] * 8 + [[8.0]] * 4


def test_a_negative_prompt_changes_nothing_and_is_said_to(models):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = generate("a cat", models=models, seed=1, **SIZE)
    with pytest.warns(UserWarning, match="^uncond_prompt has no effect on this model") as caught:
        negative = generate("a cat", "blurry", models=models, seed=1, **SIZE)
    assert len(caught) == 1
    assert np.array_equal(plain, negative)


def test_a_context_with_an_unconditional_half(models, calls):
    """As `encode_prompt` makes it by default: only the other half is used."""
    context, latents = pipeline.encode_prompt(models, "a cat"), pipeline.get_latents(models, 1, 32, 32, 0)
    sampler = pipeline.SAMPLERS["lcm"](torch.Generator().manual_seed(0))
    steps = list(pipeline.denoise(models, latents, context, sampler, 5, cfg_interval=(0, 0.5)))
    assert all(step.noise_uncond is None for step in steps)
    assert calls == [(1, [5.0])] * 2 + [(1, [1.0])] * 2


@pytest.mark.parametrize(
    "options", [{"deep_cache": 2}, {"freeu": (1.5, 1.6, 0.9, 0.2)}, {"hires_scale": 1.5}, {"sampler_name": "tcd"}]
)
def test_other_features_keep_the_scale(models, options):
    images = [generate("a cat", models=models, seed=1, cfg_scale=s, **options, **SIZE) for s in (3, 8)]
    assert not np.array_equal(*images)
    assert not np.array_equal(images[1], generate("a cat", models=models, seed=1, **SIZE))


def test_a_controlnet_of_the_ordinary_model(models):
    from sd.adapters.control import Control

    hint = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    control = [Control(random_controlnet(MICRO.unet), hint)]
    images = [generate("a cat", models=models, seed=1, cfg_scale=s, control=control, **SIZE) for s in (3, 8)]
    assert not np.array_equal(*images)
    assert not np.array_equal(images[1], generate("a cat", models=models, seed=1, **SIZE))


def test_a_recording_is_the_same_image(models):
    request = Request("a cat", seed=1, **SIZE)
    assert np.array_equal(record(request, models).image, pipeline.draw(request, models)[0])


@pytest.mark.parametrize("suffix", [slow("ckpt"), "safetensors"])
def test_a_file_with_the_configuration(models, tmp_path, suffix):
    path = tmp_path / f"lcm.{suffix}"
    write_checkpoint(path, to_compvis(models), LCM_MICRO.to_dict())
    back = load_models(path, "cpu", torch.float32)
    assert back.config == LCM_MICRO
    assert np.array_equal(
        generate("a cat", models=back, seed=1, **SIZE), generate("a cat", models=models, seed=1, **SIZE)
    )


def test_too_many_steps_for_the_models_own_sampler(models):
    with pytest.raises(ValueError, match="^The number of steps should be a whole number from 1 to 50, not 51.$"):
        generate("a cat", models=models, n_inference_steps=51, **SIZE)


def test_the_scale_in_16_bits(models):
    """The embedding is computed in float32: its angles reach thousands."""
    half = replace(
        models, **{name: random_models(LCM_MICRO).__dict__[name].bfloat16() for name in ("clip", "diffusion")}
    )
    images = [generate("a cat", models=each, seed=1, **SIZE).astype(int) for each in (models, half)]
    assert np.abs(images[0] - images[1]).mean() < 4


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["lcm", slow("tcd")])
def test_on_a_simulated_gpu(models, tmp_path, sampler):
    """The image is that of the CPU, which waits for the GPU once in each step: to check for NaN."""
    path, request = tmp_path / "lcm.ckpt", Request("a cat", seed=1, sampler_name=sampler, **SIZE)
    write_checkpoint(path, to_compvis(models), LCM_MICRO.to_dict())
    with accelerator("cuda:0") as active:
        there = load_models(path, "cuda:0", torch.float32)
        context = pipeline.encode_prompt(there, "a cat", None)
        stepper, latents, _ = pipeline.prepare(there, request)
        active.waits.clear()
        *_, last = pipeline.denoise(there, latents, context, stepper)
        assert sum(active.waits.values()) == 4
        image = pipeline.decode_latents(there, last.latents)[0]
    assert np.abs(image.astype(int) - pipeline.draw(request, models)[0]).max() <= 1
