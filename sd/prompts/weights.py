r"""Prompts with weights, and prompts of any length: text -> ids and weights, chunk by chunk.

In: prompts in the notation of the widely used AUTOMATIC1111 web UI. Out: ids and weights of N chunks, both (N, 77), for
the text encoder to read and for `weigh` to apply to what it makes of them; `join_chunks` makes one context of each
prompt's chunks again.

    (word) counts 1.1 times    ((word)) 1.1 * 1.1 times    (word:1.3) 1.3 times    [word] 1 / 1.1 times
    \( \) \[ \] \\ \:  are the characters themselves       BREAK starts a new chunk

A chunk is what the text encoder reads at once: a start token, up to 75 tokens of the prompt, an end token and padding.
It was trained on one; that several, encoded apart and set side by side, work too is experience, not theory.

The contexts of a batch must be equally long. A shorter one is repeated, which changes nothing: attention is a mean of
values, weighted by exp(q k), and that stays the same where every key and value is there r times. ComfyUI does so too.
The web UI, where it makes lengths equal, appends chunks of the empty prompt, and these get a share of the attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain, groupby
from operator import itemgetter

import torch
from torch import Tensor

from sd.tokenizer import MAX_CHARACTERS, Tokenizer

FACTORS = {"()": 1.1, "[]": 1 / 1.1}  # of brackets without a number
MAX_WEIGHT = 1e30  # beyond it, products with the context would not be finite in float32
BACKTRACK = 20  # so many tokens after a comma may move to the next chunk, to stay with the rest of their phrase
QUOTED = 40  # characters of a prompt that an error quotes
MAX_CHUNKS = 100  # of a prompt: far beyond any use, and still quick to attend to
MAX_REPEATED = 60  # chunks of a context that is repeated: lcm(1, ..., 6), so prompts of up to six chunks go together

BREAK = re.compile(r"\bBREAK\b")
MARK = re.compile(r"""(?xs)                                    # every character of a prompt belongs to one mark
      \\ (?P<literal> .? )                                     # what follows a backslash stands for itself
    | (?P<open> [(\[] )
    | (?: : \s* (?P<weight> [+-]? [.\d]+ ) \s* )? (?P<close> [)\]] )  # a closing bracket, perhaps with a weight
    | (?P<text> : | [^\\()\[\]:]+ )
""")

Piece = tuple[str, float]  # a text and its weight
Token = tuple[int, float]  # an id and its weight


def parse(text: str, name: str = "prompt") -> list[list[Piece]]:
    r"""A prompt as texts and their weights, one list for each part between two BREAKs.

        "a (red:1.5) [cat\]] BREAK a dog"  ->  [[("a ", 1.0), ("red", 1.5), (" ", 1.0), ("cat]", 1 / 1.1)],
                                                [("a dog", 1.0)]]

    Nested brackets multiply, and a colon before anything but a number is text. Raises ValueError, which calls the
    prompt `name` and quotes the place, for brackets that are not in pairs, for a number that is none, like 1.2.3, and
    for a weight in square brackets, by which the web UI means something else, and for more than 30,000 characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} should be at most {MAX_CHARACTERS} characters long, not {len(text)}.")
    marks = list(MARK.finditer(text))
    factors = _factors(marks, name)
    parts: list[list[Piece]] = [[]]
    weights = [1.0]  # the last one counts here
    for mark in marks:
        if mark["open"]:
            weights.append(weights[-1] * factors[mark.start()])
            if abs(weights[-1]) > MAX_WEIGHT:
                raise _bad_weight(name, text[mark.start() :][:QUOTED])
        elif mark["close"]:
            weights.pop()
        else:
            texts = _at_breaks(mark["text"]) if mark["text"] else [mark["literal"]]
            parts[-1].append((texts[0], weights[-1]))
            parts += [[(part, weights[-1])] for part in texts[1:]]
    return [_merge(part) for part in parts]


def _at_breaks(text: str) -> list[str]:
    """A text, cut at every BREAK, without the blanks around it."""
    texts = BREAK.split(text)
    texts[1:] = [text.lstrip() for text in texts[1:]]
    texts[:-1] = [text.rstrip() for text in texts[:-1]]
    return texts


def _factors(marks: list[re.Match], name: str) -> dict[int, float]:
    """The factor of each pair of brackets, under the place of the opening one. Raises ValueError as `parse` does."""
    factors, opened = {}, []
    for mark in marks:
        if mark["open"]:
            opened.append(mark)
        elif mark["close"]:
            if not opened:
                raise _unpaired(name, mark["close"], "opens", mark.string[: mark.end()][-QUOTED:])
            start = opened[-1].start()
            pair = opened[-1]["open"] + mark["close"]
            if pair not in FACTORS:
                break  # another kind of bracket is open still
            opened.pop()
            factors[start] = FACTORS[pair] if mark["weight"] is None else _number(mark["weight"])
            if not abs(factors[start]) <= MAX_WEIGHT or (pair == "[]" and mark["weight"] is not None):
                raise _bad_weight(name, mark.string[start : mark.end()][-QUOTED:])
    if opened:
        raise _unpaired(name, opened[-1]["open"], "closes", mark.string[opened[-1].start() :][:QUOTED])
    return factors


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _unpaired(name: str, bracket: str, what: str, quote: str) -> ValueError:
    return ValueError(
        f"{name} should have its brackets in pairs: nothing {what} the {bracket!r} of {quote!r}; "
        rf"write \{bracket} for the character itself."
    )


