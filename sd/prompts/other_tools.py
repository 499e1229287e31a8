r"""Notation of other tools. What has no effect here is made plain text, or left out, and a sentence says so.

<lora:name:0.8>                  a LoRA: `take_loras` takes it out of the prompt
<hypernet:name:1>                another file of additional weights: left out
[red:blue:0.5]  [red|blue]       prompt editing and alternation in the AUTOMATIC1111 web UI: read as text
AND  __name__  (word)++  --ar 1:1  read as text
:)  ;-(                          read as text, although the bracket has no partner
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sd.prompts.weights import LORA
from sd.tokenizer import MAX_CHARACTERS

HYPERNET = re.compile(r"(<hypernet:[^<>]*>)\s*", re.IGNORECASE)
SQUARE = re.compile(r"(?s)\\.|\[(?P<inside>(?:\\.|[^\\\[\]])*)\]")  # an escaped character, or innermost brackets
EDITING = re.compile(r":\s*[+-]?[.\d]+\s*\Z")
BRACKET = re.compile(r"(?s)\\.|(?P<eyes>[:;=]['^o-]?)?(?P<bracket>[()\[\]])")
PAIRS = {")": "(", "]": "["}
MAX_NESTED = 10  # brackets in brackets

# Text that means something to other tools, as patterns -> what to say about it.
AS_TEXT = {
    r"\bAND\b": "{} is read as a word: prompts are not combined.",
    r"\b__[\w/*-]{1,100}__\b": "{} is read as text: wildcard files are not supported; write {{red|blue}}.",
    r"\b\w{3,}\+\++|\([^()]*\)\++": "{} is read as text: a weight is written (word:1.3).",
    r"(?<!\S)--[a-z][\w-]*": "{} in a prompt is read as text: options go outside the quotes.",
}


def adapt(prompt: str) -> tuple[str, dict[str, str]]:
    """The prompt as `weights.parse` should get it, and a sentence for each kind of notation that has no effect.

    A prompt that is too long for `parse` is unchanged.
    """
    notes: dict[str, str] = {}
    if len(prompt) > MAX_CHARACTERS:
        return prompt, notes

    def left_out(match: re.Match) -> str:
        notes.setdefault("file", f"{match[1]} is left out: hypernetwork files are not supported.")
        return between(match)

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

    prompt = HYPERNET.sub(left_out, prompt)
    for _ in range(MAX_NESTED):  # from the innermost brackets outwards
        prompt = SQUARE.sub(square, prompt)
    for pattern, sentence in AS_TEXT.items():
        if match := re.search(pattern, prompt):
            notes[pattern] = sentence.format(match[0])
    return _escape_faces(prompt), notes


class LoraTag(NamedTuple):
    """A <lora:...> in a prompt: the name of a file without its suffix, and its strengths in the two networks."""

    text: str
    name: str
    unet: float
    te: float  # in the text encoder


def take_loras(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without its <lora:...>, and what these say.

    One number is the strength in both networks. Of two, the first is for the text encoder, as in the AUTOMATIC1111 web
    UI; <lora:name:unet=0.8:te=0.6> says which is which. Raises ValueError for anything else behind the name.
    """
    tags = [_lora_tag(match) for match in LORA.finditer(prompt)]
    return LORA.sub(between, prompt).strip() if tags else prompt, tags


def between(tag: re.Match) -> str:
    """What stays where a tag is taken out with the blanks behind it: one of them, or two words would become one."""
    before = tag.string[: tag.start()]
    return tag[0][-1] if tag[0][-1].isspace() and before and not before[-1].isspace() else ""


def lora_tag(name: str, unet: float, te: float) -> str:
    """The inverse of `take_loras` for one LoRA."""
    unet, te = (str(number).removesuffix(".0") for number in (unet, te))
    name = re.sub(r"[<>:]", "_", name)
    return f"<lora:{name}:{unet}>" if unet == te else f"<lora:{name}:unet={unet}:te={te}>"


def _lora_tag(match: re.Match) -> LoraTag:
    text = match[0].strip()
    name, *values = (part.strip() for part in match[1].split(":"))
    numbers: dict[str, float] = {}
    for position, value in enumerate(values):
        key, _, number = value.rpartition("=")
        key = key.strip().lower() or ("te", "unet", "")[min(position, 2)]
        try:
            numbers[key] = float(number)
        except ValueError:
            name = ""
    if not name or numbers.keys() - {"te", "unet"}:
        raise ValueError(f"prompt should have LoRAs like <lora:name:0.8> or <lora:name:unet=0.8:te=0.6>, not {text}.")
    te = numbers.get("te", 1.0)
    return LoraTag(text, name, numbers.get("unet", te), te)


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
