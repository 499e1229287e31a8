"""Token ids -> context: CLIP's text encoder, a transformer that reads left to right (2103.00020, section 2.4).

In: token ids (B, 77). Out: the context (B, 77, width), one vector per token, which the U-Net's cross-attention reads.
"""

from functools import partial

import torch
from torch import Tensor, nn

from sd.attention import SelfAttention
from sd.config import TextConfig


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that CLIP was trained with (1606.08415, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # SD 1.x, SD 2.x


class CLIPLayer(nn.Module):
    """One pre-norm transformer layer: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, activation: str = "quick_gelu"):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        x = x + self.attention(self.norm1(x), causal=True)
        return x + self.mlp(self.norm2(x))


class CLIP(nn.Module):
    """The text encoder. `forward` is `embed`, then `encode`; between the two, embeddings can be replaced or mixed."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        layer = partial(CLIPLayer, config.width, config.heads, config.activation)
        self.layers = nn.ModuleList(layer() for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, N), N at most 77 -> embeddings (B, N, width): what a token is, plus where it stands."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]

    def encode(self, embeddings: Tensor, clip_skip: int = 1) -> Tensor:
        """Embeddings (B, N, width) -> context (B, N, width). Token i has seen tokens 0 to i.

        With `clip_skip` n, the last n - 1 layers do not run. SD 2.x was trained with 2 and lacks its last layer, so
        there the last n - 2. Raises ValueError if that leaves none.
        """
        trained = 2 if self.config.is_openclip else 1
        count = len(self.layers) - max(clip_skip - trained, 0)  # layers that run
        if count < 1:
            raise ValueError(f"clip_skip should be at most {len(self.layers) - 1 + trained}, not {clip_skip}.")
        x = embeddings
        for layer in self.layers[:count]:
            x = layer(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Token ids (B, N), N at most 77 -> context (B, N, width)."""
        return self.encode(self.embed(tokens), clip_skip)
