"""What a weight file holds, the error for an unreadable one, and the checks that all formats share.

Error messages start with a verb ("is truncated"): `files.read_checkpoint` puts the file's name in front.
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

# Real checkpoints stay far below these limits. Without limits, a file of a few kilobytes could demand terabytes.
MAX_HEADER_BYTES = 8 << 20  # of a pickle or a safetensors header: those of Stable Diffusion are below 1 MB
MAX_CONFIG_CHARACTERS = 1 << 16  # of JSON: our configuration has 500
MAX_TENSORS = 20_000  # Stable Diffusion 1.5 has 1,131, and 1,819 with its averaged weights
MAX_DIMENSIONS = 16
MAX_REPEATED_ELEMENTS = 1 << 24  # in a tensor that repeats elements of its storage (stride 0)


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint, or a state dict cannot be written as one."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: tensors by name, and its configuration, or None."""

    state: dict[str, Tensor]
    config: dict | None
    mappings: tuple[mmap.mmap, ...] = ()  # of the file, or of each file in a folder

    def release(self) -> None:
        """Frees the memory of all pages read so far. A page that is needed again is read from the file again.

        For callers that have copied the tensors. Changes made to the tensors are lost.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)


def storage_over(data: mmap.mmap | bytearray) -> UntypedStorage:
    """A storage that shares its memory with `data`."""
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else UntypedStorage(0)


def part(mapped: UntypedStorage, start: int, size: int, dtype: torch.dtype) -> UntypedStorage:
    """Some bytes of the mapped file: a view, or a copy if they are not aligned for this dtype."""
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
    """A tensor in a storage. Raises CheckpointError unless all its elements lie inside."""
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= MAX_DIMENSIONS:
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has an impossible shape or place")
    check_numbers(name, (offset, *size, *stride))
    elements = storage.nbytes() // dtype.itemsize
    end = offset + (1 + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else 0)
    if end > elements or math.prod(max(length, 1) for length in size) > max(elements, MAX_REPEATED_ELEMENTS):
        raise CheckpointError(f"is damaged: tensor {name!r:.80} is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def plain_config(config: Any) -> dict | None:
    """A configuration as JSON gives it back, or None if it is no dict or JSON cannot express it."""
    text = ""
    try:
        for piece in json.JSONEncoder().iterencode(config):  # in pieces: a few nested lists can expand to gigabytes
            text += piece
            if len(text) > MAX_CONFIG_CHARACTERS:
                return None
    except (TypeError, ValueError, RecursionError):
        return None
    return parse_config(text)


def parse_config(text: Any) -> dict | None:
    """The dict in a JSON text, or None."""
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
