"""Drawing shapes on a PIL image, at twice its final size, so that edges become smooth.

Coordinates and lengths are in units of 1/128 of the image's side: (0, 0) is the top left corner, (128, 128) the bottom
right one. Colours are (r, g, b) in 0..255.
"""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw

UNITS = 128
OVERSAMPLING = 2

Colour = tuple[int, int, int]
Point = tuple[float, float]


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """A blend of two colours: a for t = 0, b for t = 1."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def tint(colour: Colour, light: tuple[float, float, float]) -> Colour:
    """A colour in coloured light, whose channels are in 0..1."""
    return tuple(min(255, round(c * f)) for c, f in zip(colour, light))


class Canvas:
    """A square image of `size` pixels to draw on. Later shapes cover earlier ones."""

    def __init__(self, size: int):
        self.size = size
        self.scale = OVERSAMPLING * size / UNITS
        self.image = Image.new("RGB", (OVERSAMPLING * size,) * 2)
        self.draw = ImageDraw.Draw(self.image)

    def finish(self) -> Image.Image:
        """The image in its final size: each pixel is the mean of four drawn pixels."""
        return self.image.reduce(OVERSAMPLING)

    def _points(self, points: list[Point]) -> list[Point]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def gradient(self, colours: list[Colour], top: float, bottom: float) -> None:
        """Colours from top to bottom, blended into each other, over the whole width."""
        strip = Image.new("RGB", (1, len(colours)))
        strip.putdata(colours)
        y0, y1 = round(top * self.scale), round(bottom * self.scale)
        column = strip.resize((1, y1 - y0), Image.Resampling.BICUBIC)
        self.image.paste(column.resize((self.image.width, y1 - y0)), (0, y0))

    def polygon(self, points: list[Point], fill: Colour, outline: Colour | None = None, width: float = 1) -> None:
        points = self._points(points)
        self.draw.polygon(points, fill=fill)
        if outline:
            closed = [
                *points,
                points[0],
                points[1],
            ]  # one corner further, so that the first corner is rounded like the others
            self.draw.line(closed, fill=outline, width=round(width * self.scale), joint="curve")

    def line(self, points: list[Point], fill: Colour, width: float = 1) -> None:
        self.draw.line(self._points(points), fill=fill, width=max(1, round(width * self.scale)), joint="curve")

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, outline: Colour | None = None, width: float = 1
    ) -> None:
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(box, fill=fill, outline=outline, width=round(width * self.scale) if outline else 0)

    def rectangle(
        self, x0: float, y0: float, x1: float, y1: float, fill: Colour, outline: Colour | None = None, radius: float = 0
    ) -> None:
        box = self._points([(x0, y0), (x1, y1)])
        width = round(self.scale) if outline else 0
        self.draw.rounded_rectangle(box, radius * self.scale, fill=fill, outline=outline, width=width)

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float = 1.0) -> None:
        """A light that is brightest in its centre and fades to nothing at `radius`."""
        side = max(1, round(2 * radius * self.scale))
        corner = (round((x - radius) * self.scale), round((y - radius) * self.scale))
        self.image.paste(colour, (*corner, corner[0] + side, corner[1] + side), _halo(side, strength))

    def veil(self, points: list[Point], colour: Colour, strength: float) -> None:
        """A translucent polygon."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(self._points(points), fill=round(255 * strength))
        self.image.paste(colour, (0, 0), mask)


@cache
def _halo(side: int, strength: float) -> Image.Image:
    radial = Image.radial_gradient("L").resize((side, side), Image.Resampling.BILINEAR)  # 0 inside, 255 at the corner
    return radial.point([round(255 * strength * max(0.0, 1 - 2**0.5 * v / 255) ** 2) for v in range(256)])