def _bad_weight(name: str, quote: str) -> ValueError:
    return ValueError(
        f"{name} should give a weight as a finite number in round brackets, like (word:1.3), not as in {quote!r}; "
        r"write \: for the character itself."
    )


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of equal weight as one: the tokenizer should see whole words."""
    runs = groupby((piece for piece in pieces if piece[0]), key=itemgetter(1))
    return [("".join(text for text, _ in run), weight) for weight, run in runs]


def split(tokens: Sequence[Token], room: int, commas: set[int]) -> list[Sequence[Token]]:
    """Tokens -> chunks of at most `room`, one at least.

    If one of the last 20 tokens of a full chunk is a comma, the chunk ends there, unless a comma follows anyway.
    """
    chunks, start = [], 0
    while len(tokens) - start > room:
        end = start + room
        if tokens[end][0] not in commas:
            late = range(max(end - BACKTRACK, start), end)
            end = max((i + 1 for i in late if tokens[i][0] in commas), default=end)
        chunks.append(tokens[start:end])
        start = end
    return [*chunks, tokens[start:]]


def chunks_of(text: str, tokenizer: Tokenizer) -> list[Sequence[Token]]:
    """A prompt -> its chunks, one at least, each of at most 75 tokens.

    Raises ValueError for more than 100 chunks, and as `parse` and the tokenizer do.
    """
    room, commas = tokenizer.context_length - 2, set(tokenizer.encode(","))
    if room < 1:
        raise ValueError(f"The tokenizer's context_length should be at least 3, not {tokenizer.context_length}.")
    chunks: list[Sequence[Token]] = []
    for part in parse(text):
        tokens = [(token, weight) for piece, weight in part for token in tokenizer.encode(piece)]
        chunks += split(tokens, room, commas)
    if len(chunks) > MAX_CHUNKS:
        raise ValueError(f"prompt should be at most {MAX_CHUNKS} chunks of {room} tokens long, not {len(chunks)}.")
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]  # nothing follows the last BREAK


def layout(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor, list[int]]:
    """B prompts -> the ids (LongTensor) and weights (float32) of all their N chunks, both (N, 77), the first prompt's
    first, and how many chunks each prompt has, B numbers for `join_chunks`.

    Raises as `chunks_of` does, and ValueError for prompts that cannot be drawn together: the least common multiple of
    their numbers of chunks would be above both 60 and the largest of them.
    """
    length, start, end = tokenizer.context_length, (tokenizer.start_token_id, 1.0), (tokenizer.end_token_id, 1.0)
    prompts = [chunks_of(text, tokenizer) for text in texts]
    counts = [len(chunks) for chunks in prompts]
    _check_counts(counts)
    tokens = []
    for chunk in chain(*prompts):
        padding = [(tokenizer.pad_token_id, 1.0)] * (length - 2 - len(chunk))
        tokens += [start, *chunk, end, *padding]  # 77
    shape = (sum(counts), length)
    ids = torch.tensor([token for token, _ in tokens], dtype=torch.long).view(shape)
    weights = torch.tensor([weight for _, weight in tokens], dtype=torch.float32).view(shape)
    return ids, weights, counts


def _check_counts(counts: list[int]) -> None:
    """Raises ValueError if a common length of contexts of so many chunks would take too much attention."""
    most, together = max(MAX_REPEATED, *counts, 0), math.lcm(*counts)
    if together > most:
        numbers = ", ".join(map(str, sorted(set(counts))))
        raise ValueError(
            "Prompts and negative prompts that are drawn together should have numbers of chunks whose least common "
            f"multiple is at most {most}, not {together} like that of {numbers}: draw those prompts one at a time, or "
            "shorten one."
        )


def join_chunks(context: Tensor, counts: Sequence[int]) -> Tensor:
    """The context of N chunks, (N, 77, D), and how many of them each of B prompts has -> that of the prompts,
    (B, 77 k, D), where k is the least common multiple of the counts.

    A prompt of c chunks has its own, side by side, k / c times over: to the U-Net that is the same as once.
    """
    k = math.lcm(*counts)
    prompts = context.split(list(counts))  # each (c, 77, D)
    return torch.stack([chunks.flatten(0, 1).repeat(k // len(chunks), 1) for chunks in prompts])


def weigh(context: Tensor, weights: Tensor) -> Tensor:
    """The context of N chunks, (N, 77, D), with its vectors multiplied by their weights, (N, 77).

    Each chunk z is then scaled so that its mean stays the same: s w z with s = mean(z) / mean(w z), as the web UI does.
    A chunk whose weights are all 1 is returned as it is, to the bit.

    If all tokens had equal means, s would be 1 / mean(w). Where it is not within a factor of two of 1 / mean(|w|), the
    means of the tokens cancel out, so that s could be anything, and 1 / mean(|w|) takes its place.
    """
    weights = weights.to(context.device)[..., None]  # (N, 77, 1)
    z = context.float()
    scale = z.mean((1, 2), keepdim=True) / (z * weights).mean((1, 2), keepdim=True)  # (N, 1, 1)
    size = weights.abs().mean((1, 2), keepdim=True)
    sane = (scale * size > 0.5) & (scale * size < 2)
    factors = weights * torch.where(sane, scale, 1 / size)  # (N, 77, 1)
    unweighted = (weights == 1).all(dim=1, keepdim=True)  # (N, 1, 1)
    return torch.where(unweighted, context, (z * factors).to(context.dtype))
