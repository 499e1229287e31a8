"""Fully sharded training: each rank keeps a part of every weight, gradient and moment of the optimizer (2304.11277).

A network whose training does not fit on one device is divided among several. The weights of a block are collected when
it runs, and freed afterwards. torch calls this `fully_shard`, or FSDP2.

A state is a folder: NAME.state/STEP has a file of each rank, and is complete when it has `.metadata`, which is written
last. Any number of ranks can resume it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample
from sd.clip import CLIPLayer
from sd.diffusion import SpatialTransformer
from sd.training import ranks

BLOCKS = (ResidualBlock, AttentionBlock, SpatialTransformer, CLIPLayer, Downsample, Upsample)
COMPLETE = ".metadata"
LOOP = "loop.state"  # the file of a state that has no tensors of networks


class Shards:
    """Networks that are divided among the ranks, and the average of their weights, divided alike."""

    def __init__(self, networks: nn.ModuleDict, device: torch.device):
        """Divides the networks, in place. From then on, each has to be used by calling it, or its weights are not
        collected."""
        divide(networks, device)
        self.networks = networks
        self.average = {name: weight.detach().clone() for name, weight in networks.named_parameters()}

    @torch.no_grad()
    def gather(self, average: nn.ModuleDict) -> None:
        """Copy the average into the whole networks that rank 0 has."""
        for part, weight in zip(self.average.values(), average.parameters()):
            whole = part.full_tensor()  # on all ranks: each sends its part to all others
            if ranks.rank() == 0:
                weight.copy_(whole)

    def save(self, folder: Path, optimizers: list[torch.optim.Optimizer]) -> None:
        """Write the networks, the average and the optimizers. Raises OSError if they cannot be written."""
        from torch.distributed import checkpoint

        try:
            checkpoint.save(self._state(optimizers), checkpoint_id=folder)
        except checkpoint.CheckpointException as error:  # of any rank
            raise OSError(f"{folder} cannot be written ({error.failures}); an earlier state is kept.") from error

    def load(self, folder: Path, optimizers: list[torch.optim.Optimizer]) -> None:
        """Read what `save` wrote, perhaps with another number of ranks."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        state = self._state(optimizers)
        checkpoint.load(state, checkpoint_id=folder)  # into the tensors of the state
        set_optimizer_state_dict(self.networks, optimizers, state["optimizers"])

    def _state(self, optimizers: list[torch.optim.Optimizer]) -> dict:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        moments = get_optimizer_state_dict(self.networks, optimizers)
        return {"networks": self.networks.state_dict(), "average": self.average, "optimizers": moments}


def divide(networks: nn.ModuleDict, device: torch.device) -> None:
    """Divide the weights among all ranks: those of each block, and the rest of each network."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (ranks.count(),))
    for network in networks.values():
        for block in [module for module in network.modules() if isinstance(module, BLOCKS)]:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that may be divided. It shares the tensor's memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided, in one piece. All ranks have to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def newest(path: Path) -> Path | None:
    """The newest complete state in the folder `path`, or None."""
    complete = [folder for folder in path.iterdir() if (folder / COMPLETE).exists()] if path.is_dir() else []
    return max(complete, key=lambda folder: int(folder.name), default=None)


def delete_others(folder: Path) -> None:
    """Delete all states but this one."""
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
