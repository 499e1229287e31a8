"""The U-Net. Its agreement with diffusers is tested in parity/."""

import math

import pytest
import torch

from sd.blocks import Downsample, ResidualBlock, Upsample
from sd.config import SD15
from sd.diffusion import GEGLU, Diffusion, SpatialTransformer, Stage, timestep_embedding
from tests.support.definitions import (
    NEAR_EPS,
    check_group_norms,
    cross_attention,
    gelu,
    group_norm,
    layer_norm,
    randomize,
    self_attention,
    silu,
)
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
    assert [type(layer) for layer in unet.middle] == [ResidualBlock, SpatialTransformer, ResidualBlock]


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


def test_geglu_multiplies_its_first_half_by_the_gelu_of_its_second():
    layer = randomize(GEGLU(8, 12))
    x = torch.randn(2, 5, 8)
    value, gate = (x @ weight.T + bias for weight, bias in zip(layer.proj.weight.chunk(2), layer.proj.bias.chunk(2)))
    torch.testing.assert_close(layer(x), value * gelu(gate))


@pytest.mark.parametrize("scale", [1, NEAR_EPS])
def test_spatial_transformer(scale):
    """Self-attention, cross-attention and a perceptron, each with a norm before it, and each is added."""
    block = randomize(SpatialTransformer(16, heads=4, groups=8, context_width=12))
    assert block.self_attention.qkv.bias is None
    for layer in (block.proj_in, block.self_attention.out, block.cross_attention.out):
        layer.weight *= scale  # so that the inputs of the inner norms are tiny too
        layer.bias *= scale
    x, context = scale * torch.randn(2, 16, 3, 5), torch.randn(2, 7, 12)
    tokens = group_norm(block.norm, x, 8, eps=1e-6).reshape(2, 16, 15).transpose(1, 2)
    tokens = block.proj_in(tokens)
    tokens = tokens + self_attention(block.self_attention, layer_norm(block.self_norm, tokens), heads=4)
    tokens = tokens + cross_attention(block.cross_attention, layer_norm(block.cross_norm, tokens), context, heads=4)
    tokens = tokens + block.mlp(layer_norm(block.mlp_norm, tokens))
    expected = x + block.proj_out(tokens).transpose(1, 2).reshape(2, 16, 3, 5)
    torch.testing.assert_close(block(x, context), expected, rtol=1e-4, atol=1e-5)


def test_every_norm_adds_the_same_to_the_variance_in_residual_blocks_and_another_in_transformers(unet):
    groups, residual, transformers = MICRO.unet.groups, 0, 0
    for module in unet.modules():
        if isinstance(module, ResidualBlock):
            residual += check_group_norms(module, groups, eps=1e-5)
        elif isinstance(module, SpatialTransformer):
            transformers += check_group_norms(module, groups, eps=1e-6)
    assert (residual, transformers) == (2 * 22, 16)
    assert check_group_norms(unet.norm_out, groups, eps=1e-5) == 1


def test_every_stage_on_the_way_up_gets_the_last_map_that_is_left(unet):
    """Behind the channels from below stand those of the kept map, the latest first."""
    kept, below, got = [], [], []
    hooks = [stage.register_forward_hook(lambda *args: kept.append(args[-1])) for stage in unet.down]
    hooks += [stage.register_forward_hook(lambda *args: below.append(args[-1])) for stage in (unet.middle, *unet.up)]
    hooks += [stage.register_forward_hook(lambda _, inputs, __: got.append(inputs[0])) for stage in unet.up]
    unet(torch.randn(1, 4, 9, 16), torch.randn(1, 77, 32), torch.tensor([10]))
    for hook in hooks:
        hook.remove()
    assert len(got) == len(kept) == 12
    for x, from_below, skip in zip(got, below, reversed(kept)):
        assert torch.equal(x, torch.cat([from_below, skip], dim=1))


def test_the_output_is_normed_and_convolved(unet):
    seen = []
    hook = unet.up[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    noise = unet(torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.tensor([10]))
    hook.remove()
    torch.testing.assert_close(noise, unet.conv_out(silu(unet.norm_out(seen[0]))))


def test_every_residual_block_gets_the_embedded_timestep_and_every_transformer_the_context(unet):
    context, timesteps = torch.randn(2, 77, 32), torch.tensor([10, 700])
    first, _, second = unet.time_embedding
    time = second(silu(first(timestep_embedding(timesteps, MICRO.unet.channels[0]))))
    hooks, got = [], []
    for module in unet.modules():
        if isinstance(module, (ResidualBlock, SpatialTransformer)):
            hooks.append(module.register_forward_hook(lambda module, inputs, _: got.append((module, inputs[1]))))
    unet(torch.randn(2, 4, 8, 8), context, timesteps)
    for hook in hooks:
        hook.remove()
    assert len(got) == len(hooks)
    for module, second_input in got:
        torch.testing.assert_close(second_input, time if isinstance(module, ResidualBlock) else context)


def test_sizes_of_stable_diffusion():
    """Those that no weight's shape shows are the number of heads and of groups."""
    assert SD15.unet.channels == (320, 640, 1280, 1280)
    assert SD15.unet.attention == (True, True, True, False)
    assert (SD15.unet.heads, SD15.unet.groups, SD15.unet.context_width) == (8, 32, 768)
    assert (SD15.unet.in_channels, SD15.unet.out_channels, SD15.unet.blocks_per_level) == (4, 4, 2)
