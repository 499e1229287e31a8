"""Prompts of a megabyte, made to keep a tokenizer busy: linear time, or an error at once."""

import random
import time

import pytest

from sd import generate
from sd.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def seconds(function):
    """CPU time, so that a busy machine does not fail a test."""
    start = time.process_time()
    function()
    return time.process_time() - start


def random_words(alphabet, longest):
    """Words without end, each another one."""
    rng = random.Random(0)
    return "".join("".join(rng.choices(alphabet, k=rng.randint(1, longest))) + " " for _ in range(1_000_000 // longest))


HOSTILE = {
    "one letter": "a" * 1_000_000,
    "two letters": "ab" * 500_000,
    "random letters": random_words("abcdefghijklmnopqrstuvwxyz", 1_000_000),
    "random words": random_words("abcdefghijklmnopqrstuvwxyz", 10),
    "random latin": random_words([chr(code) for code in range(0x80, 0x180)], 100_000),
    "digits": "4" * 1_000_000,
    "punctuation": "!?" * 500_000,
    "emoji": "👩\u200d👩\u200d👧" * 60_000,
    "flags": "🇯🇵" * 125_000,
    "cjk": "水墨画" * 110_000,
    "hangul": "한국어" * 110_000,
    "marks": "\u0301\u0327\u0316" * 160_000,
    "marks as entities": "&#769;&#790;" * 80_000,
    "entities": "&amp;" * 200_000,
    "half entities": "&amp" * 250_000,
    "long entity": "&" + "a" * 1_000_000 + ";",
    "mojibake": "cafÃ© naÃ¯ve " * 60_000,
    "controls": "\x80\x00\x1b[" * 200_000,
    "blanks": " \t\u3000\u00a0" * 140_000,
    "lines": "a\r\n" * 330_000,
    "accented lines": "é\n" * 330_000,
    "quotes": "'s’s" * 160_000,
    "special tokens": "<|endoftext|>" * 75_000,
}


@pytest.mark.parametrize("length", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_long_prompts_take_linear_time(text, length):
    """A megabyte takes about a second on one core, some scripts two; what is quadratic takes minutes at the least."""
    tokenizer = Tokenizer()
    text = text.encode()[:length].decode(errors="ignore")
    taken = seconds(lambda: tokenizer.encode(text))
    print(f"{len(text.encode()):,} bytes: {taken:.2f} s")
    assert taken < 0.5 + 6 * length / 1_000_000


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_generate_answers_a_prompt_of_a_megabyte_within_a_second(text):
    def refuse():
        with pytest.raises(ValueError, match="^prompt should be "):
            generate(text)

    assert len(text) > 30_000
    assert seconds(refuse) < 1


NESTED = {
    "plain": "&" + "amp;" * 200_000,
    "with spelled-out letters": "&" + "&#97;mp;" * 100_000,
    "with wide letters": "&" + "ａmp;" * 150_000,
    "with control characters": "&" + "a\0mp;" * 150_000,
    "with Greek question marks": "&" + "amp\u037e" * 150_000,
    "within one another": "&" * 100_000 + "a" + "mp;#97;" * 100_000,
}


@pytest.mark.parametrize("text", NESTED.values(), ids=NESTED)
def test_endless_entities_within_entities_are_refused(tokenizer, text):
    """They would keep ftfy busy for hours: it resolves one level a pass."""

    def refuse():
        with pytest.raises(ValueError, match="^The prompt has HTML entities within HTML entities, more than 8 deep: "):
            tokenizer.encode(text)

    assert seconds(refuse) < 4


def test_a_hundred_entities_within_entities_are_resolved(tokenizer):
    assert tokenizer.encode("&" + "amp;" * 100 + "lt;") == tokenizer.encode("<")
