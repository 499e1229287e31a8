"""What to do when memory runs out: an error that says it, and leaves the process able to go on.

In: any block of work. Out: nothing, or `OutOfMemory` with the work's own tensors freed.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What torch's RuntimeErrors say: the CPU's allocator has no error class of its own, and MPS has none either.
SIGNS = (
    *("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory"),
    *("Invalid buffer size", "CUBLAS_STATUS_ALLOC_FAILED"),
)
ADVICE = (
    "ask for a smaller height and width or for fewer prompts at once, load the model with dtype=torch.float16 "
    "(torch.bfloat16 on a CPU), or let the networks wait elsewhere with idle_device='cpu'"
)


class OutOfMemory(MemoryError):
    """There is not enough memory for this picture. The next, smaller one can be made in the same process."""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turns torch's errors about memory into `OutOfMemory`. Usable with `with`, and as a decorator of functions."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they would keep the tensors of the work alive
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    raise OutOfMemory(f"There is not enough memory ({reason or 'none is left'}): {ADVICE}.")


def _is_about_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(sign in str(error) for sign in SIGNS)
