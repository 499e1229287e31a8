"""The words of the training captions: which words of a prompt are not among them, and the text of `demo.py --world`."""

import re

from sd.training.world import scenes

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
TWO_EXAMPLES = ("{0} and {1}", "{0} left of {1}", "{1} right of {0}", *scenes.BEHIND_WORDS, "{0} next to {1}")
SMALL_WORDS = (
    "a an of but only no two big empty landscape lonely over photo picture painting sun moon winter seascape hilly "
    "meadow"
)


def known_words() -> frozenset[str]:
    """Every word of the training captions."""
    groups = [*WORDINGS.values(), scenes.BARE_TERRAIN_WORDS, scenes.EMPTY_TERRAIN_WORDS]
    phrases = [phrase for group in groups for wordings in group.values() for phrase in wordings]
    things = [scenes.plural(phrase) for thing in scenes.THINGS[1:] for phrase in scenes.THING_WORDS[thing]]
    values = [value for values in scenes.ATTRIBUTES.values() for value in values if isinstance(value, str)]
    joined = [words.format("", "") for words in TWO_THINGS]
    return frozenset(" ".join([*phrases, *things, *values, *joined, SMALL_WORDS]).split())


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that are in no training caption, in order and once each."""
    words, known = re.findall(r"[^\W\d_]+", prompt.lower()), known_words()
    return list(dict.fromkeys(word for word in words if word not in known))


def describe() -> str:
    """The toy world in a dozen lines: what can be in an image, how to ask for it, and examples."""
    lines = ["The tiny model draws landscapes of 128 x 128 pixels with up to two things in them. A prompt can mention:"]
    lines += ["", f"  {'colour':<16} {', '.join(scenes.COLOURS)}"]
    for name, group in WORDINGS.items():
        wordings = ", ".join(words[0] for value, words in group.items() if value != "none")
        lines.append(f"  {name:<16} {wordings}")
    lines.append(f"  {'two things':<16} {', '.join(words.format('A', 'B') for words in TWO_EXAMPLES)}, two tents")
    lines += ["", 'For example: "a red house on green hills at noon, on the left, with clouds", "a tent at night",']
    lines.append('"a red house and a blue tree", "two yellow tents by the sea", "no house, only green hills".')
    lines.append("The seed decides what a prompt does not mention. Unknown words are ignored.")
    return "\n".join(lines)
