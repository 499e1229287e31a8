"""Notation of other tools: it works, or one sentence says what becomes of it."""

import time

import pytest

from sd.prompts.other_tools import LoraTag, adapt, lora_tag, take_loras, without_notation
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


def test_hypernetworks_are_left_out():
    for prompt in ("<hypernet:x:1> a red house", "a red <hypernet:x:1> house", "a red house<hypernet:x:1>"):
        adapted, notes = adapt(prompt)
        assert adapted == "a red house"
        assert list(notes.values()) == ["<hypernet:x:1> is left out: hypernetwork files are not supported."]
    assert adapt("a red<hypernet:x:1>\nhouse")[0] == "a red\nhouse"


@pytest.mark.parametrize(
    "tag, name, unet, te",
    [
        ("<lora:style:0.8>", "style", 0.8, 0.8),
        ("<LORA:a b>", "a b", 1, 1),
        ("<lyco:x:1:2>", "x", 2, 1),  # the text encoder's is first, as in the web UI
        ("<lora:x:-.5>", "x", -0.5, -0.5),
        ("<lora:x:unet=0.3:te=0.6>", "x", 0.3, 0.6),
        ("<lora:x:0.6:unet=0.3>", "x", 0.3, 0.6),
        ("<lora: x : TE = 0.6 >", "x", 0.6, 0.6),
    ],
)
def test_loras_are_taken_out(tag, name, unet, te):
    for prompt in (f"{tag} a red house", f"a red {tag} house", f"a red house{tag}", f"a red house {tag}"):
        assert adapt(prompt) == (prompt, {})
        assert take_loras(prompt) == ("a red house", [LoraTag(tag, name, unet, te)])
    assert take_loras(lora_tag(name, unet, te))[1][0][1:] == (name, unet, te)


def test_words_beside_a_tag_stay_apart():
    assert take_loras("a cat<lora:x:1> sitting")[0] == "a cat sitting"
    assert take_loras("a cat<lora:x:1>\nsitting")[0] == "a cat\nsitting"
    assert take_loras("a cat<lora:x:1>, sitting")[0] == "a cat, sitting"
    assert take_loras("a cat <lora:x:1> <lora:y:1> sitting")[0] == "a cat sitting"


def test_several_loras_and_none():
    words, tags = take_loras("<lora:a:1> a house, <lora:b:0.5>, <lora:a:1>")
    assert (words, [tag.name for tag in tags]) == ("a house, ,", ["a", "b", "a"])
    assert take_loras(" a <house> ") == (" a <house> ", [])
    assert lora_tag("a:b<c>", 1.0, 0.5) == "<lora:a_b_c_:unet=1:te=0.5>"


@pytest.mark.parametrize("tag", ["<lora:x:much>", "<lora:x:1:2:3>", "<lora::1>", "<lora:x:1:lbw=0.5>", "<lora:>"])
def test_loras_with_other_values(tag):
    with pytest.raises(ValueError, match="prompt should have LoRAs like <lora:name:0.8> or .*, not " + tag):
        take_loras(f"a {tag}")


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


@pytest.mark.parametrize("start, middle, end", [("[", "a|b", "]"), ("a", "", "a"), ("__a/", "", "/__a")])
def test_a_long_prompt_is_quick(start, middle, end):
    """Of 10,000 characters, the most that a prompt may have. Quadratic time was a second, and cubic time five."""
    began = time.process_time()
    count = (10_000 - len(middle)) // len(start + end)
    adapt(start * count + middle + end * count)
    assert time.process_time() - began < 0.4


def test_a_prompt_that_is_too_long_is_left_to_the_parser():
    prompt = "[a|b]" * 100_000
    assert adapt(prompt) == (prompt, {})


def test_words_without_notation():
    assert without_notation("a house BREAK a tent AND SAND").split() == ["a", "house", "a", "tent", "SAND"]
