"""A tokenizer with words that textual inversion has added (2208.01618): each is a token with a learned vector.

CLIP's vocabulary has the ids 0 to 49,407. An added word has an id above, and the text encoder a row for it in its table
of token embeddings. Training writes both into a folder in the layout of diffusers.
"""

from __future__ import annotations

import regex

from sd.tokenizer import WORD, Tokenizer, clean, spell


class TokenizerWithWords(Tokenizer):
    """`Tokenizer`, with added words found before any other, in upper or lower case.

    `words` maps each to its id, from 49,408 on. A word with several vectors has them as `word`, `word_1`, `word_2`:
    writing `word` in a prompt gives all of them in a row, as in diffusers. Raises ValueError for ids that CLIP's
    vocabulary has.
    """

    def __init__(self, words: dict[str, int], pad_token_id: int | None = None):
        super().__init__(pad_token_id=pad_token_id)
        words = {clean(word): token for word, token in words.items()}
        if taken := [word for word, token in words.items() if token < len(self)]:
            raise ValueError(f"The id of {taken[0]!r:.80} should be {len(self):,} or more, not {words[taken[0]]}.")
        names = {token: "".join(spell(word)) for word, token in words.items()}
        self.symbols += [names.get(token, "") for token in range(len(self), max(names, default=0) + 1)]
        self.added = {word: [token] for word, token in words.items()}
        for word, tokens in self.added.items():
            while (more := words.get(f"{word}_{len(tokens)}")) is not None:
                tokens.append(more)
        longest_first = map(regex.escape, sorted(words, key=len, reverse=True))
        self.added_word = regex.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) never matches

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
