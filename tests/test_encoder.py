"""The VAE's encoder. Its agreement with diffusers is tested in parity/."""

import pytest
import torch
import torch.nn.functional as F

from sd.config import SD15
from tests.support.definitions import check_group_norms, silu
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


def test_every_level_but_the_last_pads_right_and_bottom_and_takes_every_second_pixel(encoder):
    image = torch.randn(1, 3, 32, 40)
    x = encoder.conv_in(image)
    for i, level in enumerate(encoder.levels):
        x = level.blocks(x)
        if i < 3:
            conv = level.downsample.conv
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
    x = encoder.quant_conv(encoder.conv_out(silu(encoder.norm_out(encoder.middle(x)))))
    mean, log_variance = encoder.moments(image)
    torch.testing.assert_close(torch.cat([mean, log_variance], dim=1), x)  # the mean is the first half


def test_every_norm_adds_the_same_to_the_variance(encoder):
    assert check_group_norms(encoder, MICRO.vae.groups, eps=1e-6) == 2 * 8 + 5 + 1


def test_blocks_per_level(encoder):
    assert [len(level.blocks) for level in encoder.levels] == [2, 2, 2, 2]


def test_sizes_of_stable_diffusion():
    vae = SD15.vae
    assert (vae.channels, vae.blocks_per_level, vae.latent_channels) == ((128, 256, 512, 512), 2, 4)
    assert (vae.groups, vae.scaling_factor, vae.downscale) == (32, 0.18215, 8)
