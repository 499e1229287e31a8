"""Draw a scene: sky, sun or moon, clouds, land or sea, and the things in it.

The seed decides what the `Scene` does not say, such as the exact position of the sun, the shape of the hills and the
size of the things. The same scene, seed and size always give the same image.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image

from sd.training.world.canvas import UNITS, Canvas, Colour, Point, mix, tint
from sd.training.world.scenes import Scene, Thing
from sd.training.world.things import DRAW, NEWCOMERS, WHITE, Brush

SKIES: dict[str, list[Colour]] = {
    "dawn": [(142, 160, 222), (214, 186, 226), (255, 200, 204), (255, 232, 206)],
    "noon": [(52, 136, 228), (104, 178, 242), (172, 216, 250), (224, 242, 252)],
    "sunset": [(70, 44, 112), (176, 66, 104), (244, 118, 66), (255, 196, 92)],
    "night": [(8, 10, 38), (16, 22, 62), (32, 42, 92), (58, 70, 128)],
}
# The colour of the light on the land. The light on things is closer to white, so that their colours stay recognisable.
LAND_LIGHT = {"dawn": (1.0, 0.9, 0.95), "noon": (1, 1, 1), "sunset": (0.92, 0.68, 0.64), "night": (0.36, 0.4, 0.66)}
THING_LIGHT = {"dawn": (1.0, 0.96, 0.98), "noon": (1, 1, 1), "sunset": (0.97, 0.9, 0.88), "night": (0.86, 0.86, 0.96)}
SUNS = {"dawn": (255, 246, 176), "noon": (255, 246, 160), "sunset": (255, 240, 170), "night": (250, 246, 224)}
GLOWS = {"dawn": (255, 238, 180), "noon": (255, 252, 214), "sunset": (255, 214, 120), "night": (150, 164, 220)}
CLOUDS = {"dawn": (255, 236, 236), "noon": (255, 255, 255), "sunset": (255, 176, 140), "night": (84, 94, 146)}
SEAS = {"dawn": (130, 160, 200), "noon": (36, 120, 196), "sunset": (120, 70, 116), "night": (22, 34, 86)}
MIDDLES = {"left": 31, "centre": 64, "right": 97}
# The sun or moon is between two things, and on the left of one, unless the thing is on the left. If it could be on
# either side, a model would often draw it on both.
SUN_LEFT, SUN_RIGHT = 20, 108
DEPTH = 14  # a thing in front and one behind it are this far to the left and right of their middle

HORIZON = 76


@dataclass(frozen=True)
class Spot:
    """Where a thing is: the middle of its foot, (x, y) on the canvas, and its scale."""

    x: float
    y: float
    scale: float


@dataclass(frozen=True)
class Drawing:
    """An image, and where things and lights are in it."""

    image: Image.Image
    spots: list[Spot]  # of the scene's things
    lights: list[Point]  # the middles of suns or moons
    clouds: int  # their number


def render(scene: Scene, seed: int, size: int = 128) -> Image.Image:
    """Draw a scene: a PIL image, RGB, (size, size) pixels."""
    return draw(scene, seed, size).image


def draw(
    scene: Scene,
    seed: int,
    size: int = 128,
    things: list[tuple[Thing, Spot]] | None = None,
    lights: list[Point] | None = None,
) -> Drawing:
    """Draw a scene, and say where everything is.

    `things`, from back to front, and `lights` replace those of the scene: any number, anywhere.
    """
    # Each layer has random numbers of its own, so that a scene with stars or clouds has the same land as without.
    layers = ("columns", "stars", "sky", "land", "things")
    rngs = {layer: random.Random(f"{layer} {seed}") for layer in layers}
    canvas = Canvas(size)
    canvas.gradient(SKIES[scene.time], 0, HORIZON + 8)
    if scene.time == "night":
        _stars(canvas, rngs["stars"])
    columns = _columns(scene, rngs["columns"])
    lights, clouds = _sky(canvas, scene, columns, lights, rngs["sky"])
    _land(canvas, scene, lights, rngs["land"])
    spots = _spots(scene, columns, rngs["things"])
    if things is None:
        things = list(zip(scene.things, spots))
        things = things[::-1] if scene.is_behind else things
    _things(canvas, scene, things)
    return Drawing(canvas.finish(), spots, lights, clouds)


def _columns(scene: Scene, rng: random.Random) -> list[float]:
    """x of each thing."""
    if scene.is_behind:
        middle, side = 64 + rng.uniform(-3, 3), -DEPTH if scene.position == "left" else DEPTH
        return [middle + side, middle - side]
    return [MIDDLES[thing.position] + rng.uniform(-3, 3) for thing in scene.things]


def _spots(scene: Scene, columns: list[float], rng: random.Random) -> list[Spot]:
    """Where each thing is. Two things are smaller than one, and one behind another is smaller and higher up."""
    spots = []
    for thing, x in zip(scene.things, columns):
        y = rng.uniform(111, 117)
        if thing.kind == "balloon":
            y = rng.uniform(84, 94) if scene.second else rng.uniform(80, 90)
        if thing.position == "behind":
            spots.append(Spot(x, y - 17, rng.uniform(0.68, 0.76)))
        else:
            spots.append(Spot(x, y, rng.uniform(0.8, 0.92) if scene.second else rng.uniform(0.95, 1.08)))
    return spots


def _stars(canvas: Canvas, rng: random.Random) -> None:
    for _ in range(18):
        r = rng.choice((0.5, 0.7, 0.9))
        canvas.ellipse(rng.uniform(2, 126), rng.uniform(2, 62), r, r, (236, 238, 255))


def _sky(
    canvas: Canvas, scene: Scene, columns: list[float], lights: list[Point] | None, rng: random.Random
) -> tuple[list[Point], int]:
    """Draw sun or moon, and clouds. Returns the middles of suns or moons, and the number of clouds."""
    if len(columns) == 2 and not scene.is_behind:
        where = 64 + rng.uniform(-5, 5)
    else:
        where = (SUN_RIGHT if columns and columns[0] < 45 and not scene.is_behind else SUN_LEFT) + rng.uniform(-8, 8)
    # Mountains, or two things, would hide a low sun.
    high = scene.time in ("noon", "night") or scene.terrain == "mountains" or scene.second is not None
    height = (21 if high else 49) + rng.uniform(-4, 4)
    if lights is None:
        lights = [(where, height)] if scene.light else []
    for x, y in lights:
        _sun(canvas, scene.time, x, y)
    clouds = 0
    if scene.clouds:
        for middle in (rng.uniform(10, 34), rng.uniform(54, 74), rng.uniform(94, 118)):
            # No cloud in front of the sun. A low sun is below the clouds.
            if not any(y < 40 and abs(middle - x) < 30 for x, y in lights):
                _cloud(canvas, middle, rng.uniform(10, 28), rng.uniform(0.9, 1.2), CLOUDS[scene.time])
                clouds += 1
    return lights, clouds


def _sun(canvas: Canvas, time: str, x: float, y: float) -> None:
    radius = 12 if time == "sunset" else 10
    canvas.glow(x, y, 3.2 * radius, GLOWS[time], 0.9)
    canvas.ellipse(x, y, radius, radius, SUNS[time])
    if time == "night":
        for dx, dy, r in ((-3, -2, 2.2), (3, 3, 2.6), (2.5, -4, 1.4)):  # craters
            canvas.ellipse(x + dx, y + dy, r, r, (222, 216, 196))


def _cloud(canvas: Canvas, x: float, y: float, s: float, colour: Colour) -> None:
    below = mix(colour, (70, 70, 110), 0.14)
    puffs = ((-12, 2, 6.5), (-4, -2, 8), (6, -1, 7.5), (13, 2.5, 5.5))
    for fill, drop in ((below, 2), (colour, 0)):
        for dx, dy, r in puffs:
            canvas.ellipse(x + s * dx, y + s * dy + drop, s * r, s * r * 0.72, fill)
        canvas.rectangle(x - s * 12, y + drop, x + s * 13, y + s * 6.4 + drop, fill, radius=3 * s)


def _ridge(low: float, high: float, waves: float, rng: random.Random) -> list[Point]:
    """A wavy line across the image with y between `high` and `low`, as a polygon down to the bottom edge."""
    phase, second = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
    points = []
    for i in range(33):
        t = 2 * math.pi * i / 32
        h = 0.5 + 0.36 * math.sin(waves * t + phase) + 0.14 * math.sin(2.3 * waves * t + second)
        points.append((i * UNITS / 32, low + (high - low) * h))
    return [*points, (UNITS, UNITS), (0, UNITS)]


def _land(canvas: Canvas, scene: Scene, lights: list[Point], rng: random.Random) -> None:
    def shade(colour: Colour) -> Colour:
        return tint(colour, LAND_LIGHT[scene.time])

    haze = SKIES[scene.time][-1]
    if scene.terrain == "mountains":
        _mountains(canvas, shade, haze, rng)
    elif scene.terrain == "hills":
        for low, high, colour, fog in (
            (78, 58, (86, 160, 96), 0.35),
            (90, 72, (84, 170, 70), 0.12),
            (108, 90, (112, 194, 76), 0),
        ):
            canvas.polygon(_ridge(low, high, rng.uniform(0.8, 1.3), rng), mix(shade(colour), haze, fog))
    elif scene.terrain == "desert":
        for low, high, colour, fog in (
            (80, 64, (222, 160, 96), 0.3),
            (92, 76, (236, 186, 112), 0.1),
            (110, 92, (246, 206, 134), 0),
        ):
            ridge = _ridge(low, high, rng.uniform(0.7, 1.2), rng)
            canvas.polygon(ridge, mix(shade(colour), haze, fog))
            canvas.line(ridge[:-2], mix(shade((255, 232, 176)), haze, fog), 1.2)
    elif scene.terrain == "snow":
        canvas.polygon(_ridge(80, 62, rng.uniform(0.8, 1.3), rng), mix(shade((190, 212, 238)), haze, 0.2))
        for _ in range(7):
            _pine(canvas, rng.uniform(0, 128), rng.uniform(80, 86), rng.uniform(0.8, 1.2), shade)
        canvas.polygon(_ridge(92, 82, rng.uniform(0.7, 1.1), rng), shade((226, 236, 250)))
        canvas.polygon(_ridge(114, 98, rng.uniform(0.7, 1.1), rng), shade((246, 250, 255)))
    else:
        _sea(canvas, scene.time, lights, rng)


def _mountains(canvas: Canvas, shade, haze: Colour, rng: random.Random) -> None:
    """Draw three snow-capped peaks, lit from the left, behind a dark valley."""
    peaks = [(rng.uniform(8, 30), 38), (rng.uniform(96, 120), 36), (rng.uniform(50, 78), 28)]
    for x, top in peaks:
        top += rng.uniform(-4, 4)
        half = 46 + rng.uniform(-4, 4)
        foot = 98
        rock, dark = mix(shade((128, 128, 150)), haze, 0.12), mix(shade((92, 92, 120)), haze, 0.12)
        canvas.polygon([(x, top), (x - half, foot), (x + half, foot)], rock)
        canvas.polygon([(x, top), (x + half, foot), (x + 4, foot), (x - 4, top + 30), (x + 3, top + 16)], dark)
        cap, slope = 15, half / (foot - top)
        edge = [(x + slope * cap, top + cap), (x + 6, top + 12), (x, top + 18), (x - 6, top + 12)]
        canvas.polygon([(x, top), *edge, (x - slope * cap, top + cap)], shade((250, 252, 255)))
    canvas.polygon(_ridge(90, 80, rng.uniform(0.8, 1.3), rng), shade((64, 116, 92)))
    canvas.polygon(_ridge(108, 94, rng.uniform(0.8, 1.2), rng), shade((92, 146, 92)))


def _pine(canvas: Canvas, x: float, foot: float, s: float, shade) -> None:
    for low, half in ((0, 5), (5, 4), (10, 3)):
        triangle = [(x - s * half, foot - s * low), (x + s * half, foot - s * low), (x, foot - s * (low + 8))]
        canvas.polygon(triangle, shade((60, 104, 96)))


def _sea(canvas: Canvas, time: str, lights: list[Point], rng: random.Random) -> None:
    near = SEAS[time]
    far = mix(near, SKIES[time][-1], 0.45)
    canvas.gradient([far, mix(far, near, 0.6), near, mix(near, (0, 0, 30), 0.15)], HORIZON - 4, UNITS)
    crest = mix(near, WHITE, 0.22)
    for row in range(6):
        y = HORIZON + 4 + row * 8
        for _ in range(2):
            x, half = rng.uniform(6, 122), 4 + row
            canvas.line([(x - half, y), (x - half / 2, y - 1.2), (x + half / 2, y - 1.2), (x + half, y)], crest, 1.2)
    for sun_x, _ in lights:
        for row in range(8):
            half = 9 - 0.5 * row + rng.uniform(-2, 2)
            y = HORIZON - 1 + row * 4.5
            canvas.rectangle(sun_x - half, y, sun_x + half, y + 2, mix(GLOWS[time], SUNS[time], 0.5), radius=1)


def _things(canvas: Canvas, scene: Scene, things: list[tuple[Thing, Spot]]) -> None:
    """Draw the things, from back to front, and the ground below them."""

    def shade(colour: Colour) -> Colour:
        return tint(colour, THING_LIGHT[scene.time])

    alone, night = len(things) == 1, scene.time == "night"
    for thing, spot in things:
        _ground(canvas, scene, thing, spot, 1 if alone else 0.78)
    for thing, spot in things:
        beam = 1 if (spot.x <= 64) == alone else -1  # a single lighthouse shines across the image, others outward
        draw_thing = DRAW.get(thing.kind) or NEWCOMERS[thing.kind]
        draw_thing(Brush(canvas, spot.x, spot.y, spot.scale, thing.colour, shade, night, beam))
        if thing.kind == "sailboat":
            foam = 24 * (1 if alone else spot.scale)
            canvas.ellipse(spot.x, spot.y + 1, foam, 1.6, mix(SEAS[scene.time], WHITE, 0.35))


def _ground(canvas: Canvas, scene: Scene, thing: Thing, spot: Spot, scale: float) -> None:
    """Draw what a thing stands on: a lake or an island, or only its shadow."""
    x, y = spot.x, spot.y
    if thing.kind == "sailboat":
        if scene.terrain != "sea":
            _lake(canvas, scene.time, x, y, 1 if scale == 1 else 0.66)
    elif thing.kind != "balloon" and scene.terrain == "sea":
        land = tint((214, 190, 140), LAND_LIGHT[scene.time])
        canvas.ellipse(x, y + 2, 38 * scale, 9 * scale, mix(SEAS[scene.time], WHITE, 0.5))
        canvas.ellipse(x, y + 1, 36 * scale, 7.5 * scale, land)
    elif thing.kind != "balloon":
        ground = canvas.image.getpixel((round(x * canvas.scale), round((y + 3) * canvas.scale)))
        canvas.ellipse(x, y, 28 * scale, 3.2, mix(ground, (20, 20, 50), 0.3))  # the thing's shadow


def _lake(canvas: Canvas, time: str, x: float, y: float, scale: float) -> None:
    """Draw a lake: a boat on land needs water."""
    canvas.ellipse(x, y + 5, 52 * scale, 13.5 * scale, mix(SEAS[time], WHITE, 0.5))
    canvas.ellipse(x, y + 5, 50 * scale, 12 * scale, SEAS[time])
