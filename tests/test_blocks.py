"""The building blocks of the VAE and the U-Net, against their definitions."""

import pytest
import torch

from sd.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample, middle
from tests.support.definitions import NEAR_EPS, group_norm, randomize, self_attention, silu


@pytest.mark.parametrize("out_channels", [16, 24])
def test_residual_block_adds_its_input(out_channels):
    block = ResidualBlock(16, out_channels, groups=8, eps=1e-6)
    x = torch.randn(2, 16, 5, 7)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(block(x), block.shortcut(x))
    assert block(x).shape == (2, out_channels, 5, 7)


@pytest.mark.parametrize("scale", [1, NEAR_EPS])
@pytest.mark.parametrize("out_channels, time_width", [(16, 32), (24, 32), (16, None), (24, None)])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_residual_block(out_channels, time_width, eps, scale):
    block = randomize(ResidualBlock(16, out_channels, 8, eps, time_width))
    block.conv1.weight *= scale  # so that the input of the second norm is tiny too
    block.conv1.bias *= scale
    x, time = scale * torch.randn(2, 16, 4, 4), None
    h = block.conv1(silu(group_norm(block.norm1, x, 8, eps)))
    if time_width:
        block.time.weight *= scale
        block.time.bias *= scale
        time = torch.randn(2, time_width)
        h = h + (silu(time) @ block.time.weight.T + block.time.bias)[:, :, None, None]  # the same for every pixel
    h = block.conv2(silu(group_norm(block.norm2, h, 8, eps)))
    if out_channels != 16:
        x_out = torch.einsum("oi,bihw->bohw", block.shortcut.weight[:, :, 0, 0], x)
        x_out = x_out + block.shortcut.bias[:, None, None]
    else:
        x_out = x
    torch.testing.assert_close(block(x, time), x_out + h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1, NEAR_EPS])
def test_attention_block(scale):
    block = randomize(AttentionBlock(16, groups=4))
    x = scale * torch.randn(2, 16, 3, 5)
    tokens = group_norm(block.norm, x, 4, 1e-6).reshape(2, 16, 15).transpose(1, 2)
    out = self_attention(block.attention, tokens, heads=1).transpose(1, 2).reshape(2, 16, 3, 5)
    torch.testing.assert_close(block(x), x + out, rtol=1e-4, atol=1e-5)


def test_the_middle_is_a_residual_block_an_attention_block_and_a_residual_block():
    assert [type(block) for block in middle(16, 8)] == [ResidualBlock, AttentionBlock, ResidualBlock]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("height, width", [(8, 12), (9, 5), (2, 2)])
def test_downsample_halves(height, width, symmetric):
    y = Downsample(4, symmetric)(torch.randn(2, 4, height, width))
    rounded_up = (height + 1) // 2, (width + 1) // 2
    assert y.shape == (2, 4, *(rounded_up if symmetric else (height // 2, width // 2)))


def test_downsample_pads_as_its_network_was_trained():
    """A kernel with a single one in its middle shows which pixel each output is centred on."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    for symmetric, expected in ((True, [[0, 2], [8, 10]]), (False, [[5, 7], [13, 15]])):
        layer = Downsample(1, symmetric)
        layer.conv.weight.data = torch.zeros(1, 1, 3, 3)
        layer.conv.weight.data[0, 0, 1, 1] = 1
        layer.conv.bias.data.zero_()
        assert layer(x)[0, 0].tolist() == expected


def test_upsample_repeats_pixels():
    layer = Upsample(1)
    layer.conv.weight.data = torch.zeros(1, 1, 3, 3)
    layer.conv.weight.data[0, 0, 1, 1] = 1
    layer.conv.bias.data.zero_()
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert layer(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert layer(x, size=(3, 4))[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]
