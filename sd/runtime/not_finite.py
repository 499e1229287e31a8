"""Notices that a network's numbers are none any more: NaN or infinity, of which a picture would come out black.

In: a network, what it was given and what it made of that. Out: the same, made again in float32 where it is a half of
the VAE that overflowed in float16, or an error that names the network and the cause.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from sd.runtime.devices import device_and_dtype


class NotFiniteError(ValueError):
    """A network gave NaN or infinity."""


def check_finite(output: Tensor, network: nn.Module, name: str, inputs: Tensor | None = None, when: str = "") -> Tensor:
    """`output` itself, if all its numbers are finite.

    Raises NotFiniteError, which calls the network `name` and says why: by its weights, by its `inputs`, or by its
    dtype. `when` is something like " at step 3 of 20".
    """
    if output.isfinite().all():
        return output
    damaged = [key for key, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if damaged:
        others = f" and {len(damaged) - 1} more of its weights hold" if len(damaged) > 1 else " holds"
        raise NotFiniteError(f"The {name} cannot be used: {damaged[0]}{others} NaN or infinity; get its file again.")
    if inputs is not None and not inputs.isfinite().all():
        remedies = "a smaller cfg_scale, another sampler, or dtype=torch.float32"
        raise NotFiniteError(f"The {name} was given NaN or infinity{when}: {remedies} may help.")
    dtype = output.dtype
    remedy = "load the model with dtype=torch.float32"
    if dtype == torch.float32:
        remedy = "its weights are damaged or badly trained"
    raise NotFiniteError(f"The {name} gave NaN or infinity{when}, in {str(dtype).removeprefix('torch.')}: {remedy}.")


def run_in_range(network: nn.Module, name: str, *inputs: Tensor) -> Tensor:
    """One half of the VAE on its inputs -> float32, finite. If it overflows in float16, it runs once more in float32.

    In float32, and not in bfloat16, whose range is as wide: whole pictures in that are 0.4 of 255 levels off on
    average, against 0.04 in float16 (tests/test_tiny_checkpoint.py). Neither is visible, but float32 loses nothing, and
    only this input pays for it. The network itself stays in float16, so that a picture depends on its own prompt and
    seed only, and not on the pictures that were made before.

    Raises NotFiniteError if float32 does not help, and at once in any other dtype.
    """
    device, dtype = device_and_dtype(network)
    output = network(*(x.to(device, dtype) for x in inputs))
    if dtype == torch.float16 and not output.isfinite().all():
        wide = {key: tensor.float() for key, tensor in network.state_dict().items()}
        eager = copy.copy(network)  # a copy is not compiled: to compile it for this would take minutes
        output = torch.func.functional_call(eager, wide, tuple(x.to(device, torch.float32) for x in inputs))
        if output.isfinite().all():
            warnings.warn(f"The {name} overflowed in float16 and ran again in float32.", stacklevel=3)
    return check_finite(output, network, name, inputs[0]).float()
