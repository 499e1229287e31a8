"""`hires_scale`: an image is drawn, enlarged, and drawn on. And `clip_skip`."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate, pipeline
from sd.model_converter import to_compvis
from sd.noise import make_generators
from sd.samplers import SAMPLERS
from tests.support.synthetic import INPAINTING_MICRO, MICRO, SD2_MICRO, random_models

SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def start(models, as_latents, scale=1.5):
    """Where the second pass starts, and the images before it."""
    sampler = SAMPLERS["ddim"](make_generators(3, 2))
    sampler.set_inference_timesteps(4)
    sampler.set_strength(0.5)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    return sampler, latents, pipeline.enlarge(models, latents, scale, sampler, as_latents)


def test_latents_are_enlarged_and_noised(models):
    sampler, latents, enlarged = start(models, as_latents=True)
    assert enlarged.shape == (2, 4, 12, 18)
    bilinear = torch.nn.functional.interpolate(latents, (12, 18), mode="bilinear")
    noise = torch.cat([torch.randn(1, 4, 12, 18, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    a = sampler.alpha_bar_at(sampler.timesteps[0])
    torch.testing.assert_close(enlarged, a.sqrt() * bilinear + (1 - a).sqrt() * noise, rtol=0, atol=1e-5)


def test_images_are_enlarged_and_noised(models):
    sampler, latents, enlarged = start(models, as_latents=False)
    generators = make_generators(3, 2)
    for image, generator, actual in zip(pipeline.decode_latents(models, latents), generators, enlarged):
        large = Image.fromarray(image).resize((144, 96), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None] / 127.5 - 1
        x_0 = models.encoder(pixels, torch.randn(1, 4, 12, 18, generator=generator))
        a = sampler.alpha_bar_at(sampler.timesteps[0])
        expected = a.sqrt() * x_0 + (1 - a).sqrt() * torch.randn(1, 4, 12, 18, generator=generator)
        torch.testing.assert_close(actual[None], expected, rtol=0, atol=0.05)  # a level of the resized image


@pytest.mark.parametrize("as_latents", [False, True])
def test_image_i_of_a_batch_is_what_its_seed_gives(models, as_latents):
    settings = {"models": models, "n_inference_steps": 4, "hires_scale": 1.5, "hires_latents": as_latents, **SIZE}
    both = generate(["a cat", "a dog"], seed=5, **settings)
    assert both.shape == (2, 96, 144, 3)
    assert np.abs(generate("a dog", seed=6, **settings).astype(int) - both[1]).max() <= 1


def test_a_weak_second_pass_keeps_the_image(models):
    settings = {"models": models, "n_inference_steps": 8, "seed": 1, **SIZE}
    first = Image.fromarray(generate("a cat", **settings))
    large = np.asarray(first.resize((192, 128), Image.Resampling.LANCZOS)).astype(int)
    weak, strong = (
        np.abs(generate("a cat", hires_scale=2, hires_strength=s, **settings) - large).mean() for s in (0.05, 1)
    )
    assert weak < strong


def test_where_there_is_no_second_pass(models):
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match=r"^hires_scale should be so small that no side exceeds 8192, not 8"):
        generate("a cat", models=models, hires_scale=8, width=2048)
    with pytest.raises(ValueError, match=r"^hires_scale should be 1 with mask_image, not 2"):
        generate("a cat", models=models, input_image=image, mask_image=image, hires_scale=2)
    with pytest.raises(ValueError, match=r"^hires_scale should be 1 for an inpainting model"):
        generate("a cat", models=random_models(INPAINTING_MICRO), hires_scale=2)


@pytest.mark.parametrize("config", [MICRO, SD2_MICRO], ids=["sd1", "sd2"])
@torch.no_grad()
def test_clip_skip_leaves_out_the_last_layers(config):
    """SD 2's text encoder has been without its last layer since it was trained."""
    reference = pytest.importorskip("tests.parity.reference")
    models = random_models(config)
    theirs = reference.text_encoder(config, to_compvis(models))
    tokens = models.tokenizer(["a cat"])
    states = theirs(tokens, output_hidden_states=True).hidden_states  # before each layer, and after the last
    model = getattr(theirs, "text_model", theirs)
    missing = 1 if config.text.is_openclip else 0
    for clip_skip in range(1, len(models.clip.layers) + missing + 1):
        expected = model.final_layer_norm(states[-1 - max(clip_skip - 1 - missing, 0)])
        actual = pipeline.encode_prompt(models, "a cat", None, clip_skip=clip_skip)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_clip_skip_leaves_at_least_one_layer(models):
    layers = len(models.clip.layers)
    pipeline.encode_prompt(models, "a cat", clip_skip=layers)
    with pytest.raises(ValueError, match=f"^clip_skip should be at most {layers}, not {layers + 1}"):
        generate("a cat", models=models, clip_skip=layers + 1)
