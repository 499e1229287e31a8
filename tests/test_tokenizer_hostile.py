"""Prompts made to keep a tokenizer busy: two seconds for the worst 10,000 characters, an error for more."""

import random
import time
import unicodedata

import pytest

from sd import generate
from sd.tokenizer import MAX_CHARACTERS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def seconds(function):
    """CPU time, so that a busy machine does not fail a test."""
    start = time.process_time()
    function()
    return time.process_time() - start


def random_text(alphabet):
    return "".join(random.Random(0).choices(alphabet, k=MAX_CHARACTERS))


def characters(first, last, category="L"):
    """The characters of a range whose Unicode category begins with `category`."""
    return [chr(code) for code in range(first, last) if unicodedata.category(chr(code)).startswith(category)]


LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENTITIES = "&" + "amp;" * 249  # 997 characters: ftfy resolves one level of entities within entities a pass

HOSTILE = {
    "one letter": "a" * 10_000,
    "two letters": "ab" * 5_000,
    "one word of random letters": random_text(LETTERS),
    "one word of frequent letters": random_text("etaoinshrdlu"),
    "short words of random letters": random_text(LETTERS + "   "),
    "random latin": random_text(characters(0xC0, 0x180)),
    "random cyrillic and greek": random_text(characters(0x370, 0x500)),
    "random devanagari": random_text(characters(0x900, 0x980)),
    "random cjk": random_text(characters(0x4E00, 0xA000)),
    "random hangul": random_text(characters(0xAC00, 0xD7A4)),
    "random scripts": random_text(LETTERS + "áéíóúçñабвгдежзиклмнопрстуфхцчшщあいうえお水墨画日本語한국어"),
    "random punctuation": random_text("!?.,;-+*/=#@$%^_~:|()[]{}"),
    "random emoji": random_text(characters(0x1F300, 0x1FB00, "S")),
    "random faces": random_text(characters(0x1F600, 0x1F650, "S")),
    "mathematical letters": random_text(characters(0x1D400, 0x1D800)),
    "notes of twelve bytes": "\U0001d160" * 10_000,
    "ligatures": "\ufb03" * 10_000,
    "digits": "4" * 10_000,
    "punctuation": "!?" * 5_000,
    "emoji": "👩\u200d👩\u200d👧" * 2_000,
    "flags": "🇯🇵" * 5_000,
    "cjk": "水墨画" * 3_333,
    "hangul": "한국어" * 3_333,
    "marks": "\u0301\u0327\u0316" * 3_333,
    "marks in the wrong order": "\u0301" * 5_000 + "\u0327" * 5_000,
    "marks as entities": "&#769;&#790;" * 833,
    "entities": "&amp;" * 2_000,
    "half entities": "&amp" * 2_500,
    "long entity": "&" + "a" * 9_998 + ";",
    "entities within entities": "&" + "amp;" * 2_499,
    "entities within entities, in parts": ("é" + ENTITIES + "lt") * 10,
    "entities within entities, broken encodings": ("Ã©" * 9 + ENTITIES[:980] + "lt") * 10,
    "entities within entities, marks": ("&" + "amp;" * 150 + "\u0301\u0316" * 199 + "x") * 10,
    "entities within entities, wide": ("＆" + "ａmp;" * 249 + "lté") * 10,
    "entities within entities, lines": ("é&" + "amp;" * 124 + "\n") * 20,
    "nested semicolons": "é&" + "&semi" * 1_999 + ";",
    "mojibake": "cafÃ© naÃ¯ve " * 769,
    "controls": "\x80\x00\x1b[" * 2_500,
    "blanks": " \t\u3000\u00a0" * 2_500,
    "lines": "a\r\n" * 3_333,
    "accented lines": "é\n" * 5_000,
    "quotes": "'s’s" * 2_500,
    "special tokens": "<|endoftext|>" * 769,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_worst_prompts_take_at_most_two_seconds(tokenizer, text):
    assert MAX_CHARACTERS - 200 < len(text) <= MAX_CHARACTERS
    taken = seconds(lambda: tokenizer.encode(text))
    print(f"{len(text)} characters: {taken:.2f} s")
    assert taken < 2


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_generate_refuses_a_prompt_of_a_megabyte_within_a_second(text):
    def refuse():
        with pytest.raises(ValueError, match="^prompt should be at most 10000 characters long, not "):
            generate(text * 101)

    assert seconds(refuse) < 1


def test_a_hundred_entities_within_entities_are_resolved(tokenizer):
    assert tokenizer.encode("&" + "amp;" * 100 + "lt;") == tokenizer.encode("<")
