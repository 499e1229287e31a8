"""Puts changed weights into networks: one module after the other, so that memory never holds a second model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sd.adapters.lora import Change, merge
from sd.checkpoints.checkpoint import CheckpointError
from sd.diffusion import GEGLU
from sd.runtime import speed
from sd.runtime.devices import device_and_dtype


def sharing_weights(module: nn.Module) -> nn.Module:
    """A copy of a network whose weights are those of the original. Replacing one in the copy leaves the original."""
    new = copy.copy(module)
    vars(new).update({name: value.copy() for name, value in vars(new).items() if isinstance(value, dict)})  # hooks too
    for name, child in module.named_children():
        setattr(new, name, sharing_weights(child))
    for name, weight in module.named_parameters(recurse=False):
        setattr(new, name, nn.Parameter(weight.detach(), requires_grad=False))
    return new


def replace_modules(
    network: nn.Module,
    weights: dict[str, Tensor],
    changes: dict[str, list[Change]],
    blank: nn.Module,
    place: Callable[[Tensor], Tensor],
    pack: bool,
) -> None:
    """Replaces modules of a network by those with the checkpoint's `weights` and `changes`, which may be none.

    `blank` is an empty network of the same configuration. Its modules go into the network. `place` and `pack` are as in
    `speed.place_weights`. Raises CheckpointError if a changed weight is too large for the network's dtype.
    """
    device, dtype = device_and_dtype(network)
    for name, of_module in changes.items():
        whole = name.removesuffix(".proj")  # a GEGLU is packed as a whole
        whole = whole if isinstance(blank.get_submodule(whole), GEGLU) else name
        new = nn.Sequential(blank.get_submodule(whole))
        keys = (f"{name}.{part}" for part in ("weight", "bias"))
        state = {key: weights[key] for key in keys if key in weights}
        if of_module:
            parts = {key.removeprefix(f"{name}."): tensor.to(device) for key, tensor in state.items()}
            merged = merge(parts, of_module)
            _check_range(name, merged, of_module, dtype)
            state = {f"{name}.{part}": tensor for part, tensor in merged.items()}
        new[0].load_state_dict({key.removeprefix(f"{whole}."): x for key, x in state.items()}, assign=True)
        new.eval().requires_grad_(False)
        speed.place_weights(new, place, pack)
        parent, _, child = whole.rpartition(".")
        setattr(network.get_submodule(parent), child, new[0])


def _check_range(name: str, merged: dict[str, Tensor], changes: list[Change], dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for tensor in merged.values():
        low, high = tensor.aminmax()  # NaN if any number is
        if not (low >= -limit and high <= limit):
            paths = ", ".join(dict.fromkeys(str(change.path) for change in changes))
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{paths}: with these strengths, {name} has numbers that {kind} cannot hold.")
