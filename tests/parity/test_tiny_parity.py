"""The tiny checkpoint in data/, run by diffusers: the same latents for the same prompt, seed and settings."""

import pytest
import torch

import sd
from sd import pipeline
from sd.request import Request
from tests.parity.test_pipeline_parity import generators, make_pipeline

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def models():
    return sd.load_models(device="cpu", dtype=torch.float32)


def test_latents(models):
    prompt, negative = "a red house on green hills at noon, on the left", "clouds"
    theirs = make_pipeline(diffusers.StableDiffusionPipeline, models)
    size = {"height": 128, "width": 128, "output_type": "latent"}
    settings = {"num_inference_steps": 20, "guidance_scale": 5.0, "negative_prompt": negative}
    expected = theirs(prompt, generator=generators(7, 1), **size, **settings).images

    sampler, latents, _ = pipeline.prepare(models, Request("", sampler_name="ddpm", n_inference_steps=20, seed=7))
    context = pipeline.encode_prompt(models, prompt, negative)
    for step in pipeline.denoise(models, latents, context, sampler, cfg_scale=5.0):
        latents = step.latents
    difference = (latents - expected).abs().max().item()
    print(f"maximum difference {difference:.1e} of latents in {latents.min():.1f}..{latents.max():.1f}")
    assert difference < 2e-5
    assert latents.std() > 0.5
