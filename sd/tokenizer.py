"""Prompt -> token ids: CLIP's byte-level byte-pair encoding (BPE).

In: a prompt, or a list of B prompts. Out: ids of shape (B, 77), the input of the text encoder.

    "A  Café"  --clean-->  "a café"  --split-->  ["a", "café"]  --spell-->  ["a</w>"], ["c", "a", "f", "Ã", "©</w>"]
               --merge-->  ["a</w>"], ["cafÃ©</w>"]  --look up-->  [320, 15304]

BPE (1508.07909, section 3.2) starts from the bytes of a word and joins pairs of neighbours, in the order of a list of
merges. The list was learned once, by joining the most frequent pair of a large corpus again and again (algorithm 1). A
common word ends as one symbol, a rare one as several; no text is unknown. Starting from bytes is GPT-2's idea (Radford
et al. 2019, section 2.2); CLIP's list is that of 2103.00020, section 2.4. The ids are those of OpenAI's own tokenizer.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path

import ftfy
import regex
import torch

from sd.files import DATA
from sd.runtime import warn

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # part of the last symbol of a word: "cat</w>" is the word, "cat" the beginning of "catalog"
DEFAULT_MERGES = DATA / "merges.txt"
MAX_CHARACTERS = 10_000  # of a prompt: far beyond any use, and the slowest one found takes about two seconds
REPAIRED_AT_ONCE = 1_000  # characters; ftfy's time grows with their square where HTML entities are nested
CACHED_WORDS, CACHED_LENGTH = 32_768, 32  # the cache has at most 32,768 words of at most 32 characters
QUOTED_IDS = 64  # of the dropped part of a prompt, quoted in a warning

WORD = regex.compile(r"""(?ix)                  # ignoring case, and the blanks in this pattern
      <\|startoftext\|> | <\|endoftext\|>       # the two special tokens, if the prompt spells them out
    | '(?: s | t | re | ve | m | ll | d )       # English contractions: it 's, don 't, we 're
    | \p{L}+                                    # letters of any script
    | \p{N}                                     # digits, one by one
    | [^\s\p{L}\p{N}]+                          # everything else: punctuation, symbols, emoji
""")


def byte_symbols() -> dict[int, str]:
    """A visible character for each of the 256 bytes, in the order of their ids: a file of merges is then readable."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


BYTE_TO_SYMBOL = byte_symbols()
SYMBOL_TO_BYTE = {symbol: byte for byte, symbol in BYTE_TO_SYMBOL.items()}


