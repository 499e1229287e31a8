"""The U-Net. Its agreement with diffusers is tested in parity/."""

import math

import pytest
import torch

from sd.blocks import Downsample, Upsample
from sd.config import SD15
from sd.diffusion import Diffusion, SpatialTransformer, Stage, timestep_embedding
from tests.support.synthetic import MICRO, random_networks


@pytest.fixture(scope="module")
def unet():
    return random_networks(MICRO).diffusion


def test_timestep_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([0, 250, 999.5]), 320)
    assert embedding.shape == (3, 320)
    assert embedding[0].tolist() == [1.0] * 160 + [0.0] * 160
    for i in (0, 80, 159):
        angle = 250 / 10000 ** (i / 160)
        assert embedding[1, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert embedding[1, 160 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def stage_shapes(unet, *inputs):
    """The output shape of every stage, in order of execution."""
    shapes = []
    hooks = [
        stage.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape)))
        for stage in unet.modules()
        if isinstance(stage, Stage)
    ]
    unet(*inputs)
    for hook in hooks:
        hook.remove()
    return shapes


def test_it_is_really_u_shaped():
    """The shapes of SD 1.5 at 512 x 512, batch 2, computed without weights on the meta device."""
    with torch.device("meta"):
        unet = Diffusion(SD15.unet)
        shapes = stage_shapes(unet, torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768), torch.empty(2))
    down = [(320, 64)] * 3 + [(320, 32)] + [(640, 32)] * 2 + [(640, 16)] + [(1280, 16)] * 2 + [(1280, 8)] * 3
    middle = [(1280, 8)]
    up = [(1280, 8)] * 2 + [(1280, 16)] * 3 + [(1280, 32)] + [(640, 32)] * 2 + [(640, 64)] + [(320, 64)] * 3
    assert shapes == [(2, channels, side, side) for channels, side in down + middle + up]


def test_attention_where_the_configuration_says():
    unet = Diffusion(MICRO.unet)
    kinds = [type(stage[-1]) for stage in unet.down]
    assert kinds.count(SpatialTransformer) == 6  # three levels of two
    assert kinds.count(Downsample) == 3
    assert [type(stage[-1]) for stage in unet.up].count(Upsample) == 3


@pytest.mark.parametrize("batch, height, width", [(1, 8, 8), (2, 16, 24), (1, 9, 5), (1, 1, 3)])
def test_any_size_comes_back(unet, batch, height, width):
    latents, context = torch.randn(batch, 4, height, width), torch.randn(batch, 77, 32)
    assert unet(latents, context, torch.full((batch,), 10)).shape == latents.shape


def test_prompt_and_timestep_matter(unet):
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    noise = unet(latents, context, torch.tensor([10]))
    assert (unet(latents, context, torch.tensor([900])) - noise).abs().max() > 1e-2
    assert (unet(latents, torch.randn(1, 77, 32), torch.tensor([10])) - noise).abs().max() > 1e-2


def test_rows_of_a_batch_do_not_mix(unet):
    latents, context, timesteps = torch.randn(3, 4, 8, 8), torch.randn(3, 77, 32), torch.tensor([1, 500, 999])
    together = unet(latents, context, timesteps)
    alone = unet(latents[1:2], context[1:2], timesteps[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
