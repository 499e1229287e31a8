"""Alternatives in braces."""

import pytest

from sd.prompts.alternatives import expand


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
    ],
)
def test_every_combination(prompt, prompts):
    assert expand(prompt) == prompts


@pytest.mark.parametrize("prompt", ["a {red|blue", "a red|blue}", "{a|{b|c}}", "}a{"])
def test_bad_braces(prompt):
    with pytest.raises(ValueError, match="prompt should have its alternatives in single braces") as caught:
        expand(prompt)
    assert repr(prompt) in str(caught.value)


def test_at_most_1000_combinations():
    assert len(expand("{0|1|2|3|4|5|6|7|8|9}" * 3)) == 1000
    with pytest.raises(ValueError, match="prompt should stand for at most 1000 prompts, not 1099511627776."):
        expand("{0|1}" * 40)
