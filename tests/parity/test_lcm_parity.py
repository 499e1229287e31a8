"""Latent consistency models, whose U-Net reads the guidance scale, and the samplers lcm and tcd for LoRAs, from prompt
to pixels against diffusers' pipelines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate, load_models
from sd.diffusion import guidance_embedding
from sd.model_converter import to_compvis
from sd.model_saver import save_folder
from tests.support.marks import slow
from tests.support.synthetic import LCM_MICRO, MICRO, SD2_MICRO, random_models

diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_text2img as theirs  # noqa: E402

from tests.parity import reference  # noqa: E402
from tests.parity.test_pipeline_parity import (  # noqa: E402
    NEGATIVE,
    PLAIN_PROMPT,
    assert_same_pictures,
    generators,
    make_picture,
    make_pipeline,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LCM_SD2 = replace(
    SD2_MICRO, unet=replace(SD2_MICRO.unet, guidance_width=64), sampling=LCM_MICRO.sampling
)  # which predicts v


@pytest.fixture(scope="module")
def models():
    return random_models(LCM_MICRO, seed=3)


def with_scheduler(cls, scheduler, models):
    pipe = make_pipeline(cls, models)
    pipe.scheduler = scheduler(prediction_type=models.config.schedule.prediction_type, **BETAS)
    return pipe


@pytest.mark.parametrize("width", [64, 256])
def test_the_embedding_of_the_scale(width):
    scales = torch.tensor([1.0, 2.5, 8.0, 14.0])
    expected = theirs.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, width)
    torch.testing.assert_close(guidance_embedding(scales, width), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [LCM_MICRO, slow(LCM_SD2)])
@torch.no_grad()
def test_the_unet(config):
    scale = 8.0
    models, generator = random_models(config, seed=3), torch.Generator().manual_seed(0)
    unet = reference.unet(config, to_compvis(models))
    latents, context = torch.randn(2, 4, 9, 5, generator=generator), torch.randn(2, 77, 32, generator=generator)
    timesteps = torch.tensor([19, 999])
    w = theirs.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.full((2,), scale - 1), config.unet.guidance_width
    )
    expected = unet(latents, timesteps, context, timestep_cond=w).sample
    actual = models.diffusion(latents, context, timesteps, scales=torch.full((2,), scale))
    assert (actual - expected).abs().max() <= 2e-5
    without = models.diffusion(latents, context, timesteps)
    assert (without - unet(latents, timesteps, context).sample).abs().max() <= 2e-5
    assert (without - actual).abs().max() > 1e-2


@pytest.mark.parametrize("config, steps, scale", [(LCM_MICRO, 4, 8.0), slow(LCM_MICRO, 1, 1.0), slow(LCM_SD2, 3, 5.0)])
def test_text_to_image(config, steps, scale):
    models = random_models(config, seed=3)
    pipe = with_scheduler(diffusers.LatentConsistencyModelPipeline, diffusers.LCMScheduler, models)
    prompts = [PLAIN_PROMPT, "a cat"]
    options = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "np"}
    expected = pipe(prompts, 72, 40, generator=generators(11, 2), **options).images
    actual = generate(prompts, models=models, seed=11, cfg_scale=scale, n_inference_steps=steps, height=72, width=40)
    assert_same_pictures(actual, expected)


@pytest.mark.parametrize("strength", [0.8, slow(0.3)])
def test_image_to_image(models, strength):
    pipe = with_scheduler(diffusers.LatentConsistencyModelImg2ImgPipeline, diffusers.LCMScheduler, models)
    options = {"strength": strength, "guidance_scale": 8.0, "num_inference_steps": 4, "output_type": "np"}
    expected = pipe(PLAIN_PROMPT, make_picture(), generator=generators(21, 1), **options).images[0]
    assert_same_pictures(
        generate(PLAIN_PROMPT, "", make_picture(), models=models, strength=strength, seed=21), expected
    )


@pytest.mark.parametrize("name, scale", [slow("lcm", 1.0), ("lcm", 1.5), slow("tcd", 1.0), slow("tcd", 1.5)])
def test_an_ordinary_unet(name, scale):
    """As with a LoRA of few steps: guidance by two passes, or none."""
    models = random_models(MICRO, seed=3)
    scheduler = {"lcm": diffusers.LCMScheduler, "tcd": diffusers.TCDScheduler}[name]
    pipe = with_scheduler(diffusers.StableDiffusionPipeline, scheduler, models)
    options = {"guidance_scale": scale, "num_inference_steps": 4, "output_type": "np", "negative_prompt": NEGATIVE}
    options["eta"] = 0.3  # or else this pipeline sets it to 0
    expected = pipe(PLAIN_PROMPT, 64, 64, generator=generators(5, 1), **options).images[0]
    actual = generate(PLAIN_PROMPT, NEGATIVE, models=models, seed=5, sampler_name=name, cfg_scale=scale)
    assert_same_pictures(actual, expected)


def test_inpainting_beside_the_scale(models):
    """diffusers has no pipeline for it. The scale counts, and what the mask keeps stays."""
    picture, mask = make_picture(), Image.new("L", (64, 64))
    mask.paste(255, (8, 16, 48, 64))
    images = [generate("a cat", "", picture, mask, models=models, seed=1, cfg_scale=scale) for scale in (3, 8)]
    assert not np.array_equal(*images)
    kept = np.asarray(mask) == 0
    assert np.array_equal(images[0][kept], np.asarray(picture)[kept])


@pytest.mark.slow
def test_diffusers_opens_what_is_saved(models, tmp_path):
    save_folder(models, tmp_path / "model")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    assert type(pipe) is diffusers.LatentConsistencyModelPipeline
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 8.0, "num_inference_steps": 4, "output_type": "np"}
    expected = pipe("a cat", generator=torch.Generator().manual_seed(1), **options).images[0]
    back = load_models(tmp_path / "model", "cpu", torch.float32, tuned=False)
    assert back.config == models.config
    assert_same_pictures(generate("a cat", models=back, seed=1), expected)
