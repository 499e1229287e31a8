"""The toy world: what can be in a scene, and how captions describe it.

A seed gives a `Scene`, which has seven attributes, and captions of it; `render` draws its image. Since a seed decides
everything, a range of seeds is a training set. A caption may leave out attributes, which then vary at random.

Some combinations of attributes are never trained on. To draw a purple house after training on red houses and purple
tents only, a model must combine what it has learned: remembering images is not enough.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

TIMES = ("dawn", "noon", "sunset", "night")
TERRAINS = ("mountains", "hills", "desert", "sea", "snow")
THINGS = ("none", "house", "tree", "sailboat", "cactus", "balloon", "lighthouse", "tent")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
POSITIONS = ("left", "centre", "right")


@dataclass(frozen=True)
class Scene:
    """What an image shows. If `thing` is "none", `colour` and `position` have no meaning."""

    time: str
    terrain: str
    thing: str
    colour: str
    position: str
    light: bool  # whether the sun, or at night the moon, is in the sky
    clouds: bool


ATTRIBUTES: dict[str, tuple] = {
    "time": TIMES,
    "terrain": TERRAINS,
    "thing": THINGS,
    "colour": COLOURS,
    "position": POSITIONS,
    "light": (False, True),
    "clouds": (False, True),
}

# Pairs of values that are never trained on, to test composition: (attribute, value, attribute, value).
HELD_OUT: tuple[tuple[str, str, str, str], ...] = (
    ("thing", "house", "colour", "purple"),
    ("thing", "tree", "colour", "blue"),
    ("thing", "sailboat", "colour", "green"),
    ("thing", "cactus", "colour", "yellow"),
    ("thing", "balloon", "colour", "white"),
    ("thing", "tent", "colour", "red"),
    ("terrain", "desert", "time", "dawn"),
    ("terrain", "snow", "time", "sunset"),
    ("thing", "lighthouse", "terrain", "hills"),
    ("thing", "tent", "terrain", "sea"),
)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows one of the pairs in `HELD_OUT`."""
    return any(getattr(scene, a) == x and getattr(scene, b) == y for a, x, b, y in HELD_OUT)


def random_scene(rng: random.Random, held_out: bool | None = False) -> Scene:
    """A random scene. `held_out`: False for training scenes, True for held-out ones, None for both."""
    while True:
        scene = Scene(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()})
        if scene.thing == "none" and rng.random() < 0.3:
            continue  # fewer empty landscapes: there is less to learn from them
        if held_out is None or is_held_out(scene) == held_out:
            return scene


