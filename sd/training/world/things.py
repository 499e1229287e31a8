"""The things that can be in a scene: one short function draws each.

Things are large and have outlines, so that they are easy to recognise in an image of 128 x 128 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sd.training.world.canvas import Canvas, Colour, Point, mix

PAINTS: dict[str, Colour] = {
    "red": (222, 44, 44),
    "yellow": (252, 210, 40),
    "green": (40, 168, 70),
    "blue": (42, 98, 224),
    "purple": (150, 60, 200),
    "white": (250, 250, 250),
}
WHITE, LAMP = (255, 255, 255), (255, 226, 120)
WOOD, DARK_WOOD = (134, 88, 52), (88, 56, 38)
CLOTH = (250, 242, 222)  # of a windmill's sails


@dataclass
class Brush:
    """Draws a thing on a canvas, in coordinates of the thing: (0, 0) is the middle of its foot, and y points up."""

    canvas: Canvas
    x: float  # the middle of its foot, on the canvas
    y: float
    scale: float
    colour: str  # a key of PAINTS
    shade: Callable[[Colour], Colour]  # a colour -> the colour in the light at this time of day
    night: bool
    beam: int = 1  # where a lighthouse shines: 1 to the right, -1 to the left

    @property
    def paint(self) -> Colour:
        return self.shade(PAINTS[self.colour])

    @property
    def dark(self) -> Colour:
        return mix(self.paint, (30, 25, 60), 0.3)

    @property
    def ink(self) -> Colour:
        return mix(self.paint, (25, 20, 45), 0.75)

    def at(self, *points: Point) -> list[Point]:
        """Points in the thing's coordinates -> points on the canvas."""
        return [(self.x + self.scale * x, self.y - self.scale * y) for x, y in points]

    def polygon(self, fill: Colour, *points: Point, outline: bool = True) -> None:
        self.canvas.polygon(self.at(*points), fill, self.ink if outline else None, 1.2)

    def line(self, fill: Colour, width: float, *points: Point) -> None:
        self.canvas.line(self.at(*points), fill, width * self.scale)

    def ellipse(self, fill: Colour, x: float, y: float, rx: float, ry: float, outline: bool = True) -> None:
        (cx, cy), s = self.at((x, y))[0], self.scale
        self.canvas.ellipse(cx, cy, rx * s, ry * s, fill, self.ink if outline else None, 1.2)

    def box(self, fill: Colour, x0: float, y0: float, x1: float, y1: float, radius: float = 0) -> None:
        (left, bottom), (right, top) = self.at((x0, y0), (x1, y1))
        self.canvas.rectangle(left, top, right, bottom, fill, self.ink, radius * self.scale)


def house(b: Brush) -> None:
    """A house with two windows, lit at night, a door and a chimney."""
    roof, pane = b.shade((108, 72, 66)), LAMP if b.night else b.shade((200, 228, 245))
    b.box(b.shade((150, 130, 125)), 9, 36, 15, 54)  # the chimney
    b.polygon(b.paint, (-21, 0), (-21, 30), (21, 30), (21, 0))
    b.polygon(b.dark, (9, 0.6), (9, 29), (20.4, 29), (20.4, 0.6), outline=False)
    b.polygon(roof, (-26, 29), (-13, 52), (13, 52), (26, 29))
    b.box(b.shade(DARK_WOOD), -4.5, 0, 4.5, 16)
    for x in (-13, 13):
        b.box(pane, x - 4.5, 12, x + 4.5, 22)
    if b.night:
        for x in (-13, 13):
            b.canvas.glow(*b.at((x, 17))[0], 11 * b.scale, LAMP, 0.55)


