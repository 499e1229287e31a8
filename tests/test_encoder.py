"""The VAE's encoder. Its agreement with diffusers is tested in parity/."""

import pytest
import torch

from tests.synthetic import MICRO, random_networks


@pytest.fixture(scope="module")
def encoder():
    return random_networks(MICRO).encoder


@pytest.mark.parametrize("batch, height, width", [(1, 64, 64), (2, 32, 72), (1, 8, 8)])
def test_shape(encoder, batch, height, width):
    latents = encoder(torch.randn(batch, 3, height, width))
    assert latents.shape == (batch, 4, height // 8, width // 8)


def test_forward_samples_the_scaled_distribution(encoder):
    image, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4)
    mean, log_variance = encoder.moments(image)
    torch.testing.assert_close(
        encoder(image, noise), MICRO.vae.scaling_factor * (mean + log_variance.exp().sqrt() * noise)
    )
    assert torch.equal(encoder(image), MICRO.vae.scaling_factor * mean)


def test_one_image_and_several_noises_give_several_samples(encoder):
    image, noise = torch.randn(1, 3, 32, 32), torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(encoder(image, noise)[2:], encoder(image, noise[2:]))


def test_log_variance_is_bounded(encoder):
    _, log_variance = encoder.moments(1e6 * torch.ones(1, 3, 32, 32))
    assert log_variance.min() >= -30
    assert log_variance.max() <= 20
