"""The VAE's decoder. Its agreement with diffusers is tested in parity/."""

import pytest
import torch

from tests.support.definitions import check_group_norms, silu
from tests.support.synthetic import MICRO, random_networks


@pytest.fixture(scope="module")
def decoder():
    return random_networks(MICRO).decoder


@pytest.mark.parametrize("batch, height, width", [(1, 8, 8), (2, 4, 9), (1, 1, 1)])
def test_shape(decoder, batch, height, width):
    assert decoder(torch.randn(batch, 4, height, width)).shape == (batch, 3, 8 * height, 8 * width)


def test_latents_come_scaled(decoder):
    """The decoder undoes the encoder's scaling before anything else."""
    latents = torch.randn(1, 4, 4, 4)
    seen = []
    hook = decoder.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder(latents)
    hook.remove()
    torch.testing.assert_close(seen[0] * MICRO.vae.scaling_factor, latents)


def test_an_image_is_decoded_alone_as_in_a_batch(decoder):
    latents = torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(decoder(latents)[1:2], decoder(latents[1:2]), rtol=0, atol=1e-5)


def test_every_level_but_the_finest_repeats_pixels_after_its_blocks(decoder):
    latents = torch.randn(1, 4, 2, 3)
    x = decoder.middle(decoder.conv_in(decoder.post_quant_conv(latents / MICRO.vae.scaling_factor)))
    for i in (3, 2, 1, 0):  # the coarsest first
        level = decoder.levels[i]
        x = level.blocks(x)
        if i > 0:
            x = level.upsample.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(decoder(latents), decoder.conv_out(silu(decoder.norm_out(x))))


def test_one_more_block_a_level_than_the_encoder(decoder):
    assert [len(level.blocks) for level in decoder.levels] == [3, 3, 3, 3]


def test_every_norm_adds_the_same_to_the_variance(decoder):
    assert check_group_norms(decoder, MICRO.vae.groups, eps=1e-6) == 2 * 12 + 5 + 1
