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
    Checkpoint,
    CheckpointError,
    check_count,
    check_numbers,
    our_config,
    parse_config,
    part,
    storage_over,
    view,
)
from sd.checkpoints.unpickler import MAX_NAME

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library; previews in metadata take megabytes

WRITTEN_DTYPES = {
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
DTYPES = WRITTEN_DTYPES | {
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
# The other dtypes of the format, which torch 2.4 lacks, and their bits. No network can use them.
UNREADABLE_DTYPES = {"F8_E8M0": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4}


def read_safetensors(data: mmap.mmap) -> Checkpoint:
    """The tensors of a mapped file. They must fill it without a gap or an overlap."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise CheckpointError(f"is truncated: its header alone has {start - 8:,} bytes; download it again")
    if start - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"has a safetensors header of {start - 8:,} bytes; the limit of the format is {MAX_HEADER_BYTES:,}"
        )
    header = _parse_header(data[8:start])
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # an empty list is damage
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
    state, unreadable = {}, {}
    for name, (kind, shape, begin, end) in entries.items():
        if kind in UNREADABLE_DTYPES:
            unreadable[name] = f"dtype {kind}"
            continue
        dtype = DTYPES[kind]
        stride = tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1] if shape else ()
        state[name] = view(name, part(mapped, start + begin, end - begin, dtype), dtype, 0, shape, stride)
    return Checkpoint(state, our_config(metadata, parse_config), metadata=metadata, unreadable=unreadable)


def _parse_header(content: bytes) -> dict:
    """JSON as in RFC 8259. Python's own parser also accepts NaN, numbers of any size, half surrogate pairs and two
    entries with one name. Other readers refuse such files, or read them differently."""
    hooks = {"parse_int": _whole, "parse_float": _finite, "parse_constant": _finite}
    header = json.loads(text := content.decode(), object_pairs_hook=_unique, **hooks)
    if "\\u" in text:
        json.dumps(header, ensure_ascii=False).encode()  # fails on half a surrogate pair
    return header


def _whole(text: str) -> int:
    if len(text) > 300:
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


def _safetensors_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's dtype, shape, first byte and the byte after its last, checked against each other."""
    if len(name) > MAX_NAME:
        raise CheckpointError(f"has a tensor with a name of {len(name):,} characters; the limit here is {MAX_NAME:,}")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            check_numbers(name, (*shape, begin, end))
        case _:
            raise CheckpointError(f"is damaged: its header lacks dtype, shape or data_offsets of {name!r:.80}")
    if dtype not in DTYPES and dtype not in UNREADABLE_DTYPES:
        raise CheckpointError(f"has {name!r:.80} in dtype {dtype!r:.20}; known are {', '.join(DTYPES)}")
    bits = 8 * DTYPES[dtype].itemsize if dtype in DTYPES else UNREADABLE_DTYPES[dtype]
    if 8 * (end - begin) != math.prod(shape) * bits:
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has more or fewer bytes than its shape needs")
    return dtype, tuple(shape), begin, end


def write_safetensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The header keeps the order of `tensors`. The data has the widest dtypes first, so that all are aligned."""
    dtype_names = {dtype: name for name, dtype in WRITTEN_DTYPES.items()}
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
