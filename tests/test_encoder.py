"""The VAE's encoder. Its agreement with diffusers is tested in parity/."""

import pytest
import torch

from tests.support.synthetic import MICRO, random_networks


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


def test_log_variance_is_bounded():
    encoder = random_networks(MICRO).encoder
    encoder.quant_conv.bias[4:] = torch.tensor([1e3, 1e3, -1e3, -1e3])
    image = torch.randn(1, 3, 32, 32)
    _, log_variance = encoder.moments(image)
    assert (log_variance[:, :2] == 20).all()
    assert (log_variance[:, 2:] == -30).all()
    assert encoder(image, torch.ones(1, 4, 4, 4)).isfinite().all()
