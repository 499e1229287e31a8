"""The toy world: what can be in a scene, and how captions describe it.

A seed gives a `Scene`, which has none, one or two things, and captions of it; `render` draws its image. Since a seed
decides everything, a range of seeds is a training set. A caption may leave out attributes, which then vary at random.
It never leaves out one of two things: after "a house", a model should draw one house and nothing else.

Some combinations of attributes are never trained on. To draw a purple house after training on red houses and purple
tents only, a model must combine what it has learned: remembering images is not enough.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

WORLD = 4  # a number for scenes, captions and renders together: when they change, so should this

TIMES = ("dawn", "noon", "sunset", "night")
TERRAINS = ("mountains", "hills", "desert", "sea", "snow")
THINGS = ("none", "house", "tree", "sailboat", "cactus", "balloon", "lighthouse", "tent")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
POSITIONS = ("left", "centre", "right")
ON_THE_GROUND = ("house", "tree", "cactus", "lighthouse", "tent")  # the things that can stand one behind the other


@dataclass(frozen=True)
class Thing:
    """A thing in a scene: one of `THINGS`, its colour, and its position."""

    kind: str
    colour: str
    position: str  # one of POSITIONS, or "behind": behind the first thing


@dataclass(frozen=True)
class Scene:
    """What an image shows. If `thing` is "none", `colour` and `position` have no meaning.

    Of two things, the first is on the left and the second on the right. Or the second is behind the first, and the
    first is then a little to the left or right of the middle.
    """

    time: str
    terrain: str
    thing: str
    colour: str
    position: str
    light: bool  # whether the sun, or at night the moon, is in the sky
    clouds: bool
    second: Thing | None = None

    @property
    def things(self) -> tuple[Thing, ...]:
        """The none, one or two things."""
        if self.thing == "none":
            return ()
        first = Thing(self.thing, self.colour, self.position)
        return (first, self.second) if self.second else (first,)

    @property
    def is_behind(self) -> bool:
        """Whether the second thing is behind the first."""
        return self.second is not None and self.second.position == "behind"

    @property
    def is_twice(self) -> bool:
        """Whether the two things are equal, as in "two yellow tents"."""
        return self.second is not None and (self.second.kind, self.second.colour) == (self.thing, self.colour)


ATTRIBUTES: dict[str, tuple] = {
    "time": TIMES,
    "terrain": TERRAINS,
    "thing": THINGS,
    "colour": COLOURS,
    "position": POSITIONS,
    "light": (False, True),
    "clouds": (False, True),
}
SECOND_COLOUR = "second colour"  # what captions of two things can also mention

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
# Two things that are never trained on in one scene, in any order.
HELD_OUT_TOGETHER = (("house", "cactus"), ("tree", "balloon"), ("sailboat", "tent"), ("lighthouse", "lighthouse"))


def is_held_out(scene: Scene, mention: frozenset[str] = frozenset([*ATTRIBUTES, SECOND_COLOUR])) -> bool:
    """Whether the scene shows one of the pairs in `HELD_OUT` or `HELD_OUT_TOGETHER`.

    With `mention`, only the attributes in it count: those that a caption mentions.
    """
    kinds = tuple(thing.kind for thing in scene.things)
    if "thing" in mention and (kinds in HELD_OUT_TOGETHER or kinds[::-1] in HELD_OUT_TOGETHER):
        return True
    for thing, colour in zip(scene.things or (None,), ("colour", SECOND_COLOUR)):
        values = {"time": scene.time, "terrain": scene.terrain}
        if thing:
            values |= {"thing": thing.kind, "colour": thing.colour}
        said = {name for name in values if (colour if name == "colour" else name) in mention}
        if any({a, b} <= said and values[a] == x and values[b] == y for a, x, b, y in HELD_OUT):
            return True
    return False


def random_scene(rng: random.Random, held_out: bool | None = False) -> Scene:
    """A random scene. `held_out`: False for training scenes, True for held-out ones, None for both."""
    while True:
        scene = Scene(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()})
        if scene.thing == "none" and rng.random() < 0.3:
            continue  # fewer empty landscapes: there is less to learn from them
        # Half of the other scenes have two things. With three quarters, the model began to draw one thing twice.
        if scene.thing != "none" and rng.random() < 0.5:
            scene = add_second(scene, rng)
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def add_second(scene: Scene, rng: random.Random, how: str | None = None) -> Scene:
    """The scene with a second thing. `how` is "beside", "behind", or "twice" for two equal things; or None for a random
    choice. Not every first thing can have another behind it: `how` is then "beside"."""
    how = how or rng.choice(("beside", "beside", "beside", "behind", "twice"))
    if how == "twice":
        return replace(scene, position="left", second=Thing(scene.thing, scene.colour, "right"))
    ground = how == "behind" and scene.thing in ON_THE_GROUND and scene.terrain != "sea"
    while True:
        kind = rng.choice(ON_THE_GROUND if ground else THINGS[1:])
        second = Thing(kind, rng.choice(COLOURS), "behind" if ground else "right")
        if (second.kind, second.colour) != (scene.thing, scene.colour):
            position = rng.choice(("left", "right")) if ground else "left"
            return replace(scene, position=position, second=second)


def exchange_colours(scene: Scene) -> Scene:
    """The scene with the colours of its two things exchanged."""
    return replace(scene, colour=scene.second.colour, second=replace(scene.second, colour=scene.colour))


def exchange_things(scene: Scene) -> Scene:
    """The scene with its two things exchanged: the first is then on the right, or behind."""
    first, second = scene.things
    second = replace(first, position=second.position)
    return replace(scene, thing=scene.second.kind, colour=scene.second.colour, second=second)


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
EMPTY_TERRAIN_WORDS = {
    "mountains": ("empty mountains", "an empty mountain landscape"),
    "hills": ("empty hills", "an empty green meadow"),
    "desert": ("an empty desert", "empty sand dunes"),
    "sea": ("an empty sea", "an empty ocean"),
    "snow": ("an empty snowy field", "an empty winter landscape"),
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
# How two things are described. {0} is the thing on the left or in front, {1} the other one.
AND_WORDS = ("{0} and {1}", "{0} and {1}", "{0} on the left and {1} on the right")
BESIDE_WORDS = (
    "{0} left of {1}",
    "{0} to the left of {1}",
    "{1} right of {0}",
    "{1} to the right of {0}",
)
BEHIND_WORDS = ("{0} in front of {1}", "{1} behind {0}")
NEAR_WORDS = ("{0} next to {1}", "{0} beside {1}")  # in either order
SUN_WORDS = {True: ("with the sun", "under the sun", "the sun is out"), False: ("without the sun", "no sun")}
MOON_WORDS = {True: ("with the moon", "under the moon", "in moonlight"), False: ("without the moon", "no moon")}
CLOUD_WORDS = {
    True: ("with clouds", "under a cloudy sky", "clouds in the sky"),
    False: ("without clouds", "under a clear sky", "no clouds"),
}
ARTICLES = ("a",) * 9 + ("",)
OPENINGS = ("", "", "", "a picture of ", "a painting of ", "a photo of ")


def thing_words(kind: str) -> tuple[str, ...]:
    """The wordings of a thing: for one of newcomers.py, its name."""
    return THING_WORDS.get(kind, (kind,))


def plural(words: str) -> str:
    """The plural of a wording in `THING_WORDS`."""
    return words.replace("cactus", "cacti") if words.endswith("cactus") else words + "s"


def caption(
    scene: Scene, rng: random.Random, mention: frozenset[str] | None = None, joined: tuple[str, ...] | None = None
) -> str:
    """A caption of the scene in random wording, such as "a red house on green hills at noon, on the left".

    `mention` lists the attributes to mention, or is None for a random choice. In a scene without a thing, colour and
    position are never mentioned. Two things are always mentioned. "colour" is then the colour of the first and
    `SECOND_COLOUR` that of the second, and "position" says which of them is on the left, or in front. `joined` are the
    wordings to choose from for that, such as `BESIDE_WORDS`; with None, all that fit, and keywords.
    """
    if mention is None:
        mention = random_mention(rng, scene)
    if scene.thing == "none" or "thing" not in mention:
        mention = mention - {"colour", "position"} or frozenset({"thing"})
    as_tags = joined is None and rng.random() < 0.15
    return _tags(scene, rng, mention) if as_tags else _sentence(scene, rng, mention, joined)


def random_mention(rng: random.Random, scene: Scene) -> frozenset[str]:
    """Random attributes to mention: all of them in 4 of 10 captions, and otherwise rather few than many.

    The colours of two things are in most captions: which colour belongs to which thing is the hardest to learn.
    """
    names = [*ATTRIBUTES, *([SECOND_COLOUR] if scene.second else [])]
    count = len(names) if rng.random() < 0.4 else rng.randint(1, rng.randint(1, len(names) - 1))
    mention = frozenset(rng.sample(names, count))
    if scene.second:
        colours = frozenset({"colour", SECOND_COLOUR} if rng.random() < 0.5 else ())
        return mention | colours | {"thing"} | ({"position"} if scene.is_behind or rng.random() < 0.5 else set())
    return mention | {"thing"} if rng.random() < 0.5 else mention


def _sentence(scene: Scene, rng: random.Random, mention: frozenset[str], joined: tuple[str, ...] | None) -> str:
    """A caption as a sentence: thing, then place and time in either order, then the rest in any order."""
    head, place = _head(scene, rng, mention, joined)
    time = [rng.choice(TIME_WORDS[scene.time])] if "time" in mention else []
    start = [part for part in [head, *rng.choice(([*place, *time], [*time, *place]))] if part]
    rest = []
    if "position" in mention and not scene.second:
        rest.append(rng.choice(POSITION_WORDS[scene.position]))
    if "light" in mention:
        rest.append(_light_words(scene, rng))
    if "clouds" in mention:
        rest.append(rng.choice(CLOUD_WORDS[scene.clouds]))
    rng.shuffle(rest)
    opening = rng.choice(OPENINGS) if head and not head.startswith("no") else ""  # no "photo of no house"
    return opening + ", ".join([*([" ".join(start)] if start else []), *rest])


def _head(
    scene: Scene, rng: random.Random, mention: frozenset[str], joined: tuple[str, ...] | None
) -> tuple[str, list[str]]:
    """The subject of a sentence and, if there are things, where they are: things in a place, or the place alone."""
    terrain = "terrain" in mention
    if "thing" in mention and scene.things:
        place = rng.choice(TERRAIN_WORDS[scene.terrain])
        if all(thing.kind == "balloon" for thing in scene.things) and rng.random() < 0.5:
            place = "over " + rng.choice(BARE_TERRAIN_WORDS[scene.terrain])
        article = rng.choice(ARTICLES)
        if scene.second:
            words = _two_things(scene, rng, mention, joined, article)
        else:
            words = _one_thing(scene, rng, mention, article)
        return words, [place] if terrain else []
    bare = rng.choice(BARE_TERRAIN_WORDS[scene.terrain]) if terrain else ""
    if "thing" in mention:
        other = rng.choice(THINGS[1:])
        empty = (f"nothing but {bare}", f"no {other}, only {bare}", rng.choice(EMPTY_TERRAIN_WORDS[scene.terrain]))
        return rng.choice(empty) if bare else rng.choice(("an empty landscape", f"a landscape without a {other}")), []
    return bare, []


def _one_thing(scene: Scene, rng: random.Random, mention: frozenset[str], article: str) -> str:
    """The thing, such as "a red house" or, now and then, "red house"."""
    words = rng.choice(thing_words(scene.thing))
    words = f"{scene.colour} {words}" if "colour" in mention else words
    words = rng.choice(("", "", "", "big ", "lonely ")) + words
    return f"{article} {words}".strip()


def _two_things(
    scene: Scene, rng: random.Random, mention: frozenset[str], joined: tuple[str, ...] | None, article: str
) -> str:
    """The two things, such as "a red house and a blue tree", "two tents" or "a tree behind a white house"."""
    colours = [thing.colour if name in mention else "" for thing, name in zip(scene.things, ("colour", SECOND_COLOUR))]
    if scene.thing == scene.second.kind and not scene.is_behind and (scene.is_twice or colours == ["", ""]):
        return " ".join(["two", *filter(None, colours[:1]), plural(rng.choice(thing_words(scene.thing)))])
    things = [
        " ".join(filter(None, [article, colour, rng.choice(thing_words(thing.kind))]))
        for thing, colour in zip(scene.things, colours)
    ]
    if scene.is_behind:
        return rng.choice(BEHIND_WORDS).format(*things)
    if "position" not in mention:
        rng.shuffle(things)
        return rng.choice(NEAR_WORDS).format(*things)
    return rng.choice(joined or (AND_WORDS + BESIDE_WORDS)).format(*things)


def _light_words(scene: Scene, rng: random.Random) -> str:
    """Whether the sun or moon is there. The word also shows whether it is night, even if the time is not mentioned."""
    return rng.choice((MOON_WORDS if scene.time == "night" else SUN_WORDS)[scene.light])


def _tags(scene: Scene, rng: random.Random, mention: frozenset[str]) -> str:
    """A caption as keywords in any order: "noon, red house, hills, left, clouds"."""
    tags = [getattr(scene, name) for name in ("time", "terrain") if name in mention]
    if "position" in mention and not scene.second:
        tags.append(scene.position)
    if "thing" in mention:
        if scene.second:
            tags.append(_two_things(scene, rng, mention, None, ""))
        else:
            thing = "empty" if scene.thing == "none" else rng.choice(thing_words(scene.thing))
            tags.append(f"{scene.colour} {thing}" if "colour" in mention else thing)
    light = "moon" if scene.time == "night" else "sun"
    if "light" in mention:
        tags.append(light if scene.light else f"no {light}")
    if "clouds" in mention:
        tags.append("clouds" if scene.clouds else "no clouds")
    rng.shuffle(tags)
    return ", ".join(tags)


def scene_and_captions(seed: int, captions: int = 6, held_out: bool | None = False) -> tuple[Scene, list[str]]:
    """The scene of a seed, and this number of captions of it. `render(scene, seed)` draws its image.

    Seeds come in pairs, 0 and 1, 2 and 3, ... If the scene of the first has two things, that of the second has the same
    two with their colours or places exchanged. Only their captions' order of words tells such scenes apart.
    """
    rng = random.Random(seed)
    scene = random_scene(rng, held_out)
    if seed % 2:
        other = random_scene(random.Random(seed - 1), held_out)
        if other.second and not other.is_twice:
            twin = rng.choice((exchange_colours, exchange_things))(other)
            if held_out is None or is_held_out(twin) == held_out:
                scene = twin
    return scene, [caption(scene, rng) for _ in range(captions)]
