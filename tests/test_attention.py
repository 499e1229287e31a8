"""Attention against its definition, written out."""

import pytest
import torch

from sd.attention import CrossAttention, SelfAttention, attention
from tests.support import definitions


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("n, m, causal", [(7, 7, False), (7, 7, True), (9, 5, False), (1, 1, True)])
def test_attention(n, m, causal, heads):
    query, key, value = torch.randn(3, n, 16), torch.randn(3, m, 16), torch.randn(3, m, 16)
    actual = attention(query, key, value, heads, causal)
    torch.testing.assert_close(actual, definitions.attention(query, key, value, heads, causal), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_may_exceed_the_range_of_float16(dtype):
    """As in SD 2.1, whose images were black with scores in float16."""
    query, key, value = (torch.randn(2, 64, 32).to(dtype) for _ in range(3))
    query, key = 300 * query, 300 * key
    assert (query.double() @ key.double().mT).abs().max() / 4 > 65504  # 16 wide heads
    expected = definitions.attention(query.double(), key.double(), value.double(), 2, False)
    torch.testing.assert_close(attention(query, key, value, 2).double(), expected, rtol=0, atol=0.03)


def test_self_attention_projects_queries_keys_and_values_in_that_order():
    layer = SelfAttention(8, heads=2)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), definitions.self_attention(layer, x, 2))


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
    torch.testing.assert_close(layer(x, context), definitions.cross_attention(layer, x, context, 2))
    # The order of the tokens is in their embeddings, not in attention itself.
    torch.testing.assert_close(layer(x, context.flip(1)), layer(x, context))
