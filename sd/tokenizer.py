"""Prompt -> token ids: CLIP's byte-level byte-pair encoding (BPE).

In: a prompt, or a list of B prompts. Out: ids of shape (B, 77), the only form in which the text encoder sees language.

    "A  Café"  --clean-->  "a café"  --split-->  ["a", "café"]  --spell-->  ["a</w>"], ["c", "a", "f", "Ã", "©</w>"]
               --merge-->  ["a</w>"], ["cafÃ©</w>"]  --look up-->  [320, 15304]

BPE writes any text with a fixed number of symbols. It starts from the bytes of a word and joins neighbours, always the
pair that comes first in a list of merges; that list was learned once, by joining again and again the most frequent pair
of a large corpus. Common words end as one symbol, rare ones as a few pieces, and nothing is ever unknown.

Sources: BPE, arXiv 1508.07909, algorithm 1; on bytes, GPT-2 (Radford et al. 2019), section 2.2; CLIP, arXiv 2103.00020,
section 2.4. The ids are those of OpenAI's own tokenizer.
"""

from __future__ import annotations

import heapq
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path

import regex
import torch

from sd.cleaning import clean
from sd.files import DATA

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # part of the last symbol of a word: "cat</w>" is the word, "cat" the beginning of "catalog"
DEFAULT_MERGES = DATA / "merges.txt"
CACHED_WORDS, CACHED_LENGTH = 32_768, 32  # at most so many words, of at most so many characters: some 40 MB at worst
QUOTED_IDS = 64  # a warning about a truncated prompt quotes so much of what was dropped

WORD = regex.compile(r"""(?ix)                  # ignoring case, and the blanks in this pattern
      <\|startoftext\|> | <\|endoftext\|>       # the two special tokens, if someone spells them out
    | '(?: s | t | re | ve | m | ll | d )       # what English contracts: it 's, don 't, we 're
    | \p{L}+                                    # letters of any script
    | \p{N}                                     # digits, one by one
    | [^\s\p{L}\p{N}]+                          # everything else: punctuation, symbols, emoji
""")


def byte_symbols() -> dict[int, str]:
    """A visible character for each of the 256 bytes, in the order in which they open the vocabulary.

    A byte that Latin-1 shows as a visible character stands for itself. The others (blanks, control codes) get the
    characters from U+0100 on, so that no symbol contains white space and a list of merges is a readable text file.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


BYTE_TO_SYMBOL = byte_symbols()
SYMBOL_TO_BYTE = {symbol: byte for byte, symbol in BYTE_TO_SYMBOL.items()}


def split(text: str) -> list[str]:
    """The words of a prompt, cleaned: "It's 42!" -> ["it", "'s", "4", "2", "!"]. Merges never reach across words."""
    return WORD.findall(clean(text))


def spell(word: str) -> list[str]:
    """A word (not empty) as one symbol per byte of its UTF-8, the last one marked as the end of the word."""
    symbols = [BYTE_TO_SYMBOL[byte] for byte in word.encode("utf-8")]
    symbols[-1] += WORD_END
    return symbols


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The merges of a file, best first: a '#version' line, then one pair of symbols a line.

    Raises FileNotFoundError without a file, ValueError at a line that is not two symbols, bytes or earlier results.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of merges at {path}.")
    known = {symbol + ending for symbol in SYMBOL_TO_BYTE for ending in ("", WORD_END)}
    merges = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        if not lines.readline().startswith("#version"):
            raise ValueError(f"{path} is not a file of merges: its first line must begin with '#version'.")
        for number, line in enumerate(lines, start=2):
            left, _, right = line.rstrip().partition(" ")
            if left not in known or right not in known:
                raise ValueError(f"{path}, line {number}, must be two symbols known by then, not {line[:80]!r}.")
            known.add(left + right)
            merges.append((left, right))
    return merges


def check_vocab(path: str | Path, vocab: dict[str, int]) -> None:
    """Raise ValueError unless the vocab.json at `path` gives the ids of `vocab`, FileNotFoundError without a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no vocabulary file at {path}; vocab_file=None needs none: the merges do.")
    try:
        theirs = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} is not a vocabulary: it must be JSON, an object of symbols and their ids.") from None
    if theirs != vocab:
        symbol = next(s for s in [*vocab, *theirs] if vocab.get(s) != theirs.get(s))
        id_there, id_here = theirs.get(symbol), vocab.get(symbol)
        raise ValueError(f"{path} does not fit the merges: it gives {symbol!r} the id {id_there}, they give {id_here}.")


