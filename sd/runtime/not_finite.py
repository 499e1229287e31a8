"""Checks the networks' outputs for NaN and infinity, which would decode to a black image.

If the VAE overflows in float16, it runs again in float32. In all other cases an error names the network and the cause.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sd.runtime import warn
from sd.runtime.devices import device_and_dtype


class NotFiniteError(ValueError):
    """A network's output contains NaN or infinity."""


def check_finite(output: Tensor, network: nn.Module, name: str, inputs: Tensor | None = None, when: str = "") -> Tensor:
    """Returns `output` if all its values are finite, and raises NotFiniteError otherwise.

    The error names the network (`name`), the time (`when`, such as " at step 3 of 20") and the cause: damaged weights,
    `inputs` that were not finite already, or the range of the dtype.
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
    """Runs the VAE's encoder or decoder on its inputs -> its output in float32, finite.

    If it overflows in float16, it runs again in float32. bfloat16 has float32's range, but its images are off by 0.4 of
    255 levels on average, those of float16 by 0.04 (tests/training/test_tiny_checkpoint.py). Neither is visible, but
    float32 loses nothing, and only the inputs that overflow take longer. The network itself stays in float16: otherwise
    an image would depend on the images made before it, not only on its prompt and seed.

    Raises NotFiniteError if float32 does not help, and after any overflow in another dtype.
    """
    device, dtype = device_and_dtype(network)
    output = network(*(x.to(device, dtype) for x in inputs))
    if dtype == torch.float16 and not output.isfinite().all():
        wide = {key: tensor.float() for key, tensor in network.state_dict().items()}
        eager = copy.copy(network)  # the copy is not compiled: compiling it for one call would take minutes
        output = torch.func.functional_call(eager, wide, tuple(x.to(device, torch.float32) for x in inputs))
        if output.isfinite().all():
            warn(f"The {name} overflowed in float16 and ran again in float32.")
    return check_finite(output, network, name, inputs[0]).float()
