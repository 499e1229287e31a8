"""A prompt with alternatives in braces -> all combinations of them.

"a {red|blue} house at {noon|night}"  ->  "a red house at noon", "a red house at night", "a blue house at noon", ...
"""

from __future__ import annotations

import itertools
import math
import re

GROUP = re.compile(r"\{([^{}]*)\}")
MAX_PROMPTS = 1000


def expand(prompt: str) -> list[str]:
    """All combinations of the alternatives. The last group changes fastest. An alternative may be empty.

    Raises ValueError for unbalanced or nested braces, and for more than 1000 combinations.
    """
    parts = GROUP.split(prompt)  # text, group, text, ..., group, text
    if any("{" in text or "}" in text for text in parts[::2]):
        raise ValueError(
            f"prompt should have its alternatives in single braces, as in a {{red|blue}} house, not {prompt!r}."
        )
    if len(parts) == 1:
        return parts
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    count = math.prod(map(len, choices))
    if count > MAX_PROMPTS:
        raise ValueError(f"prompt should stand for at most {MAX_PROMPTS} prompts, not {count}.")
    # split and join: an empty alternative leaves two blanks side by side
    return [" ".join("".join(chosen).split()) for chosen in itertools.product(*choices)]
