"""Attention: every position of a sequence gathers from every position of another (1706.03762).

In: tokens (B, N, width), and for cross-attention the context (B, M, context_width). Out: tokens (B, N, width).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORING = ("mps",)  # devices on which the scores of all heads may be stored, in float32
MOST_SCORES = 1 << 30  # bytes of them at a time


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Scaled dot-product attention in `heads` independent heads: softmax(q k^T / sqrt(d)) v (1706.03762, eq. 1).

    query (B, N, C), key and value (B, M, C) -> (B, N, C). `causal` lets position i see positions 0 to i only.
    `scaled_dot_product_attention` has fused kernels (2205.14135) that never store the (N, M) matrix of scores whole;
    where none fits the dtype or the sizes, it falls back on the plain formula, which does. On MPS, where it may have
    none, a part of the queries is taken at a time. There its `is_causal` lets 16-bit queries see later positions
    (pytorch issue 195910), and the mask is spelled out.
    """
    # (B, N, C) -> (B, heads, N, C / heads)
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if query.device.type in STORING and causal:  # the text encoder: few queries
        later = query.new_full((query.shape[2], key.shape[2]), -math.inf).triu(1)  # (N, M)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=later)
    elif query.device.type in STORING:
        rows = max(1, MOST_SCORES // (4 * len(query) * heads * key.shape[2]))
        parts = [F.scaled_dot_product_attention(part, key, value) for part in query.split(rows, dim=2)]
        out = torch.cat(parts, dim=2)  # (B, heads, N, C / heads)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return out.transpose(1, 2).flatten(2)  # (B, N, C)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself. One matrix projects queries, keys and values: one large product, not three."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)  # each (B, N, width)
        return self.out(attention(query, key, value, self.heads, causal))


class CrossAttention(nn.Module):
    """Attention of a sequence to a context: here pixels of the latents ask, and tokens of the prompt answer."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(context_width, width, bias=False)
        self.value = nn.Linear(context_width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, width), context (B, M, context_width) -> (B, N, width)."""
        return self.out(attention(self.query(x), self.key(context), self.value(context), self.heads))
