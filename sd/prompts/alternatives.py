r"""A prompt with alternatives in braces -> all combinations of them.

"a {red|blue} house at {noon|night}"  ->  "a red house at noon", "a red house at night", "a blue house at noon", ...

\{ and \} are the braces themselves, and \| in braces is the bar itself. Other backslashes are left to `weights`.
"""

from __future__ import annotations

import itertools
import math
import re

PART = re.compile(r"(?s)\{(?P<group>(?:\\.|[^\\{}])*)\}|(?P<text>(?:\\.|[^\\{}]|\\\Z)+)")
BAR = re.compile(r"(?<!\\)\|")
ESCAPED = re.compile(r"(?s)\\(.)")
MAX_PROMPTS = 1000


def expand(prompt: str) -> list[str]:
    """All combinations of the alternatives. The last group changes fastest. An alternative may be empty.

    Raises ValueError for unbalanced or nested braces, and for more than 1000 combinations.
    """
    if PART.sub("", prompt):
        raise ValueError(
            f"prompt should have its alternatives in single braces, as in a {{red|blue}} house, not {prompt!r}; "
            r"write \{ for the brace itself."
        )
    parts = list(PART.finditer(prompt))
    if all(part["text"] for part in parts):
        return [_unescape(prompt, "{}")]
    choices = []
    for part in parts:
        texts = [part["text"]] if part["text"] else BAR.split(part["group"])
        choices.append([_unescape(text, "{}" if part["text"] else "{}|") for text in texts])
    count = math.prod(map(len, choices))
    if count > MAX_PROMPTS:
        raise ValueError(f"prompt should stand for at most {MAX_PROMPTS} prompts, not {count}.")
    # split and join: an empty alternative leaves two blanks side by side
    return [" ".join("".join(chosen).split()) for chosen in itertools.product(*choices)]


def escape(prompt: str) -> str:
    """The inverse of `expand` for one prompt: its braces with backslashes, except where they have one."""
    return re.sub(r"(?s)(\\.)|([{}])", lambda match: match[1] or f"\\{match[2]}", prompt)


def without_alternatives(prompt: str) -> str | None:
    """The first group of braces without a bar, such as "{red}". None if there is none. {} does not count."""
    return next((part[0] for part in PART.finditer(prompt) if part["group"] and not BAR.search(part["group"])), None)


def _unescape(text: str, characters: str) -> str:
    return ESCAPED.sub(lambda match: match[1] if match[1] in characters else match[0], text)
