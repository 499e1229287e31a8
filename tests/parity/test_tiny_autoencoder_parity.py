"""The tiny autoencoder against diffusers' AutoencoderTiny with equal weights, alone and in whole pipelines."""

from dataclasses import replace

import pytest
import torch

from sd import generate
from tests.parity import reference  # noqa: F401, skips without the libraries
from tests.parity.test_pipeline_parity import (
    NEGATIVE,
    PLAIN_PROMPT,
    assert_same_pictures,
    generators,
    make_pipeline,
)
from tests.support.marks import slow
from tests.support.synthetic import MICRO, random_models
from tests.support.tiny_autoencoders import diffusers_state, random_tiny_autoencoder

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def both():
    ours = random_tiny_autoencoder()
    theirs = diffusers.AutoencoderTiny()
    theirs.load_state_dict(diffusers_state(ours))
    return ours, theirs.eval().requires_grad_(False)


@pytest.mark.parametrize("batch, height, width", [(1, 64, 64), (2, 40, 24), slow(1, 512, 512)])
def test_the_networks(both, batch, height, width):
    ours, theirs = both
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = theirs.encode(image).latents
    assert 0.1 < latents.std() < 10
    torch.testing.assert_close(ours["encoder"](image), latents, rtol=0, atol=2e-5)
    latents = 2 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))  # some above 3, for the clamp
    decoded = theirs.decode(latents).sample
    assert 0.1 < decoded.std() < 10
    torch.testing.assert_close(ours["decoder"](latents), decoded, rtol=0, atol=2e-5)


def test_in_the_place_of_the_vae(both):
    ours, theirs = both
    models = random_models(MICRO, seed=3)
    pipe = make_pipeline(diffusers.StableDiffusionPipeline, models)
    pipe.vae = theirs
    options = {"num_inference_steps": 4, "guidance_scale": 7.5, "negative_prompt": NEGATIVE, "output_type": "np"}
    expected = pipe(PLAIN_PROMPT, 72, 40, generator=generators(11, 1), **options).images[0]
    models = replace(models, **ours)
    options = {"seed": 11, "sampler_name": "ddpm", "n_inference_steps": 4, "height": 72, "width": 40}
    assert_same_pictures(generate(PLAIN_PROMPT, NEGATIVE, models=models, **options), expected)
