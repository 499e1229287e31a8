"""The LoRAs, ControlNets and embeddings in data/, by the names that requests may use. Nothing else is ever opened."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.support import embeddings, loras

CONTROL_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
CONTROL_MARKS = ("zero_convs.", "controlnet_", "control_model.", "input_hint_block.")  # in the keys of a ControlNet
MAX_HEADER = 10_000_000  # bytes


def lora_files(checkpoint: Path | None = None) -> dict[str, Path]:
    """The LoRAs by name for a checkpoint: those in data/loras/, and for the tiny model, None, also its own."""
    shipped = {path.stem: path for path in loras.shipped() if checkpoint is None}
    return shipped | _inside(loras.folder(), loras.SUFFIXES)


def control_files(checkpoint: Path | None = None) -> dict[str, Path]:
    """The ControlNets by name: those in data/controls/, and for the tiny model, None, also its own."""
    paths = sorted(loras.folder().parent.glob("tiny-*.safetensors"))
    shipped = {path.stem: path for path in paths if checkpoint is None and _is_control(path)}
    return shipped | _inside(loras.folder().parent / "controls", CONTROL_SUFFIXES)


def embedding_files() -> dict[str, Path]:
    """The embeddings in data/embeddings/ by the words that stand for them."""
    return embeddings.files_in(embeddings.folder())


def choose(kind: str, name: str, files: dict[str, Path]) -> Path:
    """The file with this name. Raises ValueError if there is none: a name is looked up, and never becomes a path."""
    if name not in files:
        known = ", ".join(list(files)[:10]) or "none"
        raise ValueError(f"{kind} should be one of those in data/ ({known}), not {name!r:.100}.")
    return files[name]


def _inside(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files in a folder and the folders in it, by their paths there without the suffix."""
    paths = sorted(folder.rglob("*")) if folder.is_dir() else []
    paths = [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _is_control(path: Path) -> bool:
    """Whether a safetensors file has the keys of a ControlNet."""
    try:
        with open(path, "rb") as file:
            keys = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER)))
    except (OSError, ValueError, RecursionError):
        return False
    return any(mark in key for key in keys for mark in CONTROL_MARKS)
