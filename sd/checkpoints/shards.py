"""Weights that are split over several files -> one `Checkpoint`.

An index in JSON names the file of each tensor, as `save_pretrained` of diffusers and transformers writes it:

    {"weight_map": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00002.safetensors", ...}}
"""

from __future__ import annotations

import json
from pathlib import Path

from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.files import read_checkpoint

INDEX = ".index.json"
MAX_JSON_BYTES = 8 << 20
MAX_SHARDS = 100


def read_shards(index: Path) -> Checkpoint:
    """The tensors of all files that an index names. They lie beside it.

    Raises CheckpointError for a damaged index, or a file that is missing or lies elsewhere; and whatever
    `read_checkpoint` raises.
    """
    try:
        with open(index, "rb") as file:
            names = sorted(set(json.loads(file.read(MAX_JSON_BYTES))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(
            f"{index} is damaged: it should name the file of each tensor; download it again."
        ) from None
    if not 0 < len(names) <= MAX_SHARDS:
        raise CheckpointError(f"{index} names {len(names)} files; the limit of this reader is 1 to {MAX_SHARDS}.")
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index} should name files in its own folder, not {outside[0]!r:.80}.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index.parent / missing[0]} is missing, but {index.name} names it; download it again.")
    files = [read_checkpoint(index.parent / name) for name in names]
    state, unreadable = {}, {}
    for file in files:
        state |= file.state
        unreadable |= file.unreadable
    mappings = sum((file.mappings for file in files), ())
    return Checkpoint(state, files[0].config, mappings, files[0].metadata, unreadable)
