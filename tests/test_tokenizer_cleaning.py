"""The text that was meant: ftfy's own repairs, but for contents that would keep it busy for hours."""

import html
import random
import unicodedata

import ftfy
import pytest
import regex

from sd.cleaning import clean, sort_marks


def as_openai_does(text: str) -> str:
    """What clip/simple_tokenizer.py of OpenAI's CLIP does to a text before it is split into words."""
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


@pytest.mark.parametrize("seed", range(20))
def test_marks_are_sorted_into_canonical_order(seed):
    marks = ["\u0301", "\u0327", "\u0316", "\u0345", "\u0344", "\u093c", "\u0f71", "\u20dd", "\u0488"]  # many classes
    run = "".join(random.Random(seed).choices(marks, k=150))
    sorted_run = sort_marks(regex.match(".*", run, regex.DOTALL))
    assert unicodedata.normalize("NFC", "q" + sorted_run) == unicodedata.normalize("NFC", "q" + run)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_half_a_character_is_refused(text):
    with pytest.raises(ValueError, match="must be valid Unicode; .* has a lone surrogate in it"):
        clean(text)


def test_an_endless_number_is_refused():
    with pytest.raises(ValueError, match="an HTML entity with more digits than any character's number"):
        clean("é&#" + "9" * 5000 + ";")


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]])
def test_only_text_is_cleaned(text):
    with pytest.raises(TypeError, match=f"must be a string, not {type(text).__name__}"):
        clean(text)
