"""ControlNets and their pipelines against diffusers', with equal weights and equal noise."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate
from sd.adapters.control import Control
from sd.config import SD2, SD15, TINY
from tests.parity import reference  # noqa: F401, skips without the libraries
from tests.parity.test_networks_parity import assert_equal
from tests.parity.test_pipeline_parity import (
    NEGATIVE,
    PLAIN_PROMPT,
    assert_same_pictures,
    generators,
    make_picture,
    make_pipeline,
)
from tests.support.control import cldm_state, diffusers_config, random_controlnet
from tests.support.marks import slow
from tests.support.synthetic import INPAINTING_MICRO, MICRO, SD2_INPAINTING_MICRO, SD2_MICRO, random_models

diffusers = pytest.importorskip("diffusers")

CONFIGS = {"micro": MICRO, "sd2": SD2_MICRO, "tiny": TINY, "full": SD15, "full sd2": SD2}


def their_controlnet(network):
    """diffusers' ControlNet with the weights of ours, through diffusers' converter."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config = network.config
    model = diffusers.ControlNetModel.from_config(diffusers_config(config, global_pool_conditions=network.global_pool))
    state = cldm_state(network, kernels=config.head_width is None)
    state = convert_controlnet_checkpoint(state, dict(model.config))
    model.load_state_dict({key: tensor.clone() for key, tensor in state.items()})
    return model.eval().requires_grad_(False)


@cache
def both(name, seed=0, global_pool=False):
    ours = random_controlnet(CONFIGS[name].unet, seed, global_pool)
    return ours, their_controlnet(ours)


@pytest.mark.parametrize(
    "name, batch, height, width, global_pool",
    [
        ("micro", 2, 8, 16, False),
        ("micro", 2, 8, 8, True),
        ("micro", 1, 9, 5, False),
        ("sd2", 2, 8, 16, False),
        ("tiny", 3, 16, 8, False),
        slow("full", 2, 64, 64, False),
        slow("full", 1, 64, 96, True),
        slow("full sd2", 1, 96, 96, False),
    ],
)
@torch.no_grad()
def test_the_network(name, batch, height, width, global_pool):
    generator = torch.Generator().manual_seed(1)
    ours, theirs = both(name, global_pool=global_pool)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    context = torch.randn(batch, 77, ours.config.context_width, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    hint = torch.rand(batch, 3, 8 * height, 8 * width, generator=generator)
    down, middle = theirs(latents, timesteps, context, hint, return_dict=False)
    residuals = ours(latents, context, timesteps, ours.hint(hint))
    assert len(residuals) == len(down) + 1 == 13
    for actual, expected in zip(residuals, [*down, middle]):
        if global_pool:  # means of many numbers: their scale is small
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
        else:
            assert_equal(actual, expected)


def hint_picture(seed=1, size=(40, 72)):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


OPTIONS = {"num_inference_steps": 4, "guidance_scale": 7.5, "negative_prompt": NEGATIVE, "output_type": "np"}


def ours_options(models, seed):
    return {"models": models, "seed": seed, "sampler_name": "ddpm", "n_inference_steps": 4}


def with_control(cls, models, networks):
    """One of diffusers' pipelines for ControlNets, with the models' weights."""
    theirs = [their_controlnet(network) for network in networks]
    from_pipe = make_pipeline(diffusers.StableDiffusionPipeline, models)
    parts = dict(from_pipe.components, controlnet=theirs if len(theirs) > 1 else theirs[0])
    scheduler = parts.pop("scheduler")
    placeholder = diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True)
    parts.pop("image_encoder", None)
    pipe = cls(**parts, scheduler=placeholder, requires_safety_checker=False)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "config, strengths, start, end, guess, pool",
    [
        slow(MICRO, [1.0], 0.0, 1.0, False, False),
        slow(MICRO, [0.4], 0.0, 1.0, False, False),
        slow(MICRO, [0.7], 0.25, 0.8, False, False),
        slow(MICRO, [1.0], 0.0, 1.0, True, False),
        slow(MICRO, [1.0], 0.0, 1.0, False, True),
        slow(MICRO, [0.5, 1.3], 0.25, 0.8, False, False),
        (MICRO, [0.5, 1.3], 0.25, 0.8, True, False),
        slow(SD2_MICRO, [0.8], 0.0, 1.0, False, False),
    ],
)
def test_text_to_image(config, strengths, start, end, guess, pool):
    models = random_models(config, seed=3)
    networks = [random_controlnet(config.unet, seed, pool) for seed in range(len(strengths))]
    hints = [hint_picture(seed) for seed in range(len(strengths))]
    pipe = with_control(diffusers.StableDiffusionControlNetPipeline, models, networks)
    one = len(networks) == 1
    expected = pipe(
        PLAIN_PROMPT,
        hints[0] if one else hints,
        height=72,
        width=40,
        controlnet_conditioning_scale=strengths[0] if one else strengths,
        control_guidance_start=start,
        control_guidance_end=end,
        guess_mode=guess,
        generator=generators(11, 1),
        **OPTIONS,
    ).images[0]
    control = [
        Control(net, hint, strength, start, end, guess) for net, hint, strength in zip(networks, hints, strengths)
    ]
    actual = generate(PLAIN_PROMPT, NEGATIVE, height=72, width=40, control=control, **ours_options(models, 11))
    assert_same_pictures(actual, expected)


