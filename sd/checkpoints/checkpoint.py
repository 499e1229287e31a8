"""What a weight file holds, the error for an unreadable one, and the checks that all formats share.

Error messages start with a verb ("is truncated"): `files.read_checkpoint` puts the file's name in front.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from sd.checkpoints.unpickler import MAX_NUMBER

# Real checkpoints stay far below these limits. Without limits, a file of a few kilobytes could demand terabytes.
MAX_CONFIG_CHARACTERS = 1 << 16  # of JSON: our configuration has 500
MAX_TENSORS = 20_000  # Stable Diffusion 1.5 has 1,131, and 1,819 with its averaged weights
MAX_DIMENSIONS = 16
MAX_REPEATED_ELEMENTS = 1 << 24  # in a tensor that repeats elements of its storage (stride 0)

CONFIG_NAME = "sd_config"  # of our configuration in a file
OLD_CONFIG_NAME = "config"  # in files that we wrote before
OUR_SECTIONS = ("text", "vae", "unet", "schedule")  # that every one of those has


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint, or a state dict cannot be written as one."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: tensors by name, our configuration or None, and what else it says of itself."""

    state: dict[str, Tensor]
    config: dict | None
    mappings: tuple[mmap.mmap, ...] = ()  # of the file, or of each file in a folder
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file
    unreadable: dict[str, str] = field(default_factory=dict)  # tensors that cannot be represented, and their kind
    added_words: dict[str, int] = field(default_factory=dict)  # of a folder's tokenizer, with their token ids
    prediction_guessed: bool = False  # nothing in the file says what its U-Net predicts

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
        raise CheckpointError(f"has more than {MAX_TENSORS:,} entries, the limit of this reader")


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


def our_config(entries: dict, parse: Callable[[Any], dict | None]) -> dict | None:
    """The configuration of a ModelConfig among what a file holds beside its tensors, read by `parse`, or None.

    Our older files have it under a name that trainers also use for theirs. There, only its sections show that it is
    ours.
    """
    if CONFIG_NAME in entries:
        return parse(entries[CONFIG_NAME])
    config = parse(entries.get(OLD_CONFIG_NAME))
    ours = config is not None and all(isinstance(config.get(section), dict) for section in OUR_SECTIONS)
    return config if ours else None


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