def tree(b: Brush) -> None:
    """A tree with a round crown in the colour, on a trunk."""
    b.polygon(b.shade(WOOD), (-5, 0), (-3.5, 26), (3.5, 26), (5, 0))
    for x, y, r in ((-13, 31, 12), (13, 31, 12), (0, 46, 16)):
        b.ellipse(b.ink, x, y, r + 1.2, r + 1.2, outline=False)
    for x, y, r in ((-13, 31, 12), (13, 31, 12), (0, 46, 16), (0, 34, 13)):
        b.ellipse(b.paint, x, y, r, r, outline=False)
    light = mix(b.paint, WHITE, 0.3) if b.colour != "white" else WHITE
    for x, y, r in ((-16, 34, 4.5), (10, 34, 4), (-4, 52, 6.5)):
        b.ellipse(light, x, y, r, r * 0.8, outline=False)


def sailboat(b: Brush) -> None:
    """A sailboat with two sails in the colour on a wooden hull."""
    b.line(b.shade(DARK_WOOD), 2, (0, 8), (0, 64))
    b.polygon(b.paint, (2, 16), (2, 62), (25, 16))
    b.polygon(b.dark, (-2, 16), (-2, 54), (-20, 16))
    b.polygon(b.shade(WOOD), (-26, 12), (26, 12), (18, 0), (-18, 0))
    b.line(b.shade((235, 220, 195)), 2, (-24, 9.5), (24, 9.5))
    if b.night:
        b.ellipse(LAMP, 0, 64, 1.6, 1.6, outline=False)
        b.canvas.glow(*b.at((0, 64))[0], 10 * b.scale, LAMP, 0.7)


def cactus(b: Brush) -> None:
    """A cactus with two arms, and a flower on top."""
    arms = [((-20, 40), (-20, 22), (0, 22)), ((20, 50), (20, 30), (0, 30)), ((0, 0), (0, 56))]
    for fill, extra in ((b.ink, 2.4), (b.paint, 0)):
        for points, width in zip(arms, (9, 9, 14)):
            b.line(fill, width + extra, *points)
            for x, y in points[:-1] if len(points) > 2 else points[1:]:
                b.ellipse(fill, x, y, (width + extra) / 2, (width + extra) / 2, outline=False)
    rib = b.dark
    for x in (-3.2, 3.2):
        b.line(rib, 1.3, (x, 1), (x, 57))
    b.line(rib, 1.3, (-20, 25), (-20, 41))
    b.line(rib, 1.3, (20, 33), (20, 51))
    b.ellipse(b.shade((250, 130, 170)), 0, 63.5, 4.2, 3, outline=False)  # the flower


def balloon(b: Brush) -> None:
    """A hot air balloon. Its foot is the bottom of the basket."""
    for x in (-1, 1):
        b.line(b.shade(DARK_WOOD), 1.2, (5 * x, 10), (11 * x, 24))
    b.polygon(b.paint, (-16, 31), (-6, 20), (6, 20), (16, 31))
    b.ellipse(b.paint, 0, 44, 23, 23)
    b.polygon(b.paint, (-15, 30), (-6, 21), (6, 21), (15, 30), outline=False)
    stripe = mix(b.paint, WHITE, 0.35) if b.colour != "white" else b.shade((214, 214, 226))
    for r in (14.5, 6):
        curve = [(r * math.sin(a / 8 * math.pi), 44 - 21.5 * math.cos(a / 8 * math.pi)) for a in range(9)]
        b.line(stripe, 1.5, *curve)
        b.line(stripe, 1.5, *((-x, y) for x, y in curve))
    b.box(b.shade(WOOD), -6, 0, 6, 10, 1.5)
    if b.night:
        b.canvas.glow(*b.at((0, 26))[0], 15 * b.scale, LAMP, 0.8)


def lighthouse(b: Brush) -> None:
    """A lighthouse with bands. At night its lamp is lit."""
    b.polygon(b.paint, (-12, 0), (-7.5, 52), (7.5, 52), (12, 0))
    band = b.shade((206, 206, 216)) if b.colour == "white" else b.shade((248, 244, 236))
    for low in (13, 34):
        left, right = 12 - 4.5 * low / 52, 12 - 4.5 * (low + 9) / 52
        b.polygon(band, (-left, low), (-right, low + 9), (right, low + 9), (left, low), outline=False)
    b.polygon(b.paint, (-11.9, 0), (-7.4, 52), (-7.4, 52), (-11.9, 0))  # the outline again, over the bands
    b.box(LAMP, -5, 54, 5, 63)
    b.box(b.shade((60, 60, 74)), -10.5, 51, 10.5, 54.5)
    b.polygon(b.shade((74, 62, 76)), (-7.5, 63), (0, 71), (7.5, 63))
    b.box(b.shade(DARK_WOOD), -3.2, 0, 3.2, 9, 1)
    if b.night:
        b.canvas.veil(b.at((5 * b.beam, 58.5), (120 * b.beam, 82), (120 * b.beam, 44)), (255, 244, 190), 0.45)
        b.canvas.glow(*b.at((0, 58.5))[0], 15 * b.scale, (255, 244, 190), 0.9)


