"""The text encoder. Its agreement with transformers is tested in parity/."""

import math

import pytest
import torch

from sd.clip import CLIPLayer, QuickGELU
from sd.config import SD15
from tests.support.definitions import NEAR_EPS, layer_norm, randomize, self_attention
from tests.support.synthetic import MICRO, random_networks


@pytest.fixture(scope="module")
def clip():
    return random_networks(MICRO).clip


def test_forward_is_embed_then_encode(clip):
    tokens = torch.randint(0, 49408, (2, 77))
    assert torch.equal(clip(tokens), clip.encode(clip.embed(tokens)))
    assert clip(tokens).shape == (2, 77, MICRO.text.width)


def test_embed_adds_token_and_position(clip):
    tokens = torch.tensor([[49406, 320, 320]])
    embeddings = clip.embed(tokens)
    assert torch.equal(embeddings[0, 1], clip.token_embedding.weight[320] + clip.position_embedding.weight[1])
    assert not torch.equal(embeddings[0, 1], embeddings[0, 2])


def test_a_token_sees_only_those_before_it(clip):
    tokens = torch.randint(0, 49408, (1, 77))
    changed = tokens.clone()
    changed[:, 40:] = 7
    before, after = clip(tokens), clip(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-6)
    assert (before[:, 40:] - after[:, 40:]).abs().amax(-1).min() > 1e-3


def test_a_prompt_is_encoded_alone_as_in_a_batch(clip):
    tokens = torch.randint(0, 49408, (3, 77))
    torch.testing.assert_close(clip(tokens)[1:2], clip(tokens[1:2]), rtol=0, atol=1e-6)


def test_quick_gelu():
    """x times the logistic function of 1.702 x."""
    x = torch.linspace(-5, 5, 21)
    expected = [value / (1 + math.exp(-1.702 * value)) for value in x.tolist()]
    assert QuickGELU()(x).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scale", [1, NEAR_EPS])
def test_layer(scale):
    """Norm first, attention that sees no later token, then a perceptron of four times the width; each is added."""
    layer = randomize(CLIPLayer(16, heads=4))
    layer.attention.out.weight *= scale  # so that the input of the second norm is tiny too
    layer.attention.out.bias *= scale
    x = scale * torch.randn(2, 7, 16)
    h = x + self_attention(layer.attention, layer_norm(layer.norm1, x), 4, causal=True)
    first, gelu, second = layer.mlp
    hidden = layer_norm(layer.norm2, h) @ first.weight.T + first.bias
    assert hidden.shape == (2, 7, 64)
    expected = h + gelu(hidden) @ second.weight.T + second.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_layers_run_in_order_and_a_norm_ends_them(clip):
    embeddings = torch.randn(1, 5, MICRO.text.width)
    x = embeddings
    for i in range(MICRO.text.layers):
        x = clip.layers[i](x)
    torch.testing.assert_close(clip.encode(embeddings), layer_norm(clip.norm, x), rtol=1e-4, atol=1e-5)


def test_every_norm_adds_the_same_to_the_variance(clip):
    x = NEAR_EPS * torch.randn(2, 3, MICRO.text.width)
    norms = [module for module in clip.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * MICRO.text.layers + 1
    for norm in norms:
        torch.testing.assert_close(norm(x), layer_norm(norm, x, eps=1e-5))


def test_sizes_of_stable_diffusion():
    text = SD15.text
    assert (text.vocab_size, text.context_length, text.width) == (49408, 77, 768)
    assert (text.layers, text.heads) == (12, 12)  # no weight's shape shows the number of heads