def clean(text: str) -> str:
    """A prompt in lower case and single-spaced. Wrong encodings ('cafÃ©'), HTML entities and curly quotes are repaired.

    The repairs are those of OpenAI's tokenizer, except that ftfy gets at most 1,000 characters of a line at once.
    Raises TypeError for anything but a string, and ValueError for more than 10,000 characters, half a character (a lone
    surrogate), or an HTML entity with thousands of digits.
    """
    if not isinstance(text, str):
        raise TypeError(f"A prompt must be a string, not {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"prompt should be at most {MAX_CHARACTERS} characters long, not {len(text)}.")
    if not (text.isascii() and text.isprintable()) or "&" in text:  # most prompts contain nothing to repair
        try:
            text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise ValueError(f"A prompt must be valid Unicode; {text[:80]!a} has a lone surrogate in it.") from None
        try:
            text = html.unescape(html.unescape(ftfy.fix_text(text, max_decode_length=REPAIRED_AT_ONCE)))
        except ValueError:
            raise ValueError("The prompt has an HTML entity with more digits than any character's number.") from None
    return " ".join(text.split()).lower()


def split(text: str) -> list[str]:
    """The words of a prompt, cleaned: "It's 42!" -> ["it", "'s", "4", "2", "!"]. Merges stay within a word."""
    return WORD.findall(clean(text))


def spell(word: str) -> list[str]:
    """A word (not empty) -> one symbol for each byte of its UTF-8. The last symbol is marked as the end of the word."""
    symbols = [BYTE_TO_SYMBOL[byte] for byte in word.encode("utf-8")]
    symbols[-1] += WORD_END
    return symbols


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The merges in a file, best first: a '#version' line, then one pair of symbols a line.

    Raises FileNotFoundError, and ValueError unless each line joins two bytes or results of earlier lines.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of merges at {path}.")
    known = {symbol + ending for symbol in SYMBOL_TO_BYTE for ending in ("", WORD_END)}
    merges = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        if not lines.readline().startswith("#version"):
            raise ValueError(f"{path} is not a file of merges: its first line should begin with '#version'.")
        for number, line in enumerate(lines, start=2):
            left, _, right = line.rstrip().partition(" ")
            if left not in known or right not in known:
                raise ValueError(f"{path}, line {number}, should be two known symbols, not {line[:80]!r}.")
            known.add(left + right)
            merges.append((left, right))
    return merges


def make_tables(
    merges: list[tuple[str, str]],
) -> tuple[list[tuple[str, str]], dict[tuple[str, str], int], list[str], dict[str, int]]:
    """The merges, the place of each pair in them, the symbols in the order of their ids, and the id of each."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    word_ends = (symbol + WORD_END for symbol in SYMBOL_TO_BYTE)
    symbols = [*SYMBOL_TO_BYTE, *word_ends, *map("".join, merges), START, END]
    return merges, ranks, symbols, {symbol: token for token, symbol in enumerate(symbols)}


@cache
def clip_tables():
    """`make_tables` of CLIP's own merges. They are read once, and all tokenizers share them."""
    return make_tables(read_merges(DEFAULT_MERGES))


def check_vocab(path: str | Path, vocab: dict[str, int]) -> None:
    """Raise ValueError unless the vocab.json at `path` equals `vocab`, FileNotFoundError if there is no file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no vocabulary file at {path}; use vocab_file=None: the merges are enough.")
    try:
        theirs = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} is not a vocabulary: it should be a JSON object of symbols and their ids.") from None
    if theirs != vocab:
        symbol = next(s for s in [*vocab, *theirs] if vocab.get(s) != theirs.get(s))
        id_there, id_here = theirs.get(symbol), vocab.get(symbol)
        raise ValueError(f"{path} does not fit the merges: the id of {symbol!r} should be {id_here}, not {id_there}.")


class Tokenizer:
    """CLIP's tokenizer. `tokenizer(prompts)` gives the ids for the text encoder.

    The merges alone make the vocabulary: 256 bytes, the same 256 at the end of a word, one symbol a merge, start, end.
    `merges_file` defaults to CLIP's 48,894 merges, and so 49,408 symbols; a `vocab_file` is only checked against them.
    `pad_token_id` fills up short prompts: by default the end token, as in SD 1.x (SD 2.x pads with 0).

    Raises FileNotFoundError or ValueError for bad files, and ValueError for a bad length or pad id.
    """

    def __init__(
        self,
        merges_file: str | Path | None = None,
        vocab_file: str | Path | None = None,
        context_length: int = 77,
        pad_token_id: int | None = None,
    ):
        # merges, best first; pair -> its place in them; id -> symbol; symbol -> id
        tables = clip_tables() if merges_file is None else make_tables(read_merges(merges_file))
        self.merges, self.ranks, self.symbols, self.vocab = tables
        if vocab_file is not None:
            check_vocab(vocab_file, self.vocab)
        self.start_token_id, self.end_token_id = self.vocab[START], self.vocab[END]
        self.pad_token_id = self.end_token_id if pad_token_id is None else pad_token_id
        self.context_length = context_length
        if context_length < 2:
            raise ValueError(f"context_length should be 2 or more, not {context_length}.")
        if not 0 <= self.pad_token_id < len(self):
            raise ValueError(f"pad_token_id should be from 0 to {len(self) - 1}, not {pad_token_id}.")
        self._cache = {START: [self.start_token_id], END: [self.end_token_id]}  # word -> ids

    def __len__(self) -> int:
        return len(self.symbols)

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """A prompt or a list of B -> LongTensor (B, context_length) of start, ids, end, padding.

        Long prompts are truncated, with a warning. Raises TypeError for anything but text, ValueError as `clean` does.
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
                warn(f"Only {room} of the prompt's {len(ids)} tokens fit. Dropped: {quote!r}")
            padding = [self.pad_token_id] * (room - len(ids))
            rows.append([self.start_token_id, *ids[:room], self.end_token_id, *padding])
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self.context_length)

    def encode(self, text: str) -> list[int]:
        """All ids of a prompt, not truncated, without start and end. Raises TypeError or ValueError as `clean` does."""
        ids: list[int] = []
        for word in split(text):
            ids += self._cache.get(word) or self._encode_word(word)
        return ids

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Ids (N,) -> text, without start, end and padding; U+FFFD where it is not UTF-8. ValueError for other ids."""
        tokens = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        for token in tokens:
            if not isinstance(token, Integral) or not 0 <= token < len(self):
                raise ValueError(f"A token id should be an integer from 0 to {len(self) - 1}, not {str(token)[:40]}.")
        while tokens and tokens[-1] == self.pad_token_id:  # only at the end: the 0 of SD 2.x is also the symbol "!"
            tokens.pop()
        specials = {self.start_token_id, self.end_token_id}
        spelled = "".join(self.symbols[token] for token in tokens if token not in specials)
        text = bytes(SYMBOL_TO_BYTE[character] for character in spelled).decode("utf-8", errors="replace")
        return text.replace(WORD_END, " ").rstrip(" ")

    def merge_steps(self, word: str) -> Iterator[list[str]]:
        """The symbols of one word of `split`: as spelled, then after each merge."""
        symbols = spell(word)
        yield symbols.copy()
        for _ in self._merge(symbols):
            yield symbols.copy()

    def _encode_word(self, word: str) -> list[int]:
        symbols = spell(word)
        for _ in self._merge(symbols):
            pass
        ids = [self.vocab[symbol] for symbol in symbols]
        if len(word) <= CACHED_LENGTH and len(self._cache) < CACHED_WORDS:
            self._cache[word] = ids
        return ids

    def _merge(self, symbols: list[str]) -> Iterator[None]:
        """Joins the best pair of neighbours everywhere, and looks again. Changes `symbols`; pauses after each merge."""
        ranks = self._ranks_of(symbols)
        while (best := min(ranks, default=len(self.merges))) < len(self.merges):
            for i, rank in enumerate(ranks):  # a merge makes both lists shorter by one, to the right of i
                if rank == best:
                    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
                    start = max(i - 1, 0)  # the pairs before and after have changed
                    ranks[start : i + 2] = self._ranks_of(symbols[start : i + 2])
                    yield

    def _ranks_of(self, symbols: list[str]) -> list[int]:
        """For each pair of neighbours, its place in the list of merges, or the list's length if it is not there."""
        return [self.ranks.get(pair, len(self.merges)) for pair in zip(symbols, symbols[1:])]


def CLIPTokenizer(vocab_file: str | Path, merges_file: str | Path) -> Tokenizer:
    """`Tokenizer` under the name and arguments that the video uses. The vocab.json is optional."""
    return Tokenizer(merges_file, vocab_file if Path(vocab_file).is_file() else None)
