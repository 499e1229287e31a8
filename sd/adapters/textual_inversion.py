"""Textual inversion: a new word, learned from a few pictures of one thing or style (2208.01618).

The text encoder looks up every token of a prompt in its table of embeddings. A new word S* is one more row (figure 2):

    "a photo of S*"  --tokenizer-->  320, 1125, 539, 49408  --table-->  v_320, v_1125, v_539, v*  --clip-->  context

Training keeps all networks as they are. It only searches for the row with which the U-Net predicts the noise in the
pictures best (eq. 2):

    v* = arg min_v  E |e - e_theta(z_t, t, c_theta(y))|^2         z_t: a noised picture,  y: "a photo of S*"

In: models, and files with v* as (width,) or (n, width). n vectors take the places of n tokens. Out: models whose table
has n more rows, and whose tokenizer has the word.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.adapters.other_files import what_it_is
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import read_checkpoint
from sd.models import Models
from sd.prompts.added_words import TokenizerWithWords
from sd.tokenizer import clean

SUFFIXES = (".safetensors", ".pt", ".bin")  # of embedding files
PICTURES = (".png", ".webp", ".jpg", ".jpeg", ".jxl", ".avif")
MAX_VECTORS = 75  # of a word: a chunk of a prompt has room for 75 tokens
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}
XL = {"clip_l", "clip_g"}  # the vectors for its two text encoders


@dataclass(frozen=True)
class Embedding:
    """What textual inversion has learned: n vectors, and the words that stand for them."""

    path: Path
    words: tuple[str, ...]  # as `clean` returns them
    vectors: Tensor  # float32 (n, width)


GivenEmbedding = str | os.PathLike | tuple[str | os.PathLike, str] | Embedding  # a path, (path, word), or what was read


def with_embeddings(models: Models, embeddings: Iterable[GivenEmbedding]) -> Models:
    """Models with the words of embedding files. These models stay as they are, and both share all other weights.

    `embeddings` are paths, or (path, word). Without a word, it is the name of the file without its suffix, as in web
    UIs, and also the name that the file gives its vectors, if that is in angle brackets, as diffusers writes them:
    "<my-cat>". Case does not matter.

    Raises ValueError for vectors that do not fit the models, and for a word that they have already; and what
    `read_embeddings` raises.
    """
    table = models.clip.token_embedding.weight  # (vocabulary, width)
    words, rows = dict(getattr(models.tokenizer, "added", {})), [table]
    for embedding in read_embeddings(embeddings):
        _check_fit(embedding, table)
        for word in embedding.words:
            if word in words:
                raise ValueError(f"{embedding.path} should get another word than {word!r}, which the models have.")
            first = sum(map(len, rows))
            words[word] = list(range(first, first + len(embedding.vectors)))
            rows.append(embedding.vectors.to(table))  # (n, width)
    return _with_table(models, torch.cat(rows), words)


def without_words(models: Models, words: Collection[str]) -> Models:
    """Models without some of their added words: the inverse of `with_embeddings`."""
    left = {word: ids for word, ids in models.tokenizer.added.items() if word not in words}
    gone = {row for word in words for row in models.tokenizer.added[word]} - {
        row for ids in left.values() for row in ids
    }
    table = models.clip.token_embedding.weight  # (vocabulary, width)
    kept = [row for row in range(len(table)) if row not in gone]
    place = {row: i for i, row in enumerate(kept)}
    return _with_table(models, table[kept], {word: [place[row] for row in ids] for word, ids in left.items()})


def _with_table(models: Models, table: Tensor, words: dict[str, list[int]]) -> Models:
    """Models with this table of embeddings, (vocabulary, width), and words that stand for its last rows."""
    # The copy has new modules around the same weights.
    weights = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in models.clip.parameters()}
    clip = copy.deepcopy(models.clip, weights)
    clip.token_embedding = nn.Embedding.from_pretrained(table)
    clip.config = replace(models.config.text, vocab_size=clip.token_embedding.num_embeddings)
    tokenizer = TokenizerWithWords(words, models.tokenizer.pad_token_id)
    return replace(models, clip=clip, tokenizer=tokenizer, config=replace(models.config, text=clip.config))


def read_embeddings(embeddings: Iterable[GivenEmbedding]) -> list[Embedding]:
    """Reads paths and (path, word). Raises TypeError for anything else, and what `read_embedding` raises."""
    if isinstance(embeddings, (str, os.PathLike)):
        raise TypeError(f"embeddings should be a list, as in embeddings=[{str(embeddings)!r:.80}], not one path.")
    if isinstance(embeddings, Mapping) or not isinstance(embeddings, Iterable):
        raise TypeError(f"embeddings should be a list of paths or (path, word), not {embeddings!r:.80}.")
    read = []
    for given in embeddings:
        path, *word = given if isinstance(given, (tuple, list)) else [given]
        if isinstance(path, (str, os.PathLike)) and (not word or [type(part) for part in word] == [str]):
            read.append(read_embedding(path, *word))
        elif isinstance(given, Embedding):
            read.append(given)
        else:
            raise TypeError(f"An embedding should be a path or (path, word), not {given!r:.80}.")
    return read


def read_embedding(path: str | os.PathLike, word: str | None = None) -> Embedding:
    """The vectors in a file of any layout that people share, and the words for them.

        {"string_to_param": {"*": (n, width)}, ...}   .pt: the web UI's; the paper's own code has a ParameterDict there
        {"<my-cat>": (n, width) or (width,)}          .bin, .safetensors: diffusers'
        {"emb_params": (n, width)}                    .safetensors: the web UI's, kohya's
        (n, width)                                    .pt: nothing but the tensor

    Raises CheckpointError, in one sentence, for another file, for vectors that are not finite, and for what
    `read_checkpoint` refuses; FileNotFoundError; ValueError for a word that no prompt can have.
    """
    path = Path(path)
    if path.suffix.lower() in PICTURES:
        raise CheckpointError(
            f"{path} should be a .safetensors, .pt or .bin file: pictures with embeddings are not read."
        )
    try:
        checkpoint = read_checkpoint(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no embedding file at {path}.") from None
    name, tensor = _only(path, checkpoint.state | checkpoint.unreadable)
    words = [word]
    if word is None:
        words = [path.stem, name] if name.startswith("<") and name.endswith(">") else [path.stem]
    return checked_embedding(path, words, tensor)


def checked_embedding(path: Path, words: Iterable[str], tensor: Tensor) -> Embedding:
    """The vectors (n, width) or (width,) of a file, and the words for them. Raises what `read_embedding` raises."""
    vectors = tensor[None] if tensor.ndim == 1 else tensor  # (n, width)
    if not vectors.is_floating_point() or vectors.ndim != 2 or not 1 <= len(vectors) <= MAX_VECTORS:
        found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"{path} should have 1 to {MAX_VECTORS} vectors, floats of shape (n, width), not {found}."
        )
    vectors = vectors.to(torch.float32, copy=True)
    if not vectors.isfinite().all():
        raise CheckpointError(f"{path} should have finite vectors, not NaN or infinity; download it again.")
    return Embedding(path, tuple(dict.fromkeys(_clean_word(path, word) for word in words)), vectors)


def _only(path: Path, tensors: dict[str, Tensor | str]) -> tuple[str, Tensor]:
    """The one tensor of a file, and its name."""
    if tensors.keys() >= XL:
        raise CheckpointError(f"{path} is an embedding for Stable Diffusion XL; give one for 1.x or 2.x.")
    [name, tensor], *others = tensors.items()
    if others and (what := what_it_is(tensors)) and "embedding" not in what:
        raise CheckpointError(f"{path} should be an embedding, but it {what}.")
    if others or not isinstance(tensor, Tensor):
        found = f"{len(tensors)}, such as {name!r:.80}" if others else tensor
        raise CheckpointError(f"{path} should have one tensor, the vectors of one word, not {found}.")
    return name, tensor


def _clean_word(path: Path, word: str) -> str:
    try:
        if cleaned := clean(word):
            return cleaned
    except ValueError:
        pass
    raise ValueError(f"{path} should get a word that a prompt can have, not {word!a:.80}.")


def _check_fit(embedding: Embedding, table: Tensor) -> None:
    """Raises ValueError unless the vectors are as wide as the rows of the table, (vocabulary, width), and its dtype can
    hold them."""
    (_, width), (_, theirs), dtype = table.shape, embedding.vectors.shape, table.dtype
    if width != theirs:
        ours, family = (f" ({FAMILIES[size]})" if size in FAMILIES else "" for size in (width, theirs))
        raise ValueError(
            f"{embedding.path} should have vectors of {width} numbers{ours} for these models, not {theirs}{family}."
        )
    if embedding.vectors.abs().max() > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{embedding.path} has numbers that {kind} cannot hold: load the models in another dtype.")
