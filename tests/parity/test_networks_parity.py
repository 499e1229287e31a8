"""Our networks against diffusers' and transformers' with equal random weights, in float32.

Larger sizes and the full width of SD 1.5's U-Net are slow tests.
"""

from functools import cache

import pytest
import torch

from sd.config import TINY
from sd.model_converter import to_compvis
from tests.parity import reference
from tests.support.marks import slow
from tests.support.synthetic import (
    FULL_SD2_TEXT,
    FULL_SD2_UNET,
    FULL_TEXT,
    FULL_UNET,
    FULL_VAE,
    HALF_UNET,
    INPAINTING_MICRO,
    MICRO,
    SD2_MICRO,
    random_networks,
)

TOLERANCE = 2e-5  # maximum absolute difference, on outputs of unit scale

CONFIGS = {
    "micro": MICRO,
    "tiny": TINY,
    "inpainting": INPAINTING_MICRO,
    "full text": FULL_TEXT,
    "full vae": FULL_VAE,
    "half unet": HALF_UNET,
    "full unet": FULL_UNET,
    "sd2": SD2_MICRO,
    "full sd2 text": FULL_SD2_TEXT,
    "full sd2 unet": FULL_SD2_UNET,
}


@cache
def ours(name):
    return random_networks(CONFIGS[name], seed=1)


def state(name):
    return to_compvis(ours(name))


def assert_equal(actual, expected):
    """Checks that both are equal within TOLERANCE, after both are divided by the same factor to unit scale."""
    assert actual.shape == expected.shape
    scale = expected.std()
    assert 0.01 < scale < 100, "random weights should give outputs of a sane scale"
    difference = ((actual - expected) / scale.clamp(min=1)).abs().max().item()
    print(f"maximum absolute difference {difference:.1e} on outputs of scale {scale:.2f}")  # shown by pytest -rP
    assert difference <= TOLERANCE


@pytest.mark.parametrize(
    "name, batch, length",
    [
        ("tiny", 1, 77),
        ("tiny", 3, 77),
        ("tiny", 2, 5),
        slow("full text", 1, 77),
        slow("full text", 3, 77),
        slow("full text", 2, 5),
        ("sd2", 3, 77),
        slow("full sd2 text", 2, 77),
    ],
)
@torch.no_grad()
def test_text_encoder(name, batch, length):
    tokens = torch.randint(0, 49408, (batch, length), generator=torch.Generator().manual_seed(0))
    expected = reference.text_encoder(CONFIGS[name], state(name))(tokens).last_hidden_state
    assert_equal(ours(name).clip(tokens), expected)


@pytest.mark.parametrize(
    "name, batch, height, width",
    [("tiny", 1, 128, 64), ("tiny", 3, 40, 24), slow("full vae", 1, 128, 64), slow("full vae", 3, 40, 24)],
)
@torch.no_grad()
def test_vae(name, batch, height, width):
    generator = torch.Generator().manual_seed(0)
    vae = reference.vae(CONFIGS[name], state(name))
    image = torch.randn(batch, 3, height, width, generator=generator)
    expected = vae.encode(image).latent_dist
    mean, log_variance = ours(name).encoder.moments(image)
    assert_equal(mean, expected.mean)
    assert_equal(log_variance, expected.logvar)

    noise = torch.randn(mean.shape, generator=generator)
    sample = (expected.mean + expected.std * noise) * vae.config.scaling_factor
    assert_equal(ours(name).encoder(image, noise), sample)
    assert_equal(ours(name).decoder(sample), vae.decode(sample / vae.config.scaling_factor).sample)


def check_unet(name, batch, height, width):
    generator = torch.Generator().manual_seed(0)
    config = CONFIGS[name].unet
    latents = torch.randn(batch, config.in_channels, height, width, generator=generator)
    context = torch.randn(batch, 77, config.context_width, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    expected = reference.unet(CONFIGS[name], state(name))(latents, timesteps, context).sample
    assert_equal(ours(name).diffusion(latents, context, timesteps), expected)


# 9 and 5 are odd at every level. diffusers then enlarges a feature map to the size of the skip connection, like ours.
@pytest.mark.parametrize("batch, height, width", [(1, 16, 16), (3, 40, 24), slow(2, 64, 96), (1, 9, 5), (1, 1, 1)])
@pytest.mark.parametrize("name", ["micro", "inpainting", "tiny", "sd2"])
@torch.no_grad()
def test_unet_small(name, batch, height, width):
    check_unet(name, batch, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("batch, height, width", [(1, 64, 96), (3, 40, 24)])
@torch.no_grad()
def test_unet_half_width(batch, height, width):
    check_unet("half unet", batch, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("batch, height, width", [(2, 64, 64), (1, 64, 96), (3, 40, 24)])
@torch.no_grad()
def test_unet_full_width(batch, height, width):
    check_unet("full unet", batch, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("batch, height, width", [(1, 96, 96), (3, 40, 24)])
@torch.no_grad()
def test_sd2_unet_full_width(batch, height, width):
    check_unet("full sd2 unet", batch, height, width)


@pytest.mark.slow
@torch.no_grad()
def test_vae_at_512():
    vae = reference.vae(FULL_VAE, state("full vae"))
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    image = ours("full vae").decoder(latents)
    assert_equal(image, vae.decode(latents / vae.config.scaling_factor).sample)
    assert_equal(ours("full vae").encoder.moments(image)[0], vae.encode(image).latent_dist.mean)
