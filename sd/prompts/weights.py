r"""Long prompts and prompts with weights: text -> ids and weights, in chunks of 77 tokens.

In: B prompts in the notation of the AUTOMATIC1111 web UI. Out: ids and weights of their N chunks, both (N, 77).
After the text encoder, `weigh` applies the weights and `join_chunks` makes one context for each prompt.

    (word) counts 1.1 times    ((word)) 1.1 * 1.1 times    (word:1.3) 1.3 times    [word] 1 / 1.1 times
    \( \) \[ \] \\ \:  are the characters themselves       BREAK starts a new chunk

The text encoder reads one chunk at a time: a start token, up to 75 tokens of the prompt, an end token and padding. It
was trained on single chunks. Putting several encoded chunks side by side works in practice, not by design.

All contexts in a batch must have the same length, so shorter ones are repeated. This does not change the image:
attention is a mean of values, weighted by exp(q k), and the mean is the same if every key and value occurs r times.
ComfyUI does so too. The web UI appends chunks of the empty prompt instead, and these take a share of the attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from itertools import chain, groupby
from operator import itemgetter

import torch
from torch import Tensor

from sd.tokenizer import MAX_CHARACTERS, Tokenizer

FACTORS = {"()": 1.1, "[]": 1 / 1.1}  # brackets without a number
MAX_WEIGHT = 1e30  # products of larger weights and the context may not be finite in float32
BACKTRACK = 20  # up to 20 tokens after a comma move to the next chunk, to stay with the rest of their phrase
QUOTED = 40  # characters of a prompt that an error quotes
MAX_CHUNKS = 100  # in a prompt: far beyond any use, and attention is still quick
MAX_REPEATED = 60  # chunks in a repeated context: lcm(1, ..., 6), so any prompts of up to six chunks can share a batch

BREAK = re.compile(r"\bBREAK\b")
LORA = re.compile(r"<(?:lora|lyco|lycoris):([^<>]*)>\s*", re.IGNORECASE)  # `other_tools.take_loras` takes them out
MARK = re.compile(r"""(?xs)                                    # each character belongs to one mark
      \\ (?P<literal> .? )                                     # after a backslash: the character itself
    | (?P<open> [(\[] )
    | (?: : \s* (?P<weight> [+-]? [.\d]+ ) \s* )? (?P<close> [)\]] )  # a closing bracket, perhaps with a weight
    | (?P<text> : | [^\\()\[\]:]+ )
""")

Piece = tuple[str, float]  # a text and its weight
Token = tuple[int, float]  # an id and its weight


def parse(text: str, name: str = "prompt") -> list[list[Piece]]:
    r"""A prompt -> its texts with their weights, one list for each part between BREAKs.

        "a (red:1.5) [cat\]] BREAK a dog"  ->  [[("a ", 1.0), ("red", 1.5), (" ", 1.0), ("cat]", 1 / 1.1)],
                                                [("a dog", 1.0)]]

    The weights of nested brackets multiply. A colon is text unless a number and a closing bracket follow.

    Raises ValueError for a prompt of more than 10,000 characters, unbalanced brackets, a malformed number like 1.2.3,
    and what has another meaning in the web UI: <lora:name:0.8>, and a number or a bar in square brackets. The error
    quotes the place and names the prompt `name`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} should be at most {MAX_CHARACTERS} characters long, not {len(text)}.")
    if tag := LORA.search(text):
        raise ValueError(
            f"{name} should be without {tag[0].strip()!r:.80}: LoRAs are loaded with the model, as in "
            'load_models(loras=[("style.safetensors", 0.8)]).'
        )
    marks = list(MARK.finditer(text))
    factors = _factors(marks, name)
    parts: list[list[Piece]] = [[]]
    weights = [1.0]  # of the open brackets; the last one applies
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
    """A text, cut at every BREAK. The blanks around BREAK are dropped."""
    texts = BREAK.split(text)
    texts[1:] = [text.lstrip() for text in texts[1:]]
    texts[:-1] = [text.rstrip() for text in texts[:-1]]
    return texts


def _factors(marks: list[re.Match], name: str) -> dict[int, float]:
    """The position of each opening bracket -> the factor of its pair. Raises ValueError as `parse` does."""
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
                break  # the innermost open bracket is of the other kind
            opened.pop()
            factors[start] = FACTORS[pair] if mark["weight"] is None else _number(mark["weight"])
            if not abs(factors[start]) <= MAX_WEIGHT or (pair == "[]" and mark["weight"] is not None):
                raise _bad_weight(name, mark.string[start : mark.end()][-QUOTED:])
        elif opened and opened[-1]["open"] == "[" and "|" in (mark["text"] or ""):
            raise ValueError(
                f"{name} should be without alternation, as in {mark.string[opened[-1].start() :][:QUOTED]!r}: prompts "
                r"do not change between steps; write \| for the character itself."
            )
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
    """Join neighbours of equal weight, so that the tokenizer gets whole words."""
    runs = groupby((piece for piece in pieces if piece[0]), key=itemgetter(1))
    return [("".join(text for text, _ in run), weight) for weight, run in runs]


