"""Arithmetic on token embeddings and contexts: replace, mix and interpolate.

In: embeddings from `clip.embed`, or contexts from `encode_prompt`. Out: tensors of the same shape, for `clip.encode` or
`denoise`. There are three places between a token and an image where this works:

    token id --token_embedding--> (D,) --+ position--> embeddings (B, 77, D) --clip.encode--> context (B, 77, D)
                      mix                    replace                                            mix, slerp

    tokens = models.tokenizer("a picture of a cat").to(models.device)                  # (1, 77)
    table, positions = models.clip.token_embedding.weight, models.clip.position_embedding.weight
    chimera = mix([table[2368], table[12952]], [0.4, 0.6])                             # (D,), cat and panda
    embeddings = replace(models.clip.embed(tokens), tokens == 2368, chimera, positions)
    context = torch.cat([pipeline.encode_prompt(models, "", None), models.clip.encode(embeddings)])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PARALLEL = 0.9995  # above this cosine, `slerp` interpolates linearly


def replace(embeddings: Tensor, where: Tensor, vector: Tensor, positions: Tensor) -> Tensor:
    """Replace the token at some places: embeddings (B, N, D) with `vector` (D,) wherever `where` (B, N) is true.

    An embedding is the sum of a token's vector and its position's vector. Only the first is replaced:

        e_i = vector + positions_i  where `where` is true, unchanged elsewhere

    `positions` are those that `embed` added, (N or more, D). With another token's row of the table as `vector`, the
    result equals, to the bit, what `embed` gives for the prompt with that token. Raises ValueError if `where` is true
    nowhere.
    """
    if not where.any():
        raise ValueError("where should be true for at least one token: there is nothing to replace.")
    replaced = vector + positions[: embeddings.shape[1]]  # (N, D)
    return torch.where(where[..., None].to(embeddings.device), replaced.to(embeddings.dtype), embeddings)


def mix(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted sum of embeddings or contexts of the same shape: sum_i shares_i tensors_i.

    The shares need not sum to 1: king + woman - man is an old experiment (1301.3781, section 1.1). Shares of 1 - t and
    t interpolate linearly. Raises ValueError unless all shapes are equal and each tensor has a share.
    """
    if len(tensors) != len(shares) or not tensors:
        raise ValueError(f"shares should be one number for each tensor, not {len(shares)} for {len(tensors)}.")
    for tensor in tensors:
        _check_shapes(tensors[0], tensor)
    return sum(share * tensor for tensor, share in zip(tensors, shares))


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Spherical interpolation of vectors along the last axis: `start` at t = 0, `end` at t = 1 (1609.04468, section 2).

        (sin((1 - t) w) start + sin(t w) end) / sin(w),  with w the angle between the two vectors

    Between two vectors of equal length, the result has that length too; a linear mixture is shorter. Vectors that are
    parallel or antiparallel, or nearly so, have no unique arc and are interpolated linearly. Raises ValueError for
    different shapes.
    """
    _check_shapes(start, end)
    a, b = start.float(), end.float()
    cosine = F.cosine_similarity(a, b, dim=-1)[..., None]  # (..., 1)
    angle = cosine.clamp(-PARALLEL, PARALLEL).acos()
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(cosine.abs() > PARALLEL, torch.lerp(a, b, t), arc).to(start.dtype)


def _check_shapes(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"Tensors should have the same shape, not {tuple(first.shape)} and {tuple(second.shape)}. Prompts that are "
            "given to `encode_prompt` together, as a list, get contexts of one length."
        )
