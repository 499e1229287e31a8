"""Embeddings of textual inversion in demo.py: --embedding FILE:word, and those in data/embeddings/ that prompts name.

`options.embedded` gets the words that can be used, each with its file and the beginning of the file's SHA-256. A
picture has those that its prompts name under "TI hashes", as the AUTOMATIC1111 web UI writes them.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd.adapters.textual_inversion import Embedding
    from sd.models import Models
    from sd.request import Request

HASH_DIGITS, SHORT_HASH = 12, 10  # as the web UI writes, and wrote before
MAX_SAVED = 100  # embeddings of a picture: far beyond any use
SAVED = "TI hashes"


def split_word(given: str) -> tuple[Path, str | None]:
    """FILE or FILE:word -> the file, and the word or None. The colon of C:\\cat.pt is part of the file's name."""
    parts = given.split(":")
    for count in range(len(parts), 0, -1):  # the file's own name may have colons, and so may the word
        if Path(file := ":".join(parts[:count])).is_file():
            return Path(file), ":".join(parts[count:]) if count < len(parts) else None
    file, colon, word = given.rpartition(":")
    if not colon or len(file) < 2 or re.search(r"[\\/]", word):
        return Path(given), None
    return Path(file), word


def check_embeddings(options: argparse.Namespace) -> None:
    """Raises ValueError if a file of --embedding is missing, or its word is empty."""
    for given in options.embedding or []:
        path, word = split_word(given)
        if not path.is_file():
            raise ValueError(f"--embedding should be a file, or FILE:word: there is none at {path}.")
        if word is not None and not word.strip():
            raise ValueError(f"--embedding should have a word after the colon, or no colon, not {given!r}.")


def embeddings(options: argparse.Namespace) -> list[Embedding]:
    """The embeddings of --embedding, for `load_models`."""
    if not options.embedding:
        return []
    from sd.adapters.textual_inversion import read_embedding

    read = [read_embedding(*split_word(given)) for given in options.embedding]
    _remember(options, read)
    return read


def add_named(options: argparse.Namespace, request: Request, models: Models) -> tuple[Models, list[str]]:
    """Adds the embeddings in data/embeddings/ that the prompts name. Returns the models, and sentences for the user."""
    from sd.adapters.textual_inversion import read_embedding, with_embeddings
    from sd.prompts.added_words import words_in

    prompts = [*request.prompts, request.uncond_prompt or ""]
    lines = _without_effect(options, prompts)
    taken = getattr(models.tokenizer, "added", {})
    files = {word: path for word, path in files_in(folder()).items() if word not in taken}
    for word in sorted(words_in(prompts, files)):
        try:
            read = [read_embedding(files[word], word)]
            models = with_embeddings(models, read)
        except (ValueError, OSError) as error:
            lines.append(f"{word!r} is read as text: {error}")
        else:
            _remember(options, read)
            lines.append(f"{word!r} is the embedding in {files[word]}.")
    return models, lines + _differences(options, prompts)


def folder() -> Path:
    """data/embeddings/, which need not exist."""
    from sd.files import DATA  # imported late, because sd imports torch

    return DATA / "embeddings"


def _without_effect(options: argparse.Namespace, prompts: list[str]) -> list[str]:
    """A sentence for each file of --embedding that no prompt names."""
    from sd.prompts.added_words import words_in

    lines = []
    for path in dict.fromkeys(path for path, _ in options.embedded.values()):
        words = [word for word, (file, _) in options.embedded.items() if file == path]
        if not words_in(prompts, words):
            lines.append(f"{path} has no effect: no prompt has {' or '.join(map(repr, words))}.")
    return lines


def files_in(folder: Path) -> dict[str, Path]:
    """The embedding files in a folder and the folders in it, by their words; of equal names, the safetensors file."""
    from sd.adapters.textual_inversion import SUFFIXES
    from sd.tokenizer import clean

    found: dict[str, Path] = {}
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    for path in sorted(paths, key=lambda path: (SUFFIXES.index(path.suffix.lower()), path)):
        try:
            word = clean(path.stem)
        except ValueError:  # a name that is not Unicode: no prompt can have it
            continue
        if word and path.is_file():
            found.setdefault(word, path)
    return found


def _remember(options: argparse.Namespace, read: Iterable[Embedding]) -> None:
    for embedding in read:
        digest = hashlib.sha256(embedding.path.read_bytes()).hexdigest()[:HASH_DIGITS]
        options.embedded |= dict.fromkeys(embedding.words, (embedding.path, digest))


def saved_embeddings(options: argparse.Namespace, request: Request) -> dict[str, str]:
    """The embeddings that the prompts of an image name, as a setting: {"TI hashes": "cat: 0123456789ab, ..."}."""
    # A comma or a colon in a word would end it.
    pairs = [f"{re.sub('[,:]', '', word)}: {options.embedded[word][1]}" for word in _named(options, request)]
    return {SAVED: ", ".join(pairs)} if pairs else {}


def used_files(options: argparse.Namespace, request: Request) -> str:
    """The same for the report: "cat (data/embeddings/cat.pt), ..."."""
    return ", ".join(f"{word} ({options.embedded[word][0]})" for word in _named(options, request))


def _named(options: argparse.Namespace, request: Request) -> list[str]:
    if not options.embedded:
        return []
    from sd.prompts.added_words import words_in

    return sorted(words_in([*request.prompts, request.uncond_prompt or ""], options.embedded))


def take_embeddings(options: argparse.Namespace, pairs: dict[str, str]) -> None:
    """Takes the embeddings out of the settings that a picture has. `add_named` compares them with those in use."""
    parts = (part.rpartition(":") for part in pairs.pop(SAVED, "").split(",")[:MAX_SAVED])
    saved = {word.strip().lower(): digest.strip().lower() for word, _, digest in parts}
    options.saved_embeddings = {word: digest for word, digest in saved.items() if word}


def _differences(options: argparse.Namespace, prompts: list[str]) -> list[str]:
    """A sentence for each embedding of the picture of --from that is missing here, or is another one."""
    from sd.prompts.added_words import words_in

    lines = []
    ours = {re.sub("[,:]", "", word): digest for word, (_, digest) in options.embedded.items()}
    named = words_in(prompts, options.saved_embeddings)
    for word, digest in options.saved_embeddings.items():
        if word in ours and not ours[word].startswith(digest[:SHORT_HASH]):
            lines.append(f"{options.source} was made with another embedding for {word!r:.80}.")
        elif word not in ours and word in named:
            remedy = f"--embedding gives it, or a file of that name in {folder()}"
            lines.append(f"{options.source} was made with an embedding for {word!r:.80}: {remedy}.")
    return lines
