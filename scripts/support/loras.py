"""The LoRAs of --lora and of <lora:name:0.8> in a prompt: their files, and how pictures and commands name them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd.prompts.other_tools import LoraTag

Lora = tuple[Path, float, float]  # a file, its strengths in the U-Net and in the text encoder
GivenLora = tuple[Path, float | None, float | None]  # of --lora: None without a strength

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
STRENGTH = r":([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
STRENGTHS = re.compile(f"(?:{STRENGTH})?{STRENGTH}", re.IGNORECASE)
FORMS = "FILE, FILE:STRENGTH or FILE:UNET:TEXT"
ALIAS = "ss_output_name"  # the name that the trainer was given for the LoRA, in the file's metadata
MAX_HEADER = 10_000_000  # bytes
MAX_LISTED = 5
CHUNK = 1 << 20
TINY_LORAS = ("tiny-lcm", "tiny-windmill")  # in data/


def given_loras(options: argparse.Namespace) -> list[GivenLora]:
    """The LoRAs of --lora: FILE, FILE:0.8, or FILE:0.8:0.6. Raises ValueError for a file that is missing, and for
    anything but numbers behind it."""
    return [_given(text) for text in options.lora or ()]


def _given(text: str) -> GivenLora:
    parts = text.split(":")
    heads = [":".join(parts[:count]) for count in range(len(parts), 0, -1)]  # a file's own name may have colons
    path = next((head for head in heads if Path(head).is_file()), None)
    if path is None:
        missing = re.sub(f"{STRENGTHS.pattern}$", "", text, flags=re.IGNORECASE)
        kind = "is a folder: give the file in it" if missing and Path(missing).is_dir() else "is not a file here"
        raise ValueError(f"--lora should be {FORMS}: '{missing}' {kind}.")
    match = STRENGTHS.fullmatch(text, len(path))
    if match is None and path != text:
        raise ValueError(f"--lora should be {FORMS}, with numbers such as 0.8, not {text!r}.")
    unet, te = (match[1] or match[2], match[2]) if match else (None, None)
    return Path(path), unet and float(unet), te and float(te)


def flag_value(lora: Lora) -> str:
    """A LoRA as --lora takes it."""
    return f"{lora[0]}:{lora[1]}:{lora[2]}"


def folder() -> Path:
    """Where <lora:name> looks for files."""
    from sd.files import DATA

    return DATA / "loras"


def find(tags: Iterable[LoraTag], given: Sequence[GivenLora]) -> tuple[tuple[Lora, ...], dict[str, str]]:
    """The LoRAs of a prompt, those of --lora first, and a sentence for each tag without a file.

    A tag that names a file of --lora stands for that one. The strengths are those of --lora, or else the tag's.
    """
    own = _files(folder())
    files = [*own, *shipped()]
    found, notes, strengths = [], {}, {}
    for tag in tags:
        if path := _named(tag.name, [path for path, _, _ in given]):
            strengths[path] = tag.unet, tag.te
        elif path := _named(tag.name, files):
            found.append((path, tag.unet, tag.te))
        else:
            names = sorted({path.stem for path in own})
            known = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
            where = f"which has {known or 'none'}; --lora gives a file elsewhere"
            notes[tag.text] = f"{tag.text:.80} is left out: there is no {tag.name!r:.80} in {folder()}, {where}."
    ours = [(path, *(strengths.get(path, (1.0, 1.0)) if unet is None else (unet, te))) for path, unet, te in given]
    return (*ours, *found), notes


def _files(folder: Path) -> list[Path]:
    """The LoRA files in a folder and the folders in it."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def shipped() -> list[Path]:
    """The tiny model's own LoRAs."""
    from sd.files import DATA

    return [path for name in TINY_LORAS if (path := DATA / f"{name}.safetensors").is_file()]


def _named(name: str, paths: Sequence[Path]) -> Path | None:
    """The file with this name, or with this end of its path, such as "people/ann". Its suffix may be missing. Without
    one, the only file with this name in its metadata, as in web UIs. Case matters where names differ only in case."""
    end = f"/{_plain_name(name)}"
    own = [path for path in paths if any(_path(each).endswith(end) for each in (path.with_suffix(""), path))]
    if own:
        return next((path for path in own if name in (path.stem, path.name)), own[0])
    aliased = [path for path in paths if _plain_name(_alias(path)) == end[1:]]
    return aliased[0] if len(aliased) == 1 else None


def _path(path: Path) -> str:
    return f"/{_plain_name(path.as_posix())}"


def _plain_name(name: str) -> str:
    """A name as it is compared: in lower case, and with the characters that `lora_tag` writes for others. Some file
    systems store "é" as two characters."""
    return re.sub("[<>:]", "_", unicodedata.normalize("NFC", name).casefold()).replace("\\", "/")


@cache
def _alias(path: Path) -> str:
    """The name in a file's metadata, or nothing. All epochs of a training have the same."""
    if path.suffix.lower() != SUFFIXES[0]:
        return ""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER)))
        return str(header["__metadata__"][ALIAS])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none, or damage, which the reader names
        return ""


def with_tags(prompt: str, loras: Iterable[Lora]) -> str:
    """A prompt as the web UI writes it into a picture, with <lora:name:0.8> for each LoRA."""
    from sd.prompts.other_tools import lora_tag

    tags = [lora_tag(path.stem, unet, text) for path, unet, text in loras]
    return " ".join([prompt, *tags] if prompt else tags)


def titles(prompts: Sequence[str], loras: Sequence[tuple[Lora, ...]]) -> list[str]:
    """What to call the pictures of each prompt: the prompt, with its LoRAs if not all prompts have the same."""
    alike = len(set(loras)) == 1
    return [prompt if alike else with_tags(prompt, used) for prompt, used in zip(prompts, loras)]


def hashes(loras: Iterable[Lora]) -> str:
    """What the web UI writes as "Lora hashes": "name: 0123456789ab, ..."."""
    return ", ".join(f"{_plain(path.stem)}: {_hash(path)}" for path in dict.fromkeys(path for path, _, _ in loras))


def hash_notes(loras: Iterable[Lora], saved: str, source: Path) -> list[str]:
    """A sentence for each LoRA whose file is not the one that the picture of --from was made with."""
    pairs = (pair.rpartition(":") for pair in saved.split(","))
    known = {name.strip(): digest.strip().lower()[:12] for name, _, digest in pairs}
    notes = []
    for path in dict.fromkeys(path for path, _, _ in loras):
        digest = known.get(_plain(path.stem)) or known.get(_plain(_alias(path)))  # web UIs write what the prompt says
        if digest and digest != _hash(path):
            notes.append(f"{path} is not the LoRA of that name that {source} was made with: its tensors differ.")
    return notes


def _plain(name: str) -> str:
    return name.replace(":", "").replace(",", "")


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
