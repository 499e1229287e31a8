"""A prompt, and a `Tracer` that recorded the attention -> the prompt's tokens, and where the U-Net attended to each."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sd.inside.tracer import Tracer
from sd.models import Models
from sd.prompts.weights import chunks_of
from sd.tokenizer import SYMBOL_TO_BYTE, WORD_END, Tokenizer

MAX_TOKENS = 300


@dataclass(frozen=True)
class Token:
    """A token of the prompt, or one of two groups: all start tokens, and all tokens after the prompt."""

    text: str
    id: int | None  # None for the groups
    weight: float  # as in (word:1.3)
    joined: bool  # whether it continues the word of the token before
    share: float  # its share of all attention, in [0, 1]
    map: Tensor  # float32 (h, w), in [0, 1]: where it got the most (1) and the least (0)


def tokens_of(models: Models, prompt: str, trace: Tracer) -> list[Token]:
    """The group of start tokens, at most 300 tokens of the prompt, and the group of end and padding tokens."""
    length = models.tokenizer.context_length
    chunks = chunks_of(prompt, models.tokenizer)
    places = {c * length + 1 + i: token for c, chunk in enumerate(chunks) for i, token in enumerate(chunk)}
    own, total = len(chunks) * length, trace.tokens  # repeated if the negative prompt is longer
    starts = list(range(0, total, length))
    ends = [i for i in range(total) if i % own not in places and i not in starts]
    tokens = [Token("start", None, 1, False, *_attention_to(models, trace, starts))]
    joined = False
    for place, (token, weight) in list(places.items())[:MAX_TOKENS]:
        text, ends_word = token_text(models.tokenizer, token)
        tokens.append(Token(text, token, weight, joined, *_attention_to(models, trace, list(range(place, total, own)))))
        joined = not ends_word
    return [*tokens, Token("end", None, 1, False, *_attention_to(models, trace, ends))]


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bool]:
    """The text of a token, and whether it ends a word. Bytes that are not text by themselves are in hexadecimal."""
    symbol = tokenizer.symbols[token]
    if token in (tokenizer.start_token_id, tokenizer.end_token_id):
        return symbol, True
    spelled = bytes(SYMBOL_TO_BYTE[character] for character in symbol.removesuffix(WORD_END))
    try:
        return spelled.decode("utf-8"), symbol.endswith(WORD_END)
    except UnicodeDecodeError:
        return spelled.hex(" ").upper(), symbol.endswith(WORD_END)


def _attention_to(models: Models, trace: Tracer, positions: list[int]) -> tuple[float, Tensor]:
    """The share of the attention that some positions got, and the map of it, float32 (h, w) in [0, 1]."""
    large = trace.token_map(positions)  # (H, W)
    small = F.avg_pool2d(large[None], models.config.vae.downscale)[0]  # (h, w): the map has no more detail than this
    low, high = small.aminmax()
    return small.mean().item(), (small - low) / (high - low).clamp_min(1e-12)
