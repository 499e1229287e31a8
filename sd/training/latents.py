"""Encoded pictures with their captions, and random batches of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd.training.text import pick_captions


@dataclass(frozen=True)
class Latents:
    """N encoded pictures of one shape, and their captions."""

    means: Tensor  # (N, 4, h, w), scaled
    stds: Tensor  # (N, 4, h, w)
    tokens: list[Tensor]  # of each picture (number of captions, 77), as `tokenise` returns them

    def __len__(self) -> int:
        return len(self.means)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random latents (count, 4, h, w), and a random caption of each, (count, 77)."""
        indices = torch.randint(len(self), (count,), generator=generator)
        mean, std = self.means[indices].float(), self.stds[indices].float()
        tokens = pick_captions(self.tokens, indices, generator).long()
        return mean + std * torch.randn(mean.shape, generator=generator), tokens


def spread_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Random timesteps (count,) of 0 ... total - 1. All are equally likely, but those of a batch are evenly spaced: the
    loss then varies less between batches (2107.00630, appendix I.1)."""
    spread = (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1
    return (spread * total).long()
