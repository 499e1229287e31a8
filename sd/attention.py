"""Attention: every position of one sequence gathers from every position of another (1706.03762).

In: tokens (B, N, width), and for cross-attention the context (B, M, context_width). Out: tokens (B, N, width).
"""

from torch import Tensor, nn

from sd.runtime.devices import scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Scaled dot-product attention in `heads` independent heads: softmax(q k^T / sqrt(d)) v (1706.03762, eq. 1).

    query (B, N, C), key and value (B, M, C) -> (B, N, C). With `causal`, position i sees positions 0 to i only.
    torch's fused kernels (2205.14135), where it has one, never store the (N, M) scores. In 16 bits too, torch computes
    them in float32: those of SD 2.1 are too large for float16 (diffusers calls that `upcast_attention`).
    """
    # (B, N, C) -> (B, heads, N, C / heads)
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, causal)  # (B, heads, N, C / heads)
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
    """Attention of a sequence to a context: in the U-Net, queries come from pixels, keys and values from the prompt."""

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
