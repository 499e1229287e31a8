"""The VAE's decoder. Its agreement with diffusers is tested in parity/."""

import pytest
import torch

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
