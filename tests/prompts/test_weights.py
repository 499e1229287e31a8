"""The notation for weights: valid prompts, and errors."""

import contextlib
import math
import re
import time
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd.prompts.weights import parse


@pytest.mark.parametrize(
    "prompt, pieces",
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("a ((cat))", [("a ", 1.0), ("cat", 1.21)]),
        ("[cat] on", [("cat", 1 / 1.1), (" on", 1.0)]),
        ("[[cat]]", [("cat", 1 / 1.21)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat: .5 )", [("cat", 0.5)]),
        ("(cat:-1)", [("cat", -1.0)]),
        ("(a cat:0) sits", [("a cat", 0.0), (" sits", 1.0)]),
        ("((cat:1.3))", [("cat", 1.43)]),
        ("(a (red:1.5) cat:2)", [("a ", 2.0), ("red", 3.0), (" cat", 2.0)]),
        ("(a [red] cat)", [("a ", 1.1), ("red", 1.0), (" cat", 1.1)]),
        ("(un)(known)", [("unknown", 1.1)]),
        ("(Star Wars: Episode IV)", [("Star Wars: Episode IV", 1.1)]),
        ("(cat:heavy:1.2)", [("cat:heavy", 1.2)]),
        ("(cat:)", [("cat:", 1.1)]),
        ("(cat:1,3)", [("cat:1,3", 1.1)]),
        ("ca()t", [("cat", 1.0)]),
        ("at 10:30", [("at 10:30", 1.0)]),
        ("(note: a (cat))", [("note: a ", 1.1), ("cat", 1.21)]),
        (r"\(cat\) \[dog\] \\", [("(cat) [dog] \\", 1.0)]),
        (r"(a \(cat\):1.2)", [("a (cat)", 1.2)]),
        (r"(10\:30)", [("10:30", 1.1)]),
        (r"[a\|b] c|d [(a|b)]", [("a|b", 1 / 1.1), (" c|d a|b", 1.0)]),
        ("a \\", [("a ", 1.0)]),
        ("(two\nlines)", [("two\nlines", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))).",
            [
                *[("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1)],
                *[("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.0)],
            ],
        ),
    ],
)
def test_parse(prompt, pieces):
    ((*parsed,),) = parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    "prompt, parts",
    [
        ("a cat BREAK a dog", [[("a cat", 1.0)], [("a dog", 1.0)]]),
        ("(a cat BREAK a dog:1.5)", [[("a cat", 1.5)], [("a dog", 1.5)]]),
        ("a BREAK\nBREAK b", [[("a", 1.0)], [], [("b", 1.0)]]),
        ("BREAK a", [[], [("a", 1.0)]]),
        ("a BREAK", [[("a", 1.0)], []]),
        ("a break, BREAKFAST, a_BREAK", [[("a break, BREAKFAST, a_BREAK", 1.0)]]),
        (r"\BREAK", [[("BREAK", 1.0)]]),
    ],
)
def test_break(prompt, parts):
    assert parse(prompt) == parts


@pytest.mark.parametrize(
    "prompt, bracket, place",
    [
        ("a (cat on the mat", "closes the '('", "(cat on the mat"),
        ("a [cat", "closes the '['", "[cat"),
        ("((a) cat", "closes the '('", "((a) cat"),
        ("a cat) on the mat", "opens the ')'", "a cat)"),
        ("a cat:1.3) on the mat", "opens the ')'", "a cat:1.3)"),
        ("]", "opens the ']'", "]"),
        ("(a [cat) on]", "closes the '['", "[cat) on]"),
        (r"(a cat\)", "closes the '('", r"(a cat\)"),
        ("(" + "a" * 1000, "closes the '('", "(" + "a" * 39),
        ("a" * 1000 + ")", "opens the ')'", "a" * 39 + ")"),
    ],
)
def test_brackets_that_are_not_in_pairs_are_refused(prompt, bracket, place):
    with pytest.raises(ValueError, match="^prompt should have its brackets in pairs: nothing ") as error:
        parse(prompt)
    assert f"nothing {bracket} of {place!r}; write \\{bracket[-2]} for the character itself." in str(error.value)


@pytest.mark.parametrize(
    "prompt, place",
    [
        ("a (cat:1.2.3) on", "(cat:1.2.3)"),
        ("(cat:.)", "(cat:.)"),
        ("(cat:" + 31 * "9" + ")", "(cat:" + 31 * "9" + ")"),
        ("((cat:" + 20 * "9" + "):" + 20 * "9" + ")", "(cat:" + 20 * "9" + "):" + 13 * "9"),
        ("(" * 4000 + "cat" + ")" * 4000, "(" * 40),
        ("[cat:0.5]", "[cat:0.5]"),
        ("[cat:dog:0.5]", "[cat:dog:0.5]"),
        ("(two\nlines:1..2)", "(two\nlines:1..2)"),
    ],
)
def test_weights_that_are_not_finite_numbers_are_refused(prompt, place):
    with pytest.raises(ValueError, match="^prompt should give a weight as a finite number in round brackets") as error:
        parse(prompt)
    assert f"not as in {place!r}; write \\: for the character itself." in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "prompt, place", [("a [red|blue] cat", "[red|blue] cat"), ("[|]", "[|]"), ("[a (b) c|d", "[a (b) c|d")]
)
def test_alternation_is_refused(prompt, place):
    with pytest.raises(ValueError, match="^prompt should be without alternation, as in ") as error:
        parse(prompt)
    assert f"as in {place!r}: prompts do not change between steps; write \\| for" in str(error.value)


@pytest.mark.parametrize("tag", ["<lora:style:0.8>", "<LORA:a/b>", "<lyco:x:1:2>", "<lora:\n>"])
def test_a_lora_in_a_prompt_is_refused(tag):
    with pytest.raises(ValueError, match="^uncond_prompt should be without ") as error:
        parse(f"a cat {tag} on a mat", "uncond_prompt")
    remedy = 'LoRAs are loaded with the model, as in load_models(loras=[("style.safetensors", 0.8)]).'
    assert str(error.value) == f"uncond_prompt should be without {tag!r}: {remedy}"


@given(st.text(alphabet="ab,:()[]\\ .15-BREAK|\n") | st.text())
def test_parse_gives_texts_and_finite_weights_or_a_value_error(prompt):
    try:
        parts = parse(prompt)
    except ValueError:
        parts = []
    for text, weight in chain(*parts):
        assert text
        assert math.isfinite(weight)


@given(st.text(alphabet="ab,:()[]\\ \n") | st.text().filter(lambda text: "BREAK" not in text))
def test_an_escaped_text_is_itself(text):
    escaped = re.sub(r"([\\()\[\]])", r"\\\1", text)
    assert parse(escaped) == [[(text, 1.0)] if text else []]


HOSTILE = ["(" * 5_000 + ")" * 5_000, "()" * 5_000, "[(" * 5_000, "(a:" * 3_333, ":" * 10_000, "\\" * 10_000]
HOSTILE += [
    "<lora:" * 1_666,
    "[" * 5_000 + "|" * 5_000,
    " " * 9_999 + "x",
    " BREAK" * 1_666,
    ":" + " " * 9_999,
    "(a:" + "1" * 9_990 + ")",
    "(a:1 " * 2_000,
]


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_prompts_are_parsed_quickly(prompt):
    started = time.process_time()
    with contextlib.suppress(ValueError):
        parse(prompt)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("prompt", ["x" * 10_001, "(" * 1_000_000, "&amp;" * 200_000])
def test_a_prompt_may_have_10000_characters(prompt):
    with pytest.raises(ValueError, match=f"^negative should be at most 10000 characters long, not {len(prompt)}\\.$"):
        parse(prompt, "negative")
    assert parse("x" * 10_000) == [[("x" * 10_000, 1.0)]]
