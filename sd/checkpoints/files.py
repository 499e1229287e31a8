"""A file on disk -> tensors by name, without running code that it contains; and back.

A checkpoint is a dictionary from names to tensors. On disk it has one of three formats, told apart by their content:

- safetensors: 8 bytes with the length of a header, the header in JSON (name -> dtype, shape, first and last byte), then
  the numbers of all tensors.
- torch.save's zip, the usual `.ckpt`: the record `data.pkl` is a pickle of the dictionary. It describes each tensor as
  "the view of storage 7 with this offset, shape and stride". The record `data/7` is that storage, uncompressed.
- torch.save before version 1.6: the same pickle, then a list with the names of the storages, then each storage after
  8 bytes with its number of elements.

Beside the tensors a trainer may have stored anything (epochs, callbacks, an optimizer), and a stranger may have stored
a program. Neither is run: see unpickler.py. safetensors.py and torch_save.py read the formats.

The file is mapped into memory, not read. The tensors are views of the mapping, and the operating system reads a page
when it is first used. The mapping is private, so changing a tensor never changes the file. Do not overwrite a file in
place while its tensors are in use. `write_checkpoint` is safe: it puts a new file in the old one's place.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sd.checkpoints.checkpoint import CONFIG_NAME, MAX_CONFIG_CHARACTERS, Checkpoint, CheckpointError
from sd.checkpoints.safetensors import WRITTEN_DTYPES, read_safetensors, write_safetensors
from sd.checkpoints.torch_save import read_legacy, read_zip
from sd.files import whole_file

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")

FOREIGN_FILES = [  # first bytes, what the file is and what to do
    (b"version https://git-lfs", "a git-lfs pointer; run `git lfs pull` to fetch the file itself"),
    (b"\x89PNG", "a PNG image; give a .ckpt or .safetensors file"),
    (b"\xff\xd8\xff", "a JPEG image; give a .ckpt or .safetensors file"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\0\5\x16\7", "a hidden file of macOS; give the file of the same name without `._`"),
    (b"GGUF", "a GGUF file; give the model's .ckpt or .safetensors file"),
]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name. Raises what `read_checkpoint` raises."""
    return read_checkpoint(path).state


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Map a safetensors or torch file into memory, whatever its suffix.

    `state` holds the tensors under the top-level key `state_dict`, or under another name that trainers use, or those of
    the top level. `config` is the dict under the top-level key `sd_config` (in safetensors, the JSON text `sd_config`
    of `__metadata__`), as JSON gives it back: tuples become lists. It is None if there is none, or if JSON cannot
    express it. A trainer's own configuration is not read.

    Raises CheckpointError, in one sentence, for a damaged file or one that is not a checkpoint; FileNotFoundError; and
    PermissionError.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError("is a folder; give the path of a .ckpt or .safetensors file")
        if not stat.S_ISREG(mode):
            raise CheckpointError("is not a regular file; give the path of a .ckpt or .safetensors file")
        with open(path, "rb") as file:
            return _read(file)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}.") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no checkpoint at {path}.") from None
    except PermissionError:
        raise PermissionError(f"{path} may not be read by this user.") from None
    except OSError as error:  # the disk fails, or the system has no memory to map the file
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged file can make any step fail in any way
        reason = " ".join(str(error)[:200].split()) or type(error).__name__
        raise CheckpointError(f"{path} is damaged, or not a checkpoint: {reason}.") from error


def _read(file: BinaryIO) -> Checkpoint:
    if not os.fstat(file.fileno()).st_size:
        raise CheckpointError("is empty; download it again")
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    head = data[:512]
    if head[8:9] == b"{" and head[5:8] == bytes(3):  # first, as the length before the brace can look like any format
        checkpoint = read_safetensors(data)
    elif head.startswith(b"PK"):
        checkpoint = read_zip(file, data)
    elif head.startswith(b"\x80"):
        checkpoint = read_legacy(data)
    else:
        raise CheckpointError(f"is {_describe(head)}")
    return replace(checkpoint, mappings=(data,))


def _describe(head: bytes) -> str:
    """What kind of file this is, if not a checkpoint, from its first bytes."""
    for signature, description in FOREIGN_FILES:
        if head.startswith(signature):
            return description
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    text = _text(head).lower()
    if text.startswith(("<!doctype", "<html", "<head")):
        return "a web page (HTML), perhaps a server's error message; download the file itself"
    if text:
        return f"a {'JSON' if text[0] in '{[' else 'text'} file; give a .ckpt or .safetensors file"
    if head[8:9] == b"{":
        return f"damaged: its safetensors header is too long, {int.from_bytes(head[:8], 'little'):,} bytes"
    return "not a checkpoint: neither safetensors nor written by torch.save"


def _text(head: bytes) -> str:
    """The beginning of a text file without leading spaces, or nothing if these bytes are not text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return ""
    return text.lstrip() if all(character.isprintable() or character.isspace() for character in text) else ""


def write_checkpoint(path: str | os.PathLike, state: dict[str, Tensor], config: dict | None = None) -> None:
    """Write tensors by name, and a config that JSON can express, as `.safetensors` or torch's `.ckpt`, `.pt`, `.pth`.

    The write is atomic: an existing file stays until the new one is safely on disk. Raises CheckpointError for another
    suffix, or for a state or config that cannot be written; OSError for a full disk or a folder that is missing or not
    writable.
    """
    path = Path(path)
    if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(f"The name of {path} should end in .safetensors, {', '.join(TORCH_SUFFIXES)}.")
    _check_state(state)
    text = _config_text(config)
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    try:
        with whole_file(path, overwrite=True) as file:
            if path.suffix == ".safetensors":
                write_safetensors(file, tensors, {"format": "pt"} | ({} if config is None else {CONFIG_NAME: text}))
            else:
                torch.save({"state_dict": tensors, CONFIG_NAME: json.loads(text)}, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or "is there space left on the disk?"
        raise OSError(f"{path} cannot be written ({reason}); an existing file is kept.") from error


def _check_state(state: dict[str, Tensor]) -> None:
    if not state:
        raise CheckpointError("There are no tensors to write.")
    for name, tensor in state.items():
        if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, Tensor):
            raise CheckpointError(f"A state dict maps names to tensors, not {name!r:.80} to {type(tensor).__name__}.")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in WRITTEN_DTYPES.values():
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise CheckpointError(f"Tensor {name!r:.80} ({kind}) cannot be written; only dense, real numbers can.")


def _config_text(config: dict | None) -> str:
    try:
        text = json.dumps(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The config should hold only what JSON can express: {error}.") from None
    if not isinstance(config, dict | None) or len(text) > MAX_CONFIG_CHARACTERS:
        raise CheckpointError(f"The config should be a dict of at most {MAX_CONFIG_CHARACTERS:,} characters of JSON.")
    return text
