"""A checkpoint file that is mapped into memory -> its tensors by name, for each of the three formats.

What every number in the file claims is checked here, in exact integers, before a tensor is made of it. Errors speak of
the file as "it"; `checkpoint.read_checkpoint` puts its name in front.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor, UntypedStorage

from sd.archive import Archive, CheckpointError
from sd.unpickler import MAX_NAME, MAX_NUMBER, Call, Global, StorageNote, TensorNote, Unpickler

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
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C

# Honest files stay far below these limits; without them a file of a few kilobytes can claim terabytes.
MAX_HEADER_BYTES = 8 << 20  # of a pickle or a safetensors header: Stable Diffusion's are below 1 MB
MAX_CONFIG_CHARACTERS = 1 << 16  # of JSON: ours has 500
MAX_TENSORS = 20_000  # Stable Diffusion 1.5 has 1,131, and 1,819 with its averaged weights
MAX_DIMENSIONS = 16
MAX_REPEATED_ELEMENTS = 1 << 24  # in a tensor that shows elements of its storage more than once (stride 0)


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


# ---- safetensors


def read_safetensors(data: mmap.mmap) -> Checkpoint:
    """8 bytes with the length of the header, the header in JSON, then the tensors without a gap."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise CheckpointError(f"is truncated: its header alone claims {start - 8:,} bytes; download it again")
    if start > MAX_HEADER_BYTES:
        raise CheckpointError(f"is damaged: its safetensors header claims {start - 8:,} bytes")
    header = _parse_header(data[8:start])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError("is damaged: its __metadata__ is not from text to text")
    _check_count(len(header))
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
    mapped = _storage(data)
    state = {}
    for name, (dtype, shape, begin, end) in entries.items():
        stride = tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1] if shape else ()
        state[name] = _view(name, _part(mapped, start + begin, end - begin, dtype), dtype, 0, shape, stride)
    return Checkpoint(state, _parse_config(metadata.get("config")))


def _parse_header(content: bytes) -> dict:
    """JSON as RFC 8259 has it. Python's own parser also takes NaN, numbers of any size and half characters, and of two
    entries of one name the second: files that other readers refuse, or read otherwise."""
    hooks = {"parse_int": _whole, "parse_float": _finite, "parse_constant": _finite}
    header = json.loads(text := content.decode(), object_pairs_hook=_unique, **hooks)
    if "\\u" in text:
        json.dumps(header, ensure_ascii=False).encode()  # fails on half a character
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
    """The dtype, shape, first byte and byte behind the last of one tensor, checked against each other."""
    if len(name) > MAX_NAME:
        raise CheckpointError(f"is damaged: it has a tensor with a name of {len(name):,} characters")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            _check_numbers(name, (*shape, begin, end))
        case _:
            raise CheckpointError(f"is damaged: its header lacks dtype, shape or data_offsets of {name!r:.80}")
    if dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"has {name!r:.80} in dtype {dtype!r:.20}; known are {', '.join(SAFETENSORS_DTYPES)}")
    if end - begin != math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has not as many bytes as its dtype and shape need")
    return SAFETENSORS_DTYPES[dtype], tuple(shape), begin, end


# ---- torch.save