def tent(b: Brush) -> None:
    """A ridge tent with an open door."""
    b.polygon(b.dark, (0, 42), (32, 0), (12, 0))
    b.polygon(b.paint, (0, 42), (-30, 0), (24, 0))
    inside = LAMP if b.night else b.shade((70, 52, 48))
    b.polygon(inside, (-1.5, 31), (-13, 0), (8, 0))
    b.polygon(mix(b.paint, WHITE, 0.35), (-1.5, 31), (-13, 0), (-18, 0))
    b.line(b.shade(DARK_WOOD), 1.6, (0, 41), (0, 49))
    if b.night:
        b.canvas.glow(*b.at((-2, 8))[0], 20 * b.scale, LAMP, 0.6)


def bare_windmill(b: Brush) -> None:
    """A windmill that has lost its sails: a tower in the colour, and a cap."""
    b.polygon(b.paint, (-16, 0), (-11, 44), (11, 44), (16, 0))
    b.polygon(b.dark, (15.2, 0.6), (10.4, 43), (5, 43), (7, 0.6), outline=False)
    b.box(b.shade(DARK_WOOD), -4.5, 0, 4.5, 14, 1)
    b.polygon(b.shade((92, 70, 74)), (-13, 43), (-7, 56), (7, 56), (13, 43))


def windmill(b: Brush) -> None:
    """A windmill with four sails."""
    bare_windmill(b)
    for quarter in range(4):
        turn = math.pi / 4 + math.pi / 2 * quarter
        corners = [(math.hypot(x, y), turn + math.atan2(y, x)) for x, y in ((5, -2), (30, -7), (30, 7), (5, 2))]
        b.polygon(b.shade(CLOTH), *((r * math.cos(angle), 46 + r * math.sin(angle)) for r, angle in corners))
    b.ellipse(b.shade(DARK_WOOD), 0, 46, 4, 4, outline=False)


def rocket(b: Brush) -> None:
    """A rocket on its fins: a body in the colour, with a window."""
    for side in (-1, 1):
        b.polygon(b.dark, (10 * side, 26), (23 * side, 0), (10 * side, 8))
    curve = [(13 * math.cos(t * math.pi / 12) ** 0.6, 42 + 28 * math.sin(t * math.pi / 12)) for t in range(6)]
    b.polygon(b.paint, (-10, 5), *((-x, y) for x, y in curve), (0, 71), *curve[::-1], (10, 5))
    b.polygon(b.shade((70, 70, 84)), (-7, 5), (-9, 0), (9, 0), (7, 5))
    b.ellipse(b.shade((200, 228, 245)), 0, 42, 6.5, 6.5)
    band = b.shade((206, 206, 216)) if b.colour == "white" else b.shade((248, 244, 236))
    b.polygon(mix(band, WHITE, 0.2), (-11.4, 18), (-12.4, 26), (12.4, 26), (11.4, 18), outline=False)


DRAW: dict[str, Callable[[Brush], None]] = {
    "house": house,
    "tree": tree,
    "sailboat": sailboat,
    "cactus": cactus,
    "balloon": balloon,
    "lighthouse": lighthouse,
    "tent": tent,
}
# Not in the toy world: things that fine-tuning teaches (newcomers.py).
NEWCOMERS: dict[str, Callable[[Brush], None]] = {"windmill": windmill, "bare windmill": bare_windmill, "rocket": rocket}
