"""Notation of other tools: it works, or one sentence says what becomes of it."""

import pytest

from sd.prompts.other_tools import adapt, without_notation
from sd.prompts.weights import parse


def texts(prompt):
    return [piece for part in parse(prompt) for piece in part]


@pytest.mark.parametrize(
    "prompt",
    ["[red:blue:0.5]", "[red:0.5]", "[red::0.25]", "[red:blue:5]", "[red|blue]", "[a:[b|c]:0.3]", "[red : blue : .5 ]"],
)
def test_prompt_editing_and_alternation_are_text(prompt):
    adapted, notes = adapt(f"a {prompt} house")
    assert texts(adapted) == [(f"a {prompt} house", 1.0)]
    assert adapt(adapted) == (adapted, {})
    assert any(f"{prompt} is read as text" in sentence for sentence in notes.values())


def test_weights_in_what_is_text_are_still_weights():
    adapted, notes = adapt("[a (red:1.2) tent:0.5]")
    assert texts(adapted) == [("[a ", 1.0), ("red", 1.2), (" tent:0.5]", 1.0)]
    assert next(iter(notes.values())).startswith("[a (red:1.2) tent:0.5] is read as text: ")


@pytest.mark.parametrize("file", ["<lora:style:0.8>", "<LORA:a b>", "<hypernet:x:1>", "<lyco:x:1:2>"])
def test_files_of_weights_are_left_out(file):
    for prompt in (f"{file} a red house", f"a red {file} house", f"a red house{file}"):
        adapted, notes = adapt(prompt)
        assert adapted == "a red house"
        assert list(notes.values()) == [f"{file} is left out: LoRA and hypernetwork files are not supported."]


@pytest.mark.parametrize(
    "prompt, what",
    [
        ("a red house AND a blue tent", "AND is read as a word"),
        ("a __colour__ house", "__colour__ is read as text: wildcard files are not supported; write {red|blue}."),
        ("a red++ house", "red++ is read as text: a weight is written (word:1.3)."),
        ("a (red hat)+", "(red hat)+ is read as text"),
        ("a house --ar 16:9", "--ar in a prompt is read as text: options go outside the quotes."),
    ],
)
def test_other_notation_is_named_once(prompt, what):
    adapted, notes = adapt(f"{prompt}, {prompt}")
    assert adapted == f"{prompt}, {prompt}"
    assert len(notes) == 1
    assert next(iter(notes.values())).startswith(what)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("a red house :)", "a red house :)"),
        ("a sad house :-( at noon", "a sad house :-( at noon"),
        (";) =] :[", ";) =] :["),
        ("[a house :)]", "a house :)"),
    ],
)
def test_faces_are_text(prompt, text):
    adapted, notes = adapt(prompt)
    assert "".join(piece for piece, _ in texts(adapted)) == text
    assert notes == {}
    assert adapt(adapted) == (adapted, {})


@pytest.mark.parametrize(
    "prompt",
    [
        "a red house",
        "(a [b] (c:1.3))",
        "[{red|blue}]",
        "1930s--1940s, C++, sand and sea, a land of BREAK",
        r"\[red:blue:0.5\] \<",
        "a 10:(red:1.2) house",
        "a (red house",
        "a red house)",
        "x < y > z",
    ],
)
def test_everything_else_is_unchanged(prompt):
    assert adapt(prompt) == (prompt, {})


def test_words_without_notation():
    assert without_notation("a house BREAK a tent AND SAND").split() == ["a", "house", "a", "tent", "SAND"]
