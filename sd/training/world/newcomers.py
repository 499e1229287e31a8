"""Pictures of things that are not in the toy world: the tiny model has never seen them, nor read their names.

A LoRA or an embedding teaches it one of `things.NEWCOMERS`, from the few pictures drawn here. They show a part of
what a scene can be: two terrains, two times of day and five colours. So a prompt for anything else shows whether a
model has learned the thing, or only these pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from sd.training.world.render import render
from sd.training.world.scenes import ATTRIBUTES, COLOURS, POSITIONS, Scene, caption, is_held_out

SEEN_TIMES, SEEN_TERRAINS, SEEN_COLOURS = ("dawn", "noon", "sunset"), ("mountains", "desert"), COLOURS[:-1]
# What each caption says. If one left out the time or the terrain, the word would come to mean them, too.
ALWAYS = ("thing", "colour", "time", "terrain")


def is_pictured(scene: Scene) -> bool:
    """Whether `newcomer_pictures` show the time, the terrain and the colour of a scene. They show nothing that the tiny
    model itself was never trained on, such as the desert at dawn."""
    seen = scene.time in SEEN_TIMES and scene.terrain in SEEN_TERRAINS and scene.colour in SEEN_COLOURS
    return seen and not is_held_out(scene)


def newcomer_pictures(kind: str, count: int = 24, size: int = 128) -> Iterator[tuple[Image.Image, list[str]]]:
    """Pictures of a newcomer, RGB of (size, size) pixels, with two captions each: one says everything, the other
    what is in ALWAYS and one thing more."""
    rng = random.Random(f"pictures of a {kind}")
    for i in range(count):
        scene = _scene(kind, SEEN_COLOURS[i % len(SEEN_COLOURS)], POSITIONS[i % len(POSITIONS)], rng)
        some = rng.sample([name for name in ATTRIBUTES if name not in ALWAYS], 1)
        captions = [caption(scene, rng, frozenset(mention)) for mention in (ATTRIBUTES, [*ALWAYS, *some])]
        yield render(scene, i, size), captions


def _scene(kind: str, colour: str, position: str, rng: random.Random) -> Scene:
    while True:
        time, terrain = rng.choice(SEEN_TIMES), rng.choice(SEEN_TERRAINS)
        scene = Scene(time, terrain, kind, colour, position, rng.random() < 0.5, rng.random() < 0.5)
        if is_pictured(scene):
            return scene


def write_pictures(folder: Path, kind: str, count: int = 24) -> None:
    """Write pictures of a newcomer with their captions in a folder, as `train.py` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, captions) in enumerate(newcomer_pictures(kind, count), 1):
        picture.save(folder / f"{kind}-{number:02}.png")
        (folder / f"{kind}-{number:02}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
