"""LoRA, as it is trained: each weight W of a network gets a change of low rank (2106.09685), and only that is trained.

    W' = W + (alpha / r) B A        B (out, r), which starts with zeros, A (r, in)        (section 4.1)

In: a network. Out: a copy of it that shares its weights and wears the changes, and a file that any program reads which
knows LoRA. How such a file is read: `sd.adapters.lora`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sd.adapters.lora_modules import sharing_weights
from sd.adapters.lora_names import layer_names
from sd.checkpoints.files import write_checkpoint
from sd.model_converter import CONVOLUTIONS_1X1
from sd.models import Models


class LowRank(nn.Module):
    """The change of one weight (out, in), or (out, in, k, k) of a convolution, which is taken as (out, in k k).

    alpha = r: the factor alpha / r is 1.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.up = nn.Parameter(torch.zeros(rows, rank))  # B
        self.down = nn.Parameter(torch.empty(rank, columns))  # A
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as torch starts the weights of a linear layer

    def forward(self, weight: Tensor) -> Tensor:
        """W -> W + B A, in the shape and dtype of W."""
        return weight + (self.up @ self.down).view_as(weight).to(weight.dtype)


def low_rank_changes(network: nn.Module, rank: int) -> nn.ModuleDict:
    """A `LowRank` for each linear layer and convolution of a network, by its name, with "/" in place of dots."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return nn.ModuleDict({name.replace(".", "/"): LowRank(module.weight, rank) for name, module in layers.items()})


def wearing(network: nn.Module, changes: nn.ModuleDict) -> nn.Module:
    """A copy of the network with the changes. Its weights are the network's own, and are computed with the changes
    whenever a layer uses them: gradients reach the changes."""
    network = sharing_weights(network)
    for name, change in changes.items():
        module = network.get_submodule(name.replace("/", "."))
        parametrize.register_parametrization(module, "weight", change, unsafe=True)  # unsafe: it is known to fit
    return network


def write_low_rank(path: Path, changes: nn.ModuleDict, models: Models) -> None:
    """Write the changes of the U-Net of `models` as a file with kohya's names, in float16. Raises OSError if it cannot
    be written."""
    write_checkpoint(path, low_rank_state(changes, models))


def low_rank_state(changes: nn.ModuleDict, models: Models) -> dict[str, Tensor]:
    """The tensors of `write_low_rank`.

    Queries, keys and values, one matrix here, are three layers there: each gets its rows of B, and all of A.
    """
    state = {}
    layers = set(layer_names({"clip": models.clip, "diffusion": models.diffusion}, models.config.unet).values())
    for layer in sorted(layers, key=lambda layer: layer.path):
        ours = layer.module.replace(".", "/")
        if layer.network != "diffusion" or ours not in changes:
            continue
        up, down = changes[ours].up[layer.first_row : layer.first_row + layer.shape[0]], changes[ours].down
        kernel = layer.shape[2:]
        if CONVOLUTIONS_1X1.search(f"{layer.path}.weight") and not models.config.text.is_openclip:
            kernel = (1, 1)  # a linear layer here, a convolution there
        if kernel:
            up, down = up[:, :, None, None], down.unflatten(1, (-1, *kernel))
        name = f"lora_unet_{layer.path.replace('.', '_')}"
        state[f"{name}.lora_up.weight"] = up.detach().half().contiguous()
        state[f"{name}.lora_down.weight"] = down.detach().half().contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(len(down))).half()
    return state
