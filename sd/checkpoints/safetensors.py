"""The safetensors format, read and written: 8 bytes with the length of a header, the header in JSON, then the tensors.

Every number in the file is checked here, in exact integers, before it describes a tensor.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import operator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sd.checkpoints.checkpoint import (
    MAX_HEADER_BYTES,
    Checkpoint,
    CheckpointError,
    check_count,
    check_numbers,
    parse_config,
    part,
    storage_over,
    view,
)
from sd.checkpoints.unpickler import MAX_NAME

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(data: mmap.mmap) -> Checkpoint:
    """The tensors of a mapped file. They must fill it without a gap or an overlap."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise CheckpointError(f"is truncated: its header alone has {start - 8:,} bytes; download it again")
    if start > MAX_HEADER_BYTES:
        raise CheckpointError(f"is damaged: its safetensors header is too long, {start - 8:,} bytes")
    header = _parse_header(data[8:start])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError("is damaged: its __metadata__ is not a dict from text to text")
    check_count(len(header))
    entries = {name: _safetensors_entry(name, entry) for name, entry in header.items()}
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise CheckpointError(f"is damaged: tensor {name!r:.80} begins at byte {begin:,} instead of {position:,}")
        position = end
    if position != len(data) - start:
        problem = "truncated" if position > len(data) - start else "damaged"
        raise CheckpointError(f"is {problem}: it has {len(data) - start:,} bytes of tensors instead of {position:,}")
    if not entries:
        raise CheckpointError("is a safetensors file without tensors")
    mapped = storage_over(data)
    state = {}
    for name, (dtype, shape, begin, end) in entries.items():
        stride = tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1] if shape else ()
        state[name] = view(name, part(mapped, start + begin, end - begin, dtype), dtype, 0, shape, stride)
    return Checkpoint(state, parse_config(metadata.get("config")))


def _parse_header(content: bytes) -> dict:
    """JSON as in RFC 8259. Python's own parser also accepts NaN, numbers of any size, half surrogate pairs and two
    entries with one name. Other readers refuse such files, or read them differently."""
    hooks = {"parse_int": _whole, "parse_float": _finite, "parse_constant": _finite}
    header = json.loads(text := content.decode(), object_pairs_hook=_unique, **hooks)
    if "\\u" in text:
        json.dumps(header, ensure_ascii=False).encode()  # fails on half a surrogate pair
    return header


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise CheckpointError(f"is damaged: its safetensors header has the number {text:.20}")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) != len(pairs):
        raise CheckpointError("is damaged: its safetensors header has a name twice")
    return entries


def _safetensors_entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """One tensor's dtype, shape, first byte and the byte after its last, checked against each other."""
    if len(name) > MAX_NAME:
        raise CheckpointError(f"is damaged: it has a tensor with a name of {len(name):,} characters")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            check_numbers(name, (*shape, begin, end))
        case _:
            raise CheckpointError(f"is damaged: its header lacks dtype, shape or data_offsets of {name!r:.80}")
    if dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"has {name!r:.80} in dtype {dtype!r:.20}; known are {', '.join(SAFETENSORS_DTYPES)}")
    if end - begin != math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has more or fewer bytes than its shape needs")
    return SAFETENSORS_DTYPES[dtype], tuple(shape), begin, end


def write_safetensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The header keeps the order of `tensors`. The data has the widest dtypes first, so that all are aligned."""
    dtype_names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    offsets, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        offsets[name] = [begin, end]
    header = {"__metadata__": metadata} | {
        name: {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets[name]}
        for name, tensor in tensors.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(tensors[name].reshape(-1).view(torch.uint8).numpy())
