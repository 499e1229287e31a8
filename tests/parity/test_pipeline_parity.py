"""Whole runs from prompt to pixels against diffusers' pipelines, with equal weights and equal noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate
from sd.model_converter import to_compvis
from tests.parity import reference
from tests.support.marks import slow
from tests.support.synthetic import INPAINTING_MICRO, MICRO, SD2_INPAINTING_MICRO, SD2_MICRO, random_models

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT, NEGATIVE = "A painting of a lighthouse, it's 4k!", "blurry, dark"


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO, seed=3)


def make_pipeline(cls, models):
    state = to_compvis(models)
    pipe = cls(
        vae=reference.vae(models.config, state),
        text_encoder=reference.text_encoder(models.config, state),
        tokenizer=transformers.CLIPTokenizer(
            vocab=models.tokenizer.vocab,
            merges=models.tokenizer.merges,
            model_max_length=77,
            pad_token="!" if models.config.text.zero_padding else "<|endoftext|>",
        ),
        unet=reference.unet(models.config, state),
        scheduler=diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Set here, because the constructor would change the scheduler's first timestep from 0 to 1.
    pipe.scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=models.config.schedule.prediction_type,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(seed, count):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def assert_same_pictures(actual, expected):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(int) - np.rint(expected * 255).astype(int)).max()
    print(f"maximum difference {difference} of 255 levels")  # shown by pytest -rP
    assert difference <= 1
    assert actual.std() > 10, "a flat picture proves nothing"


@pytest.mark.parametrize(
    "height, width, cfg_scale", [slow(64, 64, 7.5), slow(64, 64, 1.5), (72, 40, 7.5), slow(72, 40, 1.5)]
)
def test_text_to_image(models, height, width, cfg_scale):
    pipe = make_pipeline(diffusers.StableDiffusionPipeline, models)
    options = {"guidance_scale": cfg_scale, "num_inference_steps": 10, "output_type": "np"}
    expected = pipe(
        [PROMPT] * 2, height, width, negative_prompt=[NEGATIVE] * 2, generator=generators(11, 2), **options
    ).images
    actual = generate(
        [PROMPT] * 2,
        NEGATIVE,
        models=models,
        seed=11,
        cfg_scale=cfg_scale,
        sampler_name="ddpm",
        n_inference_steps=10,
        height=height,
        width=width,
    )
    assert_same_pictures(actual, expected)


# Without "!": transformers' tokenizer for SD 2.x takes its padding, 0, for the id of every "!". open_clip's does not.
PLAIN_PROMPT = "A painting of a lighthouse, it's 4k"


@pytest.mark.parametrize("prediction_type", ["v_prediction", slow("epsilon")])
@pytest.mark.parametrize("strength", [None, 0.7])
def test_stable_diffusion_2(prediction_type, strength):
    """Text-to-image and image-to-image with OpenCLIP's text encoder, zero padding, and v."""
    config = replace(SD2_MICRO, schedule=replace(SD2_MICRO.schedule, prediction_type=prediction_type))
    models = random_models(config, seed=3)
    options = {"num_inference_steps": 10, "guidance_scale": 7.5, "negative_prompt": NEGATIVE, "output_type": "np"}
    ours = {"models": models, "seed": 11, "sampler_name": "ddpm", "n_inference_steps": 10}
    if strength is None:
        pipe = make_pipeline(diffusers.StableDiffusionPipeline, models)
        expected = pipe(PLAIN_PROMPT, 72, 40, generator=generators(11, 1), **options).images[0]
        actual = generate(PLAIN_PROMPT, NEGATIVE, height=72, width=40, **ours)
    else:
        picture = make_picture()
        pipe = make_pipeline(diffusers.StableDiffusionImg2ImgPipeline, models)
        expected = pipe(PLAIN_PROMPT, picture, strength, generator=generators(11, 1), **options).images[0]
        actual = generate(PLAIN_PROMPT, NEGATIVE, picture, strength=strength, **ours)
    assert_same_pictures(actual, expected)


def test_without_guidance(models):
    pipe = make_pipeline(diffusers.StableDiffusionPipeline, models)
    options = {"guidance_scale": 1.0, "num_inference_steps": 10, "output_type": "np"}
    expected = pipe(PROMPT, 64, 64, generator=generators(5, 1), **options).images[0]
    actual = generate(PROMPT, models=models, do_cfg=False, seed=5, sampler_name="ddpm", n_inference_steps=10)
    assert_same_pictures(actual, expected)


def make_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("strength", [slow(0.3), 0.8, slow(1.0)])
def test_image_to_image(models, strength):
    picture = make_picture()
    pipe = make_pipeline(diffusers.StableDiffusionImg2ImgPipeline, models)
    expected = pipe(
        PROMPT,
        picture,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=7.5,
        negative_prompt=NEGATIVE,
        generator=generators(21, 1),
        output_type="np",
    ).images[0]
    actual = generate(
        PROMPT,
        NEGATIVE,
        picture,
        models=models,
        strength=strength,
        seed=21,
        sampler_name="ddpm",
        n_inference_steps=10,
    )
    assert_same_pictures(actual, expected)


@pytest.mark.parametrize(
    "config, strength", [(INPAINTING_MICRO, 0.5), slow(INPAINTING_MICRO, 0.8), (SD2_INPAINTING_MICRO, 0.8)]
)
def test_the_inpainting_checkpoint(config, strength):
    models = random_models(config, seed=3)
    picture, mask = make_picture(), Image.new("L", (64, 64))
    # Along whole latents: of a latent that is painted in part, diffusers looks at one corner, and we at every pixel.
    mask.paste(255, (8, 16, 48, 64))
    pipe = make_pipeline(diffusers.StableDiffusionInpaintPipeline, models)
    expected = pipe(
        PLAIN_PROMPT,
        picture,
        mask,
        height=64,
        width=64,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=7.5,
        negative_prompt=NEGATIVE,
        generator=generators(31, 1),
        output_type="np",
    ).images[0]
    options = {"models": models, "seed": 31, "sampler_name": "ddpm", "n_inference_steps": 10}
    actual = generate(PLAIN_PROMPT, NEGATIVE, picture, mask, strength, **options)
    painted = np.asarray(mask) == 255  # elsewhere ours restores the original pixels
    assert_same_pictures(actual[painted], expected[painted])
    assert np.array_equal(actual[~painted], np.asarray(picture)[~painted])
