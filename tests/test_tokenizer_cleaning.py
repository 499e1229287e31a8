"""Cleaning a prompt: the repairs of OpenAI's tokenizer, and clear errors."""

import html
import random

import ftfy
import pytest

from sd.tokenizer import clean


def as_openai_does(text: str) -> str:
    """basic_clean and whitespace_clean of OpenAI's clip/simple_tokenizer.py, and lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


MEANT = {
    "plain": ("A  red\thouse ", "a red house"),
    "mojibake": ("cafÃ©", "café"),
    "curly quotes": ("the fox\u2019s \u201cden\u201d", 'the fox\'s "den"'),
    "wide letters": ("ＷＩＤＥ", "wide"),
    "ligature": ("ﬁsh", "fish"),
    "entity": ("Caf&eacute; &amp; bar", "café & bar"),
    "entity twice": ("&amp;amp;amp;", "&"),
    "terminal colours": ("\x1b[31mred\x1b[0m", "red"),
    "decomposed": ("cafe\u0301", "café"),
    "control character": ("a\0b", "ab"),
    "entity beside a tag": ("<b>&lt;</b>", "<b><</b>"),
    "empty": ("", ""),
}


@pytest.mark.parametrize("text, meant", MEANT.values(), ids=MEANT)
def test_the_text_that_was_meant(text, meant):
    assert clean(text) == meant == as_openai_does(text)


def test_broken_texts_are_repaired_as_ftfy_does():
    rng = random.Random(0)
    pieces = ["é", "Ã©", "â€™", "&amp;", "&lt", "<", "\n", "\r\n", "ﬀ", "ｗ", "\u0301", "\u0327", " ", "x", "\x85", "’"]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        assert clean(text) == as_openai_does(text), ascii(text)


def test_plain_text_is_not_changed_by_the_repairs():
    """`clean` leaves them out for visible ASCII without "&"."""
    rng = random.Random(0)
    visible = [chr(code) for code in range(ord(" "), ord("~") + 1) if chr(code) != "&"]
    for _ in range(1000):
        text = "".join(rng.choices(visible, k=rng.randint(1, 40)))
        assert clean(text) == as_openai_does(text), text


def test_long_lines_are_repaired_1000_characters_at_a_time():
    text = " &eacute; cafÃ©" * 600  # some parts end within "&eacute;", which is repaired all the same
    assert clean(text) == as_openai_does(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_a_lone_surrogate_is_refused(text):
    with pytest.raises(ValueError, match="must be valid Unicode; .* has a lone surrogate in it"):
        clean(text)


def test_an_entity_of_thousands_of_digits_is_refused():
    with pytest.raises(ValueError, match="an HTML entity with more digits than any character's number"):
        clean("é&#" + "9" * 5000 + ";")


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]])
def test_only_text_is_cleaned(text):
    with pytest.raises(TypeError, match=f"must be a string, not {type(text).__name__}"):
        clean(text)