@pytest.mark.parametrize("guess", [slow(False), slow(True)])
def test_without_guidance_and_in_a_batch(guess):
    models, network, hint = random_models(MICRO, seed=3), random_controlnet(MICRO.unet), hint_picture()
    pipe = with_control(diffusers.StableDiffusionControlNetPipeline, models, [network])
    options = OPTIONS | {"guidance_scale": 1.0}
    expected = pipe(
        [PLAIN_PROMPT, "a"],
        hint,
        72,
        40,
        generator=generators(11, 2),
        guess_mode=guess,
        **options | {"negative_prompt": None},
    ).images
    actual = generate(
        [PLAIN_PROMPT, "a"],
        do_cfg=False,
        height=72,
        width=40,
        control=[Control(network, hint, guess_mode=guess)],
        **ours_options(models, 11),
    )
    assert_same_pictures(actual, expected)


@pytest.mark.parametrize("config, strength", [slow(MICRO, 0.7), slow(SD2_MICRO, 0.5)])
def test_image_to_image(config, strength):
    models, network = random_models(config, seed=3), random_controlnet(config.unet)
    hint, picture = hint_picture(size=(64, 64)), make_picture()
    pipe = with_control(diffusers.StableDiffusionControlNetImg2ImgPipeline, models, [network])
    expected = pipe(
        PLAIN_PROMPT,
        picture,
        hint,
        strength=strength,
        controlnet_conditioning_scale=1.0,
        control_guidance_end=0.6,
        generator=generators(21, 1),
        **OPTIONS,
    ).images[0]
    control = [Control(network, hint, end=0.6)]
    options = ours_options(models, 21)
    actual = generate(PLAIN_PROMPT, NEGATIVE, picture, strength=strength, control=control, **options)
    assert_same_pictures(actual, expected)


@pytest.mark.parametrize(
    "config, strength", [(INPAINTING_MICRO, 0.8), slow(SD2_INPAINTING_MICRO, 0.5), slow(MICRO, 0.8), slow(MICRO, 1.0)]
)
def test_inpainting(config, strength):
    models, picture, mask = random_models(config, seed=3), make_picture(), Image.new("L", (64, 64))
    network = random_controlnet(replace(config.unet, in_channels=4))
    mask.paste(255, (8, 16, 48, 64))
    hint = hint_picture(size=(64, 64))
    pipe = with_control(diffusers.StableDiffusionControlNetInpaintPipeline, models, [network])
    options, name = ours_options(models, 31), "ddpm"
    if config is MICRO:  # without an inpainting U-Net, diffusers draws one more noise before the steps
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1)
        name = "ddim"
    expected = pipe(
        PLAIN_PROMPT,
        picture,
        mask,
        hint,
        height=64,
        width=64,
        strength=strength,
        controlnet_conditioning_scale=0.9,
        generator=generators(31, 1),
        **OPTIONS,
    ).images[0]
    actual = generate(
        PLAIN_PROMPT,
        NEGATIVE,
        picture,
        mask,
        strength,
        control=[Control(network, hint, 0.9)],
        **options | {"sampler_name": name},
    )
    painted = np.asarray(mask) == 255
    assert_same_pictures(actual[painted], expected[painted])
