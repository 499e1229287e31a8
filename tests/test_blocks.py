"""The bricks that the VAE and the U-Net share."""

import pytest
import torch
import torch.nn.functional as F

from sd.blocks import Downsample, ResidualBlock, Upsample


@pytest.mark.parametrize("out_channels", [16, 24])
def test_residual_block_adds_its_input(out_channels):
    block = ResidualBlock(16, out_channels, groups=8, eps=1e-6)
    x = torch.randn(2, 16, 5, 7)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(block(x), block.shortcut(x))
    assert block(x).shape == (2, out_channels, 5, 7)


def test_residual_block_adds_the_time_to_every_pixel():
    block = ResidualBlock(16, 16, groups=8, eps=1e-5, time_width=32)
    x, time = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    h = block.conv1(F.silu(block.norm1(x))) + block.time(F.silu(time)).reshape(2, 16, 1, 1)
    torch.testing.assert_close(block(x, time), x + block.conv2(F.silu(block.norm2(h))))


def test_residual_block_uses_its_eps():
    block = ResidualBlock(16, 16, groups=8, eps=1e-6)
    assert block.norm1.eps == block.norm2.eps == 1e-6


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
