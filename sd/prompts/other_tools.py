r"""Notation of other tools that has no effect here: it is made plain text, or left out, and a sentence says so.

[red:blue:0.5]  [red|blue]       prompt editing and alternation in the AUTOMATIC1111 web UI: read as text
<lora:name:1>  <hypernet:name:1>  files of additional weights: left out
AND  __name__  (word)++  --ar 1:1  read as text
:)  ;-(                          read as text, although the bracket has no partner
"""

from __future__ import annotations

import re

FILES = re.compile(r"(<(?:lora|lyco|lycoris|hypernet):[^<>]*>)\s*", re.IGNORECASE)
SQUARE = re.compile(r"(?s)\\.|\[(?P<inside>(?:\\.|[^\\\[\]])*)\]")  # an escaped character, or innermost brackets
EDITING = re.compile(r":\s*[+-]?[.\d]+\s*\Z")
BRACKET = re.compile(r"(?s)\\.|(?P<eyes>[:;=]['^o-]?)?(?P<bracket>[()\[\]])")
PAIRS = {")": "(", "]": "["}

# Text that means something to other tools, as patterns -> what to say about it.
AS_TEXT = {
    r"\bAND\b": "{} is read as a word: prompts are not combined.",
    r"\b__[\w/*-]+__\b": "{} is read as text: wildcard files are not supported; write {{red|blue}}.",
    r"\w{3,}\+\++|\([^()]*\)\++": "{} is read as text: a weight is written (word:1.3).",
    r"(?<!\S)--[a-z][\w-]*": "{} in a prompt is read as text: options go outside the quotes.",
}


def adapt(prompt: str) -> tuple[str, dict[str, str]]:
    """The prompt as `weights.parse` should get it, and a sentence for each kind of notation that has no effect."""
    notes: dict[str, str] = {}

    def left_out(match: re.Match) -> str:
        notes.setdefault("file", f"{match[1]} is left out: LoRA and hypernetwork files are not supported.")
        return ""

    def square(match: re.Match) -> str:
        inside = match["inside"]
        if inside is None:
            return match[0]
        shown = match[0].replace("\\[", "[").replace("\\]", "]")
        if EDITING.search(inside):
            remedy = "prompts do not change between steps; a weight is written (word:1.3)"
            notes.setdefault("editing", f"{shown} is read as text: {remedy}.")
        elif "|" in re.sub(r"\{[^{}]*\}", "", inside):  # {red|blue} in brackets is something else
            remedy = "prompts do not change between steps; {red|blue} draws a picture of each"
            notes.setdefault("alternation", f"{shown} is read as text: {remedy}.")
        else:
            return match[0]
        return rf"\[{inside}\]"

    prompt = FILES.sub(left_out, prompt)
    while (changed := SQUARE.sub(square, prompt)) != prompt:  # from the innermost brackets outwards
        prompt = changed
    for pattern, sentence in AS_TEXT.items():
        if match := re.search(pattern, prompt):
            notes[pattern] = sentence.format(match[0])
    return _escape_faces(prompt), notes


def without_notation(prompt: str) -> str:
    """The words of a prompt that `adapt` has adapted, without BREAK and AND."""
    return re.sub(r"\b(?:BREAK|AND)\b", " ", prompt)


def _escape_faces(prompt: str) -> str:
    """Puts a backslash before each bracket of a :) or ;-( that has no partner."""
    opened: list[re.Match] = []
    unpaired: list[int] = []
    for match in BRACKET.finditer(prompt):
        bracket = match["bracket"]
        if bracket in PAIRS.values():
            opened.append(match)
        elif bracket and opened and opened[-1]["bracket"] == PAIRS[bracket]:
            opened.pop()
        elif bracket and match["eyes"]:
            unpaired.append(match.start("bracket"))
    unpaired += [match.start("bracket") for match in opened if match["eyes"]]
    for position in sorted(unpaired, reverse=True):
        prompt = f"{prompt[:position]}\\{prompt[position:]}"
    return prompt
