"""Alternatives in braces."""

import pytest

from sd.prompts.alternatives import escape, expand, without_alternatives


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("a house", ["a house"]),
        (" left  as | it is ", [" left  as | it is "]),
        ("", [""]),
        ("a {red|blue} house", ["a red house", "a blue house"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("{one}", ["one"]),
        ("a {|big|very big} house", ["a house", "a big house", "a very big house"]),
        ("light{house|ship}", ["lighthouse", "lightship"]),
        ("({red | blue}:1.3)", ["(red :1.3)", "( blue:1.3)"]),
        (r"a \{red\} house", ["a {red} house"]),
        (r"a {\{red\}|blue\|green} house", ["a {red} house", "a blue|green house"]),
        (r"a \(red\| {one|two} \\", [r"a \(red\| one \\", r"a \(red\| two \\"]),
        ("{a\\\\|b}", ["a\\\\|b"]),
        ("{a|b}\\", ["a\\", "b\\"]),
    ],
)
def test_every_combination(prompt, prompts):
    assert expand(prompt) == prompts


@pytest.mark.parametrize("prompt", ["a {red|blue", "a red|blue}", "{a|{b|c}}", "}a{", "{{red}}", r"{a\}", r"\{a}"])
def test_bad_braces(prompt):
    with pytest.raises(ValueError, match="prompt should have its alternatives in single braces") as caught:
        expand(prompt)
    assert repr(prompt) in str(caught.value)


@pytest.mark.parametrize("prompt", ["{red}", r"\{red\}", "}{", r"{\(a|b\)}\\", "\\{", "(a:1.2) {b|c} {"])
def test_escape_is_the_inverse_of_expand(prompt):
    """Except that the notation of weights reads an escaped brace as a brace, too."""
    assert expand(escape(prompt)) == [prompt.replace(r"\{", "{").replace(r"\}", "}")]


@pytest.mark.parametrize(
    "prompt, group",
    [("a {red} house", "{red}"), ("{a|b} {c}", "{c}"), ("{}-x", None), (r"\{red\}", None), ("{a|b}", None)],
)
def test_braces_without_alternatives(prompt, group):
    assert without_alternatives(prompt) == group


def test_at_most_1000_combinations():
    assert len(expand("{0|1|2|3|4|5|6|7|8|9}" * 3)) == 1000
    with pytest.raises(ValueError, match="prompt should stand for at most 1000 prompts, not 1099511627776."):
        expand("{0|1}" * 40)
