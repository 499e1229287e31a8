"""The two formats of torch.save: a mapped file -> tensors by name."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, BinaryIO

from torch import UntypedStorage

from sd.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_count,
    our_config,
    part,
    plain_config,
    storage_over,
    view,
)
from sd.checkpoints.unpickler import MAX_PICKLE_BYTES, Call, Global, StorageNote, TensorNote, Unpickler
from sd.checkpoints.zip_archive import Archive

LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# Where trainers put the weights, best first. The last is for the vectors of textual inversion.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "string_to_param")
MAX_WRAPPERS = 4  # around one another


def read_zip(file: BinaryIO, data: mmap.mmap) -> Checkpoint:
    """A zip archive: FOLDER/data.pkl describes the tensors, FOLDER/data/KEY holds each storage."""
    archive = Archive(file, data)
    pickles = [name for name in archive.records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("is a zip archive that torch.save did not write; unpack it if it has a checkpoint in it")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.records:
        _check_byteorder(archive.read(f"{folder}byteorder", 100) == b"little")
    mapped = storage_over(data)

    def storage_of(note: StorageNote) -> UntypedStorage:
        name = f"{folder}data/{note.key}"
        if archive.is_packed(name):
            return storage_over(bytearray(archive.read(name)))
        return part(mapped, *archive.place(name), note.dtype)

    return _from_notes(Unpickler(archive.read(pickles[0], MAX_PICKLE_BYTES), len(data)).load(), storage_of)


def _check_byteorder(little: bool) -> None:
    if not little:
        raise CheckpointError("was saved on a big-endian machine; save it again on a little-endian one")


def read_legacy(data: mmap.mmap) -> Checkpoint:
    """Five pickles (magic number, protocol, system, the tensors' notes, the storages' keys), then the storages."""
    unpickler = Unpickler(data, len(data))
    if unpickler.load() != LEGACY_MAGIC_NUMBER:
        raise CheckpointError("is a Python pickle that torch.save did not write, without readable tensors")
    _protocol, system, root, keys = (unpickler.load() for _ in range(4))
    _check_byteorder(not (isinstance(system, dict) and system.get("little_endian") is False))
    places = {}
    position = unpickler.position
    for key in keys:
        if type(key) is not str or key not in unpickler.storages:
            raise CheckpointError("is damaged: it lists a storage that its pickle does not use")
        note = unpickler.storages[key]
        if int.from_bytes(data[position : position + 8], "little") != note.count:
            raise CheckpointError("is damaged or truncated: a storage does not have the size that the pickle says")
        places[key] = (position + 8, note.count * note.dtype.itemsize)
        position = sum(places[key])
    mapped = storage_over(data)
    return _from_notes(root, lambda note: part(mapped, *places[note.key], note.dtype))


def _from_notes(root: Any, storage_of: Callable[[StorageNote], UntypedStorage]) -> Checkpoint:
    """The value of a pickle -> the tensors that its notes describe.

    A tensor without a name gets the name "". `storage_of` gives the storage of a note, and raises KeyError if the file
    has none.
    """
    top = {"": root} if isinstance(root, TensorNote) else root if isinstance(root, dict) else {}
    entries = _entries(top)
    check_count(len(entries))
    storages: dict[str, UntypedStorage] = {}  # tied tensors share one
    state, unreadable = {}, {}
    for name, note in entries.items():
        if isinstance(note, TensorNote):
            key = note.storage.key
            try:
                storages[key] = storages[key] if key in storages else storage_of(note.storage)
            except KeyError:
                raise CheckpointError(f"is damaged: the storage of tensor {name!r:.80} is missing") from None
            if storages[key].nbytes() < note.storage.count * note.storage.dtype.itemsize:
                raise CheckpointError(f"is damaged: the storage of tensor {name!r:.80} is too small")
            state[name] = view(name, storages[key], note.dtype, note.offset, note.size, note.stride)
        elif _is_unreadable(note):
            unreadable[name] = f"kind {note.function.name:.80}"
    if not state:
        for name, kind in unreadable.items():
            raise CheckpointError(f"has tensor {name!r:.80} of an unsupported {kind}")
        raise CheckpointError("has no tensors by name, at its top level or under `state_dict`; save model.state_dict()")
    return Checkpoint(state, our_config(top, plain_config), unreadable=unreadable)


def _entries(entries: dict) -> dict:
    """The dictionary with the tensors: under one or more of the names that trainers use, or `entries` itself."""
    for _ in range(MAX_WRAPPERS):
        inner = (
            wrapped for wrapped in _wrapped(entries) if any(map(_is_tensor, wrapped.values())) or _wrapped(wrapped)
        )
        entries = next(inner, entries)
    return entries


def _wrapped(entries: dict) -> list[dict]:
    return [entries[name] for name in WRAPPERS if isinstance(entries.get(name), dict)]


def _is_tensor(note: Any) -> bool:
    return isinstance(note, TensorNote) or _is_unreadable(note)


def _is_unreadable(note: Any) -> bool:
    """Whether this is a tensor of a kind that the unpickler does not know: sparse, quantized or complex."""
    return isinstance(note, Call) and isinstance(note.function, Global) and note.function.name.startswith("_rebuild")
