"""Attention against its definition, written out."""

import pytest
import torch

from sd.attention import CrossAttention, SelfAttention, attention


def by_definition(query, key, value, heads, causal=False):
    """softmax(q k^T / sqrt(d)) v, one head at a time."""
    outputs = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value))):
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("n, m, causal", [(7, 7, False), (7, 7, True), (9, 5, False), (1, 1, True)])
def test_attention(n, m, causal, heads):
    query, key, value = torch.randn(3, n, 16), torch.randn(3, m, 16), torch.randn(3, m, 16)
    actual = attention(query, key, value, heads, causal)
    torch.testing.assert_close(actual, by_definition(query, key, value, heads, causal), rtol=0, atol=1e-6)


def test_self_attention_projects_queries_keys_and_values_in_that_order():
    layer = SelfAttention(8, heads=2)
    x = torch.randn(2, 5, 8)
    query, key, value = (x @ w.T + b for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)))
    torch.testing.assert_close(layer(x), layer.out(by_definition(query, key, value, 2)))


def test_causal_self_attention_does_not_see_the_future():
    layer = SelfAttention(8, heads=2)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = layer(x, causal=True), layer(changed, causal=True)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_cross_attention_reads_the_context():
    layer = CrossAttention(8, context_width=12, heads=2)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 12)
    expected = by_definition(layer.query(x), layer.key(context), layer.value(context), 2)
    torch.testing.assert_close(layer(x, context), layer.out(expected))
    # The order of the tokens is in their embeddings, not in attention itself.
    torch.testing.assert_close(layer(x, context.flip(1)), layer(x, context))
