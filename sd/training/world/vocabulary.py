"""The words of the training captions: which words of a prompt are not among them, and the text of `demo.py --world`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sd.training.world import scenes

if TYPE_CHECKING:
    from sd.models import Models

WORDINGS: dict[str, dict] = {
    "time": scenes.TIME_WORDS,
    "place": scenes.TERRAIN_WORDS,
    "thing": scenes.THING_WORDS,
    "position": scenes.POSITION_WORDS,
    "sun": scenes.SUN_WORDS,
    "moon (at night)": scenes.MOON_WORDS,
    "clouds": scenes.CLOUD_WORDS,
}
TWO_THINGS = scenes.AND_WORDS + scenes.BESIDE_WORDS + scenes.BEHIND_WORDS + scenes.NEAR_WORDS
SMALL_WORDS = (
    "a an of but only no two big empty landscape lonely over photo picture painting sun moon winter seascape hilly "
    "meadow"
)

EXAMPLES = (
    "a red house on green hills at noon, on the left, with clouds",
    "a red house and a yellow tree at night",
    "an empty desert",
)


def known_words() -> frozenset[str]:
    """Every word of the training captions."""
    groups = [*WORDINGS.values(), scenes.BARE_TERRAIN_WORDS, scenes.EMPTY_TERRAIN_WORDS]
    phrases = [phrase for group in groups for wordings in group.values() for phrase in wordings]
    things = [scenes.plural(phrase) for thing in scenes.THINGS[1:] for phrase in scenes.THING_WORDS[thing]]
    values = [value for values in scenes.ATTRIBUTES.values() for value in values if isinstance(value, str)]
    joined = [words.format("", "") for words in TWO_THINGS]
    return frozenset(" ".join([*phrases, *things, *values, *joined, SMALL_WORDS]).split())


def unknown_words(prompt: str, models: Models | None = None) -> list[str]:
    """The words of a prompt that are in no training caption, in order and once each.

    With `models`, also words that these were not trained on, such as those of a later version of the toy world:
    training sets the embeddings of tokens that never occur to zero.
    """
    words, known = re.findall(r"[^\W\d_]+", prompt.lower()), known_words()
    return [word for word in dict.fromkeys(words) if word not in known or (models and not _has_meaning(word, models))]


def _has_meaning(word: str, models: Models) -> bool:
    rows = models.clip.token_embedding.weight[models.tokenizer.encode(word)]  # (n, width)
    return bool(rows.any())


def describe() -> str:
    """What the tiny model draws, in a dozen lines: how to ask for it, and examples."""
    lines = [
        "The tiny model draws landscapes of 128 x 128 pixels with none, one or two things. A prompt can mention:",
        "",
    ]
    lines.append(f"  {'colour':<16} {', '.join(scenes.COLOURS)}")
    for name, group in WORDINGS.items():
        wordings = ", ".join(words[0] for value, words in group.items() if value != "none")
        lines.append(f"  {name:<16} {wordings}")
    ways = (scenes.AND_WORDS, scenes.BESIDE_WORDS, scenes.BEHIND_WORDS, scenes.NEAR_WORDS)
    two = [wordings[0].format("a house", "a tree") for wordings in ways]
    lines.append(f"  {'two things':<16} {', '.join(two)}, two tents")
    lines += ["", "For example:"]
    lines += [f'  "{example}"' for example in EXAMPLES]
    lines.append("The seed decides what a prompt does not mention. Unknown words are ignored.")
    return "\n".join(lines)
