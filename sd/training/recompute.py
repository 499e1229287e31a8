"""Activation checkpointing: training takes less memory, and each block is computed twice (1604.06174).

The backward pass of a layer uses what the layer computed on the way forward. Here a block keeps only its input, and
computes the rest again when the backward pass reaches it. The gradients are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sd.blocks import AttentionBlock, ResidualBlock
from sd.clip import CLIPLayer
from sd.diffusion import SpatialTransformer
from sd.training.gradients import plain_attention


class Recomputed:
    """What a block inherits from first, so that its activations are computed again."""

    def forward(self, *inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        # No block draws random numbers: their state need not be kept.
        return checkpoint(self._forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _forward(self, *inputs: Tensor) -> Tensor:
        with plain_attention(inputs[0].device):  # the backward pass is outside such a block
            return super().forward(*inputs)


class RecomputedResidualBlock(Recomputed, ResidualBlock):
    pass


class RecomputedAttentionBlock(Recomputed, AttentionBlock):
    pass


class RecomputedTransformer(Recomputed, SpatialTransformer):
    pass


class RecomputedCLIPLayer(Recomputed, CLIPLayer):
    pass


BLOCKS = {
    ResidualBlock: RecomputedResidualBlock,
    AttentionBlock: RecomputedAttentionBlock,
    SpatialTransformer: RecomputedTransformer,
    CLIPLayer: RecomputedCLIPLayer,
}


def recompute_activations(network: nn.Module) -> None:
    """Change the blocks of a network in place: a gradient then costs less memory and more time.

    Blocks change their class, not their weights or names. So copies of the network behave alike, and its states fit
    those of other networks.
    """
    for module in network.modules():
        module.__class__ = BLOCKS.get(type(module), type(module))
