"""The files of a folder in the layout of diffusers: which ones hold weights, and what the JSON files say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.shards import INDEX

MAX_JSON_BYTES = 8 << 20  # tokenizer.json, the longest, has 2 MB
VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".ema", ".non_ema")
# How the names of weights begin and end, as diffusers (U-Net, VAE) and transformers (text encoder) write them.
DIFFUSERS_NAMES = (("diffusion_pytorch_model", ".safetensors"), ("diffusion_pytorch_model", ".bin"))
TRANSFORMERS_NAMES = (("model", ".safetensors"), ("pytorch_model", ".bin"), ("model", ".bin"))


def find_weights(folder: Path, network: str) -> Path:
    """The file with a network's weights, or the index of several, by the names that diffusers looks for.

    They come in its order: no variant before float16, safetensors before .bin. Other files count for nothing, such as
    an optimizer, a LoRA or another library's weights. Raises CheckpointError if there is none.
    """
    for name in weight_names(network):
        if (folder / name).is_file():
            return folder / name
    stem, suffix = _names(network)[0]
    raise CheckpointError(f"{folder} has no weights: it should hold {stem}{suffix} or {stem}{suffix}{INDEX}, or .bin.")


def weight_names(network: str, variants: Iterable[str] = VARIANTS) -> Iterator[str]:
    """The names that a network's file of weights, or the index of several, can have: the best first."""
    for variant in variants:
        for stem, suffix in _names(network):
            names = [f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}"]
            yield from reversed(names) if network == "text_encoder" else names  # transformers looks for one file first


def _names(network: str) -> tuple[tuple[str, str], ...]:
    return TRANSFORMERS_NAMES if network == "text_encoder" else DIFFUSERS_NAMES


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if it is damaged, FileNotFoundError if it is missing."""
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it should hold a JSON object; download it again.")
    return values


def class_name(folder: Path, file: str = "config.json") -> str | None:
    """The class of diffusers or transformers whose folder this is, or None if its configuration does not name it."""
    values = _read_if_there(folder / file)
    names = values.get("architectures") or [values.get("_class_name")]
    return names[0] if isinstance(names, list) and isinstance(names[0], str) else None


def read_added_words(folder: Path, first: int) -> dict[str, int]:
    """The words that textual inversion (2208.01618) has added to a tokenizer: token ids `first` and above.

    They stand in up to four files of a tokenizer's folder, each in its own form. Raises CheckpointError for a damaged
    file.
    """
    words: dict[str, Any] = {}
    for name in ("vocab.json", "added_tokens.json"):  # {word: id}
        words |= _read_if_there(folder / name)
    added = _read_if_there(folder / "tokenizer.json").get("added_tokens")  # [{"id": id, "content": word}]
    entries = [(entry.get("content"), entry.get("id")) for entry in _dicts(added)]
    decoder = _read_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder")  # {id: {"content": word}}
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and token.isdecimal() and len(token) < 10:
            entries.append((entry.get("content"), int(token)))
    words |= {word: token for word, token in entries if isinstance(word, str)}
    return {word: token for word, token in words.items() if word.strip() and type(token) is int and token >= first}


def _read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _dicts(values: Any) -> list[dict]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
