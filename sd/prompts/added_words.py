"""A tokenizer with words that textual inversion has added (2208.01618): each stands for one or more learned vectors.

CLIP's vocabulary has the ids 0 to 49,407. An added word has ids above, and the text encoder a row for each in its table
of token embeddings. The words come from the tokenizer of a folder in the layout of diffusers, or from embedding files
(`sd.adapters.textual_inversion`).
"""

from __future__ import annotations

from collections.abc import Iterable

import regex

from sd.prompts.weights import parse
from sd.tokenizer import WORD, Tokenizer, clean, spell


class TokenizerWithWords(Tokenizer):
    """`Tokenizer`, with added words found before any other, in upper or lower case.

    `words` maps each to its ids, from 49,408 on. Writing a word in a prompt gives all its ids in a row. `continued` has
    every id that is not the first of a word: `prompts.weights.split` starts no chunk there. Raises ValueError for ids
    that CLIP's vocabulary has.
    """

    def __init__(self, words: dict[str, list[int]], pad_token_id: int | None = None):
        super().__init__(pad_token_id=pad_token_id)
        self.added = {clean(word): list(ids) for word, ids in words.items()}
        if taken := [word for word, ids in self.added.items() if min(ids) < len(self)]:
            raise ValueError(
                f"The id of {taken[0]!r:.80} should be {len(self):,} or more, not {self.added[taken[0]][0]}."
            )
        names = {token: "".join(spell(name)) for name, token in flat(self.added).items()}
        added = [names.get(token, "") for token in range(len(self), max(names, default=0) + 1)]
        self.symbols = self.symbols + added  # a new list: that of CLIP's symbols is shared
        self.continued = {token for ids in self.added.values() for token in ids[1:]}
        self.added_word = any_of(self.added)

    def encode(self, text: str) -> list[int]:
        """All ids of a prompt, as `Tokenizer.encode` gives them, and those of added words."""
        ids: list[int] = []
        for part in self.added_word.split(clean(text)):
            if part in self.added:
                ids += self.added[part]
                continue
            for word in WORD.findall(part):
                ids += self._cache.get(word) or self._encode_word(word)
        return ids


def grouped(words: dict[str, int]) -> dict[str, list[int]]:
    """Words as diffusers stores them -> each with all its ids: `word`, `word_1`, `word_2` are three vectors of `word`.

    {"<cat>": 49408, "<cat>_1": 49409}  ->  {"<cat>": [49408, 49409], "<cat>_1": [49409]}
    """
    groups = {word: [token] for word, token in words.items()}
    for word, ids in groups.items():
        while (more := words.get(f"{word}_{len(ids)}")) is not None:
            ids.append(more)
    return groups


def flat(words: dict[str, list[int]]) -> dict[str, int]:
    """The inverse of `grouped`: a name for each vector."""
    return {f"{word}_{i}" if i else word: token for word, ids in words.items() for i, token in enumerate(ids)}


def any_of(words: Iterable[str]) -> regex.Pattern:
    """Finds any of these words in a text, both as `tokenizer.clean` returns them. The longest comes first.

    None is found inside a longer word: neither "art" in "party" nor "style" in "style2".
    """
    longest_first = map(_whole, sorted(words, key=len, reverse=True))
    return regex.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) never matches


def _whole(word: str) -> str:
    starts, ends = (character.isalnum() for character in (word[0], word[-1]))
    return r"(?<![\p{L}\p{N}])" * starts + regex.escape(word) + r"(?![\p{L}\p{N}])" * ends


def words_in(prompts: Iterable[str], words: Iterable[str]) -> set[str]:
    """Those of the cleaned `words` that prompts name, in the notation of `weights`."""
    pattern = any_of(words)
    texts = (text for prompt in prompts for part in parse(prompt) for text, _ in part)
    return {found for text in texts for found in pattern.findall(clean(text))}
