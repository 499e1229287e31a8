"""A simulated GPU: tensors that report CUDA or MPS as their device, while the CPU computes.

It refuses what real GPUs refuse: an operation on tensors of two devices, NumPy arrays that share memory with a tensor,
and float64 on MPS. So device transfers are tested on any machine; kernels are not. The name of the device needs its
index, as in "cuda:0".
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)
# Operations that also take CPU tensors: those without dimensions, which count as Python numbers, and indices.
TAKE_NUMBERS = tuple(getattr(ATEN, name).Tensor for name in ("add", "sub", "mul", "div"))
TAKE_INDICES = (ATEN.index.Tensor,)
# The CPU must wait for the device here: it needs a value, or the number of values.
WAITING = (ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default)


class Elsewhere(torch.Tensor):
    """A tensor on the accelerator, wrapped around the CPU tensor that computes. For torch itself it is on the meta
    device, because torch's code for CUDA tensors does not run without a GPU."""

    is_meta = False

    @staticmethod
    def __new__(cls, core, device):
        layout = {"strides": core.stride(), "storage_offset": core.storage_offset(), "dtype": core.dtype}
        return cls._make_wrapper_subclass(cls, core.shape, device="meta", **layout)

    def __init__(self, core, device):
        self.core, self.place = core, device

    @property
    def device(self):
        return self.place

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec)

    def __reduce_ex__(self, protocol):
        return self.core.__reduce_ex__(protocol)  # for torch.save; its files are loaded with map_location="cpu"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of the block with an accelerator")


class Accelerator(TorchDispatchMode):
    """Simulates the device while active. `waits` counts the operations that the CPU had to wait for."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.waits = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = []
        replaced([args, kwargs], leaves.append)
        here = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
        stays = isinstance(args[0], Elsewhere) if function is ATEN.copy_.default else bool(here)
        args, kwargs = replaced([args, kwargs or {}], lambda leaf: getattr(leaf, "core", leaf))
        if kwargs.get("device") is not None:  # torch itself believes that the device is "meta"
            stays = torch.device(kwargs["device"]).type in (self.device.type, "meta")
            kwargs["device"] = torch.device("cpu")
        if here and function not in (*COPIES, *TAKE_INDICES):
            others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Elsewhere)]
            mixed = [tensor for tensor in others if tensor.ndim or function not in TAKE_NUMBERS]
            assert not mixed, f"{function} on tensors of two devices"
        if stays:
            assert not any(isinstance(leaf, torch.Generator) for leaf in leaves), f"{function} by the CPU's generator"
        if here and (function in WAITING or not stays):
            self.waits[str(function)] += 1
        result = function(*args, **kwargs)
        return self._placed(result, here) if stays else result

    def _placed(self, result, here):
        """`result` on the device. A tensor that was changed in place comes back as the same object."""
        known = {id(tensor.core): tensor for tensor in here}

        def place(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            assert not (self.device.type == "mps" and leaf.dtype == torch.float64), "MPS has no float64"
            return known[id(leaf)] if id(leaf) in known else Elsewhere(leaf, self.device)

        return replaced(result, place)


def replaced(value, change):
    """`value` with `change` applied to everything in its lists, tuples and dictionaries."""
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([replaced(item, change) for item in value])
    return change(value)


@contextmanager
def accelerator(name):
    """An active `Accelerator(name)`, with the memory and the torch functions of such a device."""
    free = 1 << 34
    with ExitStack() as stack:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor then makes a CPU tensor and copies it
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        for target, answer in (
            ("torch.cuda._lazy_init", None),
            ("torch.cuda.amp.common.amp_definitely_not_available", False),
            ("torch.cuda.is_bf16_supported", True),
            ("torch.cuda.get_device_capability", (9, 0)),
            ("torch.cuda.mem_get_info", (free, free)),
            ("torch.cuda.max_memory_allocated", 1 << 20),
            ("torch.cuda.reset_peak_memory_stats", None),
            ("torch.cuda.synchronize", None),
            ("torch.mps.synchronize", None),
            ("torch.mps.recommended_max_memory", free),
            ("torch.mps.current_allocated_memory", 0),
        ):
            stack.enter_context(patch(target, lambda *_, answer=answer: answer, create=True))  # not in all versions
        yield stack.enter_context(Accelerator(name))