class Tokenizer:
    """CLIP's tokenizer. `tokenizer(prompts)` gives the ids that the text encoder takes.

    The merges alone make the vocabulary: 256 bytes, the same 256 at the end of a word, one symbol a merge, start, end.
    Raises FileNotFoundError or ValueError, as `read_merges` and `check_vocab` do.

    Args:
        merges_file: the list of merges; None is the one of CLIP, with 48,894 merges and so 49,408 symbols.
        vocab_file: a vocab.json to check against the vocabulary that the merges make.
        context_length: ids per prompt, start and end included.
        pad_token_id: fills a short prompt up; None is the end token, as in SD 1.x. SD 2.x pads with 0.

    Attributes: `symbols`, the list id -> symbol; `vocab`, the dict symbol -> id; `merges`, the list of pairs, best
    first; `ranks`, the dict pair -> place in `merges`; start_token_id, end_token_id, pad_token_id, context_length.
    """

    def __init__(
        self,
        merges_file: str | Path | None = None,
        vocab_file: str | Path | None = None,
        context_length: int = 77,
        pad_token_id: int | None = None,
    ):
        self.merges = read_merges(DEFAULT_MERGES if merges_file is None else merges_file)
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        word_ends = (symbol + WORD_END for symbol in SYMBOL_TO_BYTE)
        self.symbols = [*SYMBOL_TO_BYTE, *word_ends, *map("".join, self.merges), START, END]
        self.vocab = {symbol: token for token, symbol in enumerate(self.symbols)}
        if vocab_file is not None:
            check_vocab(vocab_file, self.vocab)
        self.start_token_id, self.end_token_id = self.vocab[START], self.vocab[END]
        self.pad_token_id = self.end_token_id if pad_token_id is None else pad_token_id
        self.context_length = context_length
        if context_length < 2 or not 0 <= self.pad_token_id < len(self):
            given = f"not {context_length} and {self.pad_token_id}"
            raise ValueError(f"context_length must be 2 or more and pad_token_id from 0 to {len(self) - 1}, {given}.")
        self._cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.symbols)

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """A prompt or a list of B -> LongTensor (B, context_length) of start, ids, end, padding.

        A prompt that does not fit is truncated, with a warning that quotes what was dropped. Raises TypeError for what
        is no text, and ValueError for a text that `sd.cleaning` cannot repair.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, (list, tuple)):
            raise TypeError(f"The tokenizer takes a prompt or a list of prompts, not {type(texts).__name__}.")
        room = self.context_length - 2
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > room:
                quote = self.decode(ids[room : room + QUOTED_IDS]) + " ..." * (len(ids) > room + QUOTED_IDS)
                warnings.warn(f"Only {room} of the prompt's {len(ids)} tokens fit. Dropped: {quote!r}", stacklevel=2)
            padding = [self.pad_token_id] * (room - len(ids))
            rows.append([self.start_token_id, *ids[:room], self.end_token_id, *padding])
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self.context_length)

    def encode(self, text: str) -> list[int]:
        """All ids of a prompt and nothing else: no start, no end, not truncated.

        Raises TypeError and ValueError as `__call__` does.
        """
        ids: list[int] = []
        for word in split(text):
            ids += self._cache.get(word) or self._encode_word(word)
        return ids

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The text of a list or 1-D tensor of ids, without start, end and padding; U+FFFD where it is not UTF-8.

        Raises ValueError if something in `ids` is not an id.
        """
        tokens = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        for token in tokens:
            if not isinstance(token, Integral) or not 0 <= token < len(self):
                raise ValueError(f"A token id is a whole number from 0 to {len(self) - 1}, not {str(token)[:40]}.")
        while tokens and tokens[-1] == self.pad_token_id:  # only at the end: the 0 of SD 2.x is also the symbol "!"
            tokens.pop()
        specials = {self.start_token_id, self.end_token_id}
        spelled = "".join(self.symbols[token] for token in tokens if token not in specials)
        text = bytes(SYMBOL_TO_BYTE[character] for character in spelled).decode("utf-8", errors="replace")
        return text.replace(WORD_END, " ").rstrip(" ")

    def merge_steps(self, word: str) -> Iterator[list[str]]:
        """The symbols of one word of `split`, as spelled and then after every merge, for whoever wants to watch."""
        symbols = spell(word)
        yield symbols.copy()
        for _ in self._merge(symbols):
            yield [symbol for symbol in symbols if symbol]

    def _encode_word(self, word: str) -> list[int]:
        if word in (START, END):
            return [self.vocab[word]]
        symbols = spell(word)
        for _ in self._merge(symbols):
            pass
        ids = [self.vocab[symbol] for symbol in symbols if symbol]
        if len(word) <= CACHED_LENGTH:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _merge(self, symbols: list[str]) -> Iterator[None]:
        """Merge `symbols` in place, and pause after every merge. What its left neighbour swallowed becomes "".

        The algorithm: while any neighbours are in the list of merges, join the best pair wherever it stands, from left
        to right, then look again. To look again is quadratic, so a heap holds the ranks in sight, and `places` where.
        """
        end = len(symbols)
        symbols.append("")  # no merge contains it: the neighbour of the last symbol and, as index -1, of the first
        before, after = [*range(-1, end)], [*range(1, end + 1), end]
        places = defaultdict(list)  # rank -> where its pair stands
        for place, pair in enumerate(zip(symbols, symbols[1:])):
            if pair in self.ranks:
                places[self.ranks[pair]].append(place)
        ranks = list(places)
        heapq.heapify(ranks)

        def note(place: int) -> None:
            rank = self.ranks.get((symbols[place], symbols[after[place]]))
            if rank is not None:
                if rank not in places:
                    heapq.heappush(ranks, rank)
                places[rank].append(place)

        while ranks:
            rank = heapq.heappop(ranks)
            left, right = self.merges[rank]
            joined = left + right
            for place in sorted(places.pop(rank)):
                neighbour = after[place]
                if symbols[place] == left and symbols[neighbour] == right:  # no merge has used either up meanwhile
                    symbols[place], symbols[neighbour] = joined, ""
                    after[place] = after[neighbour]
                    before[after[place]] = place
                    note(before[place])
                    note(place)
                    yield


def CLIPTokenizer(vocab_file: str | Path, merges_file: str | Path) -> Tokenizer:
    """`Tokenizer` under the name and arguments that the video uses; a vocab.json that is not there is not needed."""
    return Tokenizer(merges_file, vocab_file if Path(vocab_file).is_file() else None)