def split(
    tokens: Sequence[Token], room: int, commas: set[int], continued: Collection[int] = ()
) -> list[Sequence[Token]]:
    """Tokens -> one or more chunks of at most `room` tokens.

    If there is a comma in the last 20 tokens of a full chunk, the chunk ends there, unless the next token is a comma.
    An added word of several tokens, all but the first of which are in `continued`, moves to the next chunk as a whole.
    """
    chunks, start = [], 0
    while len(tokens) - start > room:
        end = start + room
        if tokens[end][0] in continued:
            end = next((i for i in range(end, start, -1) if tokens[i][0] not in continued), end)
        elif tokens[end][0] not in commas:
            late = range(max(end - BACKTRACK, start), end)
            end = max((i + 1 for i in late if tokens[i][0] in commas), default=end)
        chunks.append(tokens[start:end])
        start = end
    return [*chunks, tokens[start:]]


def chunks_of(text: str, tokenizer: Tokenizer) -> list[Sequence[Token]]:
    """A prompt -> one or more chunks of at most 75 tokens.

    Raises ValueError for more than 100 chunks, and as `parse` and the tokenizer do.
    """
    room, commas = tokenizer.context_length - 2, set(tokenizer.encode(","))
    if room < 1:
        raise ValueError(f"The tokenizer's context_length should be at least 3, not {tokenizer.context_length}.")
    chunks: list[Sequence[Token]] = []
    for part in parse(text):
        tokens = [(token, weight) for piece, weight in part for token in tokenizer.encode(piece)]
        chunks += split(tokens, room, commas, getattr(tokenizer, "continued", ()))
    if len(chunks) > MAX_CHUNKS:
        raise ValueError(f"prompt should be at most {MAX_CHUNKS} chunks of {room} tokens long, not {len(chunks)}.")
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]  # nothing follows the last BREAK


def layout(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor, list[int]]:
    """B prompts -> ids (LongTensor) and weights (float32) of all their N chunks, both (N, 77), and B numbers of chunks.

    The chunks of the first prompt come first. `join_chunks` takes the numbers.

    Raises ValueError as `chunks_of` does, and for prompts that cannot share a batch: the least common multiple of their
    numbers of chunks would exceed both 60 and the largest of them.
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
    """Raise ValueError if the contexts would have to be repeated to more than 60 chunks."""
    most, together = max(MAX_REPEATED, *counts, 0), math.lcm(*counts)
    if together > most:
        numbers = ", ".join(map(str, sorted(set(counts))))
        raise ValueError(
            "The prompts and negative prompts of a batch should have numbers of chunks whose least common multiple is "
            f"at most {most}, not {together} (for {numbers} chunks): generate their images one at a time, or shorten "
            "one."
        )


def join_chunks(context: Tensor, counts: Sequence[int]) -> Tensor:
    """Join each prompt's chunks: contexts of N chunks, (N, 77, D) -> contexts of B prompts, (B, 77 k, D).

    `counts` are the B numbers of chunks, and k is their least common multiple. A prompt of c chunks is repeated k / c
    times, which is the same to the U-Net as once.
    """
    k = math.lcm(*counts)
    prompts = context.split(list(counts))  # each (c, 77, D)
    return torch.stack([chunks.flatten(0, 1).repeat(k // len(chunks), 1) for chunks in prompts])


def weigh(context: Tensor, weights: Tensor) -> Tensor:
    """Multiply each vector of the contexts of N chunks, (N, 77, D), by its weight, (N, 77).

    Each chunk z is then scaled back to its former mean, as in the web UI: s w z with s = mean(z) / mean(w z). A chunk
    whose weights are all 1 is returned unchanged, to the bit.

    If all tokens had equal means, s would be 1 / mean(|w|). It is held within a factor of two of that: where the means
    of the tokens cancel out, s would be arbitrary, even infinite.
    """
    weights = weights.to(context.device)[..., None]  # (N, 77, 1)
    z = context.float()
    size = weights.abs().mean((1, 2), keepdim=True)  # (N, 1, 1)
    # 1 / s is clamped, because it is always finite: so s changes gradually with the weights.
    ratio = (z * weights).mean((1, 2), keepdim=True) / (z.mean((1, 2), keepdim=True) * size)
    factors = weights / (size * ratio.nan_to_num(1).clamp(0.5, 2))  # (N, 77, 1)
    unweighted = (weights == 1).all(dim=1, keepdim=True)  # (N, 1, 1)
    return torch.where(unweighted, context, (z * factors).to(context.dtype))
