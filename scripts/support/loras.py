"""The LoRAs of --lora and of <lora:name:0.8> in a prompt: their files, and how pictures and commands name them."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd.prompts.other_tools import LoraTag

Lora = tuple[Path, float, float]  # a file, its strengths in the U-Net and in the text encoder

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
STRENGTH = re.compile(r"(?s)(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.IGNORECASE)
MAX_LISTED = 5
CHUNK = 1 << 20


def given_loras(options: argparse.Namespace) -> list[Lora]:
    """The LoRAs of --lora: FILE, FILE:0.8, or FILE:0.8:0.6. Raises ValueError for a file that is missing."""
    return [_given(text) for text in options.lora or ()]


def _given(text: str) -> Lora:
    path, strengths = text, []
    while not Path(path).is_file():  # a file's own name may end in a colon and a number
        match = STRENGTH.fullmatch(path)
        if match is None or len(strengths) == 2:
            raise ValueError(f"--lora should be FILE, FILE:STRENGTH or FILE:UNET:TEXT: there is no file {path}.")
        path, strengths = match[1], [float(match[2]), *strengths]
    return Path(path), *(strengths * 2 if len(strengths) == 1 else strengths or [1.0, 1.0])


def flag_value(lora: Lora) -> str:
    """A LoRA as --lora takes it."""
    return f"{lora[0]}:{lora[1]}:{lora[2]}"


def folder() -> Path:
    """Where <lora:name> looks for files."""
    from sd.files import DATA

    return DATA / "loras"


def find(tags: Iterable[LoraTag], given: Sequence[Lora]) -> tuple[tuple[Lora, ...], dict[str, str]]:
    """The LoRAs of a prompt, those of --lora first, and a sentence for each tag without a file.

    A tag with the name of a file that --lora gives stands for that one, with the strengths of --lora.
    """
    files = _files(folder())
    names = {path.stem for path, _, _ in given}
    found, notes = [], {}
    for tag in tags:
        if tag.name in names:
            continue
        if tag.name in files:
            found.append((files[tag.name], tag.unet, tag.te))
        else:
            known = ", ".join(sorted(files)[:MAX_LISTED]) + (", ..." if len(files) > MAX_LISTED else "")
            where = f"which has {known}" if files else "which has none"
            notes[tag.text] = f"{tag.text} is left out: there is no {tag.name!r} in {folder()}, {where}."
    return (*given, *found), notes


def _files(folder: Path) -> dict[str, Path]:
    """The LoRA files in a folder and the folders in it, by their names without suffix."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return {path.stem: path for path in reversed(paths)}


def with_tags(prompt: str, loras: Iterable[Lora]) -> str:
    """A prompt as the web UI writes it into a picture, with <lora:name:0.8> for each LoRA."""
    from sd.prompts.other_tools import lora_tag

    tags = [lora_tag(path.stem, unet, text) for path, unet, text in loras]
    return " ".join([prompt, *tags] if prompt else tags)


def hashes(loras: Iterable[Lora]) -> str:
    """What the web UI writes as "Lora hashes": "name: 0123456789ab, ..."."""
    return ", ".join(f"{_plain(path)}: {_hash(path)}" for path in dict.fromkeys(path for path, _, _ in loras))


def hash_notes(loras: Iterable[Lora], saved: str, source: Path) -> list[str]:
    """A sentence for each LoRA whose file is not the one that the picture of --from was made with."""
    pairs = (pair.partition(":") for pair in saved.split(","))
    known = {name.strip(): digest.strip()[:12] for name, _, digest in pairs}
    return [
        f"{path} is not the LoRA of that name that {source} was made with: its tensors differ."
        for path in dict.fromkeys(path for path, _, _ in loras)
        if known.get(_plain(path), _hash(path)) != _hash(path)
    ]


def _plain(path: Path) -> str:
    return path.stem.replace(":", "").replace(",", "")


@cache
def _hash(path: Path) -> str:
    """The first 12 digits of a file's SHA-256, for safetensors of the bytes behind the header, as in the web UI."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if path.suffix.lower() == ".safetensors":
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:12]