# The wordings of each value. The first one is the plainest.
TIME_WORDS = {
    "dawn": ("at dawn", "at sunrise", "early in the morning"),
    "noon": ("at noon", "by day", "at midday", "in daylight"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
    "night": ("at night", "late at night", "by night"),
}
TERRAIN_WORDS = {
    "mountains": ("in the mountains", "in front of mountains", "in a mountain valley"),
    "hills": ("on green hills", "on the hills", "on a green hill", "in a green meadow"),
    "desert": ("in the desert", "in a sandy desert", "among sand dunes"),
    "sea": ("at sea", "by the sea", "in the ocean", "on the water"),
    "snow": ("in the snow", "in a snowy field", "in winter"),
}
BARE_TERRAIN_WORDS = {
    "mountains": ("mountains", "a mountain landscape"),
    "hills": ("green hills", "a hilly landscape", "a green meadow"),
    "desert": ("a desert", "the desert", "sand dunes"),
    "sea": ("the sea", "the ocean", "a seascape"),
    "snow": ("snow", "a snowy field", "a winter landscape"),
}
THING_WORDS = {
    "none": ("nothing",),
    "house": ("house", "cottage"),
    "tree": ("tree",),
    "sailboat": ("sailboat", "boat", "sailing boat"),
    "cactus": ("cactus",),
    "balloon": ("balloon", "hot air balloon"),
    "lighthouse": ("lighthouse",),
    "tent": ("tent", "camping tent"),
}
POSITION_WORDS = {
    "left": ("on the left", "on the left side", "to the left"),
    "centre": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right side", "to the right"),
}
SUN_WORDS = {True: ("with the sun", "under the sun", "the sun is out"), False: ("without the sun", "no sun")}
MOON_WORDS = {True: ("with the moon", "under the moon", "in moonlight"), False: ("without the moon", "no moon")}
CLOUD_WORDS = {
    True: ("with clouds", "under a cloudy sky", "clouds in the sky"),
    False: ("without clouds", "under a clear sky", "no clouds"),
}
OPENINGS = ("", "", "", "a picture of ", "a painting of ", "a photo of ")


def caption(scene: Scene, rng: random.Random, mention: frozenset[str] | None = None) -> str:
    """A caption of the scene in random wording, such as "a red house on green hills at noon, on the left".

    `mention` lists the attributes to mention, or is None for a random choice. In a scene without a thing, colour and
    position are never mentioned.
    """
    if mention is None:
        mention = _random_mention(rng)
    if scene.thing == "none" or "thing" not in mention:
        mention = mention - {"colour", "position"} or frozenset({"thing"})
    return _tags(scene, rng, mention) if rng.random() < 0.15 else _sentence(scene, rng, mention)


def _random_mention(rng: random.Random) -> frozenset[str]:
    """Random attributes to mention: all of them in half of the captions, some or few in the others."""
    chance = rng.choice((1.0, 1.0, 0.75, 0.4))
    return frozenset(name for name in ATTRIBUTES if rng.random() < chance) or frozenset({"thing"})


def _sentence(scene: Scene, rng: random.Random, mention: frozenset[str]) -> str:
    """A caption as a sentence: thing, then place and time in either order, then the rest in any order."""
    head, place = _head(scene, rng, mention)
    time = [rng.choice(TIME_WORDS[scene.time])] if "time" in mention else []
    start = [part for part in [head, *rng.choice(([*place, *time], [*time, *place]))] if part]
    rest = []
    if "position" in mention:
        rest.append(rng.choice(POSITION_WORDS[scene.position]))
    if "light" in mention:
        rest.append(_light_words(scene, rng))
    if "clouds" in mention:
        rest.append(rng.choice(CLOUD_WORDS[scene.clouds]))
    rng.shuffle(rest)
    opening = rng.choice(OPENINGS) if head else ""
    return opening + ", ".join([*([" ".join(start)] if start else []), *rest])


def _head(scene: Scene, rng: random.Random, mention: frozenset[str]) -> tuple[str, list[str]]:
    """The subject of a sentence and, if it is a thing, where it is: a thing in a place, or the place alone."""
    terrain = "terrain" in mention
    if "thing" in mention and scene.thing != "none":
        words = rng.choice(THING_WORDS[scene.thing])
        words = f"{scene.colour} {words}" if "colour" in mention else words
        words = rng.choice(("", "", "", "big ", "lonely ")) + words
        place = rng.choice(TERRAIN_WORDS[scene.terrain])
        if scene.thing == "balloon" and rng.random() < 0.5:
            place = "over " + rng.choice(BARE_TERRAIN_WORDS[scene.terrain])
        return f"a {words}", [place] if terrain else []
    bare = rng.choice(BARE_TERRAIN_WORDS[scene.terrain]) if terrain else ""
    if "thing" in mention:
        return (f"nothing but {bare}" if bare else "an empty landscape"), []
    return bare, []


def _light_words(scene: Scene, rng: random.Random) -> str:
    """Whether the sun or moon is there. The word also shows whether it is night, even if the time is not mentioned."""
    return rng.choice((MOON_WORDS if scene.time == "night" else SUN_WORDS)[scene.light])


def _tags(scene: Scene, rng: random.Random, mention: frozenset[str]) -> str:
    """A caption as keywords in any order: "noon, red house, hills, left, clouds"."""
    tags = [getattr(scene, name) for name in ("time", "terrain", "position") if name in mention]
    if "thing" in mention:
        thing = "empty" if scene.thing == "none" else rng.choice(THING_WORDS[scene.thing])
        tags.append(f"{scene.colour} {thing}" if "colour" in mention else thing)
    light = "moon" if scene.time == "night" else "sun"
    if "light" in mention:
        tags.append(light if scene.light else f"no {light}")
    if "clouds" in mention:
        tags.append("clouds" if scene.clouds else "no clouds")
    rng.shuffle(tags)
    return ", ".join(tags)


def scene_and_captions(seed: int, captions: int = 6, held_out: bool | None = False) -> tuple[Scene, list[str]]:
    """The scene of a seed, and this number of captions of it. `render(scene, seed)` draws its image."""
    rng = random.Random(seed)
    scene = random_scene(rng, held_out)
    return scene, [caption(scene, rng) for _ in range(captions)]
