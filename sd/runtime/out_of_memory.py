"""Turns errors about memory into one clear error, and frees the tensors so that the process can go on."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# How to recognise torch's errors about memory: on the CPU and on MPS they are plain RuntimeErrors.
SIGNS = (
    *("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory"),
    *("Invalid buffer size", "CUBLAS_STATUS_ALLOC_FAILED"),
)
ADVICE = (
    "ask for a smaller height and width or for fewer prompts at once, load the model with dtype=torch.float16 "
    "(torch.bfloat16 on a CPU), or keep idle networks on the CPU with idle_device='cpu'"
)
ADVICE_FOR_TRAINING = "use --accumulate 2, --recompute or a smaller batch"


class OutOfMemory(MemoryError):
    """There is not enough memory for this image or training. The same process can go on with a smaller one."""


@contextmanager
def explain_out_of_memory(advice: str = ADVICE) -> Iterator[None]:
    """Turns torch's errors about memory into `OutOfMemory`, which says what to do. Works with `with` and as a
    decorator."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_about_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames would keep their tensors alive
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    raise OutOfMemory(f"There is not enough memory ({reason or 'none is left'}): {advice}.")


def is_about_memory(error: BaseException) -> bool:
    """Whether this is one of torch's or Python's errors about too little memory."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(sign in str(error) for sign in SIGNS)
