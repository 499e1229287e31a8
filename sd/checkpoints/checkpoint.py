"""What a weight file holds, the error for one that cannot be read, and the checks that all formats share.

Errors speak of the file as "it": `files.read_checkpoint` puts its name in front.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from sd.checkpoints.unpickler import MAX_NUMBER

# Honest files stay far below these limits; without them a file of a few kilobytes can claim terabytes.
MAX_HEADER_BYTES = 8 << 20  # of a pickle or a safetensors header: Stable Diffusion's are below 1 MB
MAX_CONFIG_CHARACTERS = 1 << 16  # of JSON: ours has 500
MAX_TENSORS = 20_000  # Stable Diffusion 1.5 has 1,131, and 1,819 with its averaged weights
MAX_DIMENSIONS = 16
MAX_REPEATED_ELEMENTS = 1 << 24  # in a tensor that shows elements of its storage more than once (stride 0)


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint, or a state that cannot be written as one."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: tensors by name, and the configuration if it carries one."""

    state: dict[str, Tensor]
    config: dict | None
    mappings: tuple[mmap.mmap, ...] = ()  # of the file, or of each file of a folder

    def release(self) -> None:
        """Gives back the memory of all that was read so far: the system fetches a page again when somebody looks at it.

        For those who copy tensors and need the originals no more. Changes made to the tensors are lost.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)


def storage_over(data: mmap.mmap | bytearray) -> UntypedStorage:
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else UntypedStorage(0)


def part(mapped: UntypedStorage, start: int, size: int, dtype: torch.dtype) -> UntypedStorage:
    """Bytes of the mapped file in place, or a copy of them if they do not lie where numbers of this dtype may."""
    if not 0 <= start <= start + size <= mapped.nbytes():
        raise CheckpointError("is truncated: a tensor lies beyond its end; download it again")
    part = mapped[start : start + size]
    return part.clone() if start % dtype.itemsize else part


def check_count(entries: int) -> None:
    if entries > MAX_TENSORS:
        raise CheckpointError(f"has more than {MAX_TENSORS:,} entries")


def check_numbers(name: str, numbers: tuple) -> None:
    too_many = len(numbers) > 2 * MAX_DIMENSIONS + 1  # size, stride, offset
    if too_many or not all(type(number) is int and 0 <= number < MAX_NUMBER for number in numbers):
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has an impossible shape or place")


def view(name: str, storage: UntypedStorage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    """A tensor in a storage, made only if all of its elements lie inside."""
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= MAX_DIMENSIONS:
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has an impossible shape or place")
    check_numbers(name, (offset, *size, *stride))
    elements = storage.nbytes() // dtype.itemsize
    end = offset + (1 + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else 0)
    if end > elements or math.prod(max(length, 1) for length in size) > max(elements, MAX_REPEATED_ELEMENTS):
        raise CheckpointError(f"is damaged: tensor {name!r:.80} is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def plain_config(config: Any) -> dict | None:
    text = ""
    try:
        for piece in json.JSONEncoder().iterencode(config):  # in pieces: a few nested lists can spell out gigabytes
            text += piece
            if len(text) > MAX_CONFIG_CHARACTERS:
                return None
    except (TypeError, ValueError, RecursionError):
        return None
    return parse_config(text)


def parse_config(text: Any) -> dict | None:
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