def read_zip(file: BinaryIO, data: mmap.mmap) -> Checkpoint:
    """A zip archive: FOLDER/data.pkl holds the notes, FOLDER/data/KEY each storage."""
    archive = Archive(file, data)
    pickles = [name for name in archive.records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("is a zip archive that torch.save did not write; unpack it if a checkpoint is in it")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.records:
        _check_byteorder(archive.read(f"{folder}byteorder", 100) == b"little")
    mapped = _storage(data)

    def storage_of(note: StorageNote) -> UntypedStorage:
        name = f"{folder}data/{note.key}"
        if archive.is_packed(name):
            return _storage(bytearray(archive.read(name)))
        return _part(mapped, *archive.place(name), note.dtype)

    return _from_notes(Unpickler(archive.read(pickles[0], MAX_HEADER_BYTES), MAX_HEADER_BYTES).load(), storage_of)


def _check_byteorder(little: bool) -> None:
    if not little:
        raise CheckpointError("was saved on a big-endian machine; save it again on a little-endian one")


def read_legacy(data: mmap.mmap) -> Checkpoint:
    """Five pickles (magic number, protocol, system, the notes, the keys of the storages), then the storages."""
    unpickler = Unpickler(data, MAX_HEADER_BYTES)
    if unpickler.load() != LEGACY_MAGIC_NUMBER:
        raise CheckpointError("is a Python pickle that torch.save did not write, so without tensors that can be read")
    _protocol, system, root, keys = (unpickler.load() for _ in range(4))
    _check_byteorder(not (isinstance(system, dict) and system.get("little_endian") is False))
    places = {}
    position = unpickler.position
    for key in keys:
        if type(key) is not str or key not in unpickler.storages:
            raise CheckpointError("is damaged: it lists a storage that its pickle does not know")
        note = unpickler.storages[key]
        if int.from_bytes(data[position : position + 8], "little") != note.count:
            raise CheckpointError("is damaged or truncated: a storage has not the size that the pickle says")
        places[key] = (position + 8, note.count * note.dtype.itemsize)
        position = sum(places[key])
    mapped = _storage(data)
    return _from_notes(root, lambda note: _part(mapped, *places[note.key], note.dtype))


def _from_notes(root: Any, storage_of: Callable[[StorageNote], UntypedStorage]) -> Checkpoint:
    """The value of a pickle -> the tensors that its notes describe; `storage_of` raises KeyError for an unknown key."""
    top = root if isinstance(root, dict) else {}
    entries = top["state_dict"] if isinstance(top.get("state_dict"), dict) else top
    _check_count(len(entries))
    storages: dict[str, UntypedStorage] = {}  # tied tensors share one
    state = {}
    for name, note in entries.items():
        if isinstance(note, TensorNote):
            key, dtype = note.storage.key, note.storage.dtype
            try:
                storages[key] = storages[key] if key in storages else storage_of(note.storage)
            except KeyError:
                raise CheckpointError(f"is damaged: the storage of tensor {name!r:.80} is missing") from None
            if storages[key].nbytes() < note.storage.count * dtype.itemsize:
                raise CheckpointError(f"is damaged: the storage of tensor {name!r:.80} is too small")
            state[name] = _view(name, storages[key], dtype, note.offset, note.size, note.stride)
        elif isinstance(note, Call) and isinstance(note.function, Global) and note.function.name.startswith("_rebuild"):
            raise CheckpointError(f"has tensor {name!r:.80} of a kind that cannot be read: {note.function.name:.80}")
    if "string_to_param" in top:
        raise CheckpointError("is a textual inversion embedding; what is needed is a Stable Diffusion 1.x checkpoint")
    if not state:
        raise CheckpointError("has no tensors by name, at its top level or under `state_dict`; save model.state_dict()")
    return Checkpoint(state, _plain_config(top.get("config")))


# ---- what the formats share


def _storage(data: mmap.mmap | bytearray) -> UntypedStorage:
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else UntypedStorage(0)


def _part(mapped: UntypedStorage, start: int, size: int, dtype: torch.dtype) -> UntypedStorage:
    """Bytes of the mapped file in place, or a copy of them if they do not lie where numbers of this dtype may."""
    if not 0 <= start <= start + size <= mapped.nbytes():
        raise CheckpointError("is truncated: a tensor lies beyond its end; download it again")
    part = mapped[start : start + size]
    return part.clone() if start % dtype.itemsize else part


def _check_count(entries: int) -> None:
    if entries > MAX_TENSORS:
        raise CheckpointError(f"has more than {MAX_TENSORS:,} entries")


def _check_numbers(name: str, numbers: tuple) -> None:
    too_many = len(numbers) > 2 * MAX_DIMENSIONS + 1  # size, stride, offset
    if too_many or not all(type(number) is int and 0 <= number < MAX_NUMBER for number in numbers):
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has an impossible shape or place")


def _view(name: str, storage: UntypedStorage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    """A tensor in a storage, made only if all of its elements lie inside."""
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= MAX_DIMENSIONS:
        raise CheckpointError(f"is damaged: tensor {name!r:.80} has an impossible shape or place")
    _check_numbers(name, (offset, *size, *stride))
    elements = storage.nbytes() // dtype.itemsize
    end = offset + (1 + sum((length - 1) * step for length, step in zip(size, stride)) if all(size) else 0)
    if end > elements or math.prod(max(length, 1) for length in size) > max(elements, MAX_REPEATED_ELEMENTS):
        raise CheckpointError(f"is damaged: tensor {name!r:.80} is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def _plain_config(config: Any) -> dict | None:
    text = ""
    try:
        for piece in json.JSONEncoder().iterencode(config):  # in pieces: a few nested lists can spell out gigabytes
            text += piece
            if len(text) > MAX_CONFIG_CHARACTERS:
                return None
    except (TypeError, ValueError, RecursionError):
        return None
    return _parse_config(text)


def _parse_config(text: Any) -> dict | None:
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
