"""The judge: a small network that says what an image of the toy world shows, and counts it.

In: images. Out: for each image, the things in it with their colours and places, the number of suns or moons, and the
time, terrain and clouds.

It divides an image into 16 x 16 cells. For each cell it says how likely the middle of a thing is there, and which thing
in which colour it would be; and how likely the middle of a sun or moon is there. A thing is found where this likelihood
is high, and highest among the neighbouring cells (as in 1904.07850). So the judge can count, also in arrangements that
no prompt asks for. It is trained on renders of none to three things and none to two suns anywhere, and on spoiled
things: with two colours, half one thing and half another, or with a part missing. It is never trained on generated
images.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sd.blocks import Downsample, ResidualBlock
from sd.checkpoints.files import read_state_dict
from sd.images import from_uint8
from sd.training.text import resize
from sd.training.world.canvas import UNITS
from sd.training.world.render import Spot, draw
from sd.training.world.scenes import COLOURS, TERRAINS, THINGS, TIMES, Scene, Thing, random_scene

GRID, SIDE = 16, 64  # cells and pixels along one side
ODD, MIXED = "odd", "mixed"  # a thing that is not one whole thing, and a colour that is not one colour
KINDS = (*THINGS[1:], ODD)
PAINTS = (*COLOURS, MIXED)
CLASSES = (len(TIMES), len(TERRAINS), 2)  # of the whole image; the last one is for clouds
JUDGE_SEED = 10_000_000  # the first seed of the judge's images
THRESHOLD = 0.4  # from this likelihood on, a thing or a light is there
LIGHT = "light"
VISIBLE = 0.008  # the share of an image that has to show each part of a spoiled thing
ABSENT = -100  # the kind and colour of a cell without a thing; cross_entropy ignores it
# How far the middle of a thing is above its foot, at scale 1.
MIDDLES = {"house": 24, "tree": 35, "sailboat": 32, "cactus": 32, "balloon": 42, "lighthouse": 32, "tent": 17}
MIDDLES |= {"windmill": 34, "bare windmill": 34, "rocket": 35}


@dataclass(frozen=True)
class Found:
    """A thing, or a sun or moon, in an image."""

    kind: str  # one of the judge's kinds, or LIGHT
    colour: str  # one of PAINTS; without meaning for a light
    x: float  # of its middle, in 0..128
    y: float

    @property
    def foot(self) -> float:
        """y of its foot, roughly: of two things, the lower one is in front."""
        return self.y + 0.8 * MIDDLES.get(self.kind, 0)


@dataclass(frozen=True)
class Seen:
    """What an image shows."""

    time: str
    terrain: str
    clouds: bool
    found: tuple[Found, ...]  # from left to right

    @property
    def things(self) -> list[Found]:
        return [found for found in self.found if found.kind != LIGHT]

    @property
    def lights(self) -> int:
        """The number of suns or moons."""
        return len(self.found) - len(self.things)

    @property
    def mirrored(self) -> Seen:
        """What the mirrored image shows."""
        return replace(self, found=tuple(replace(found, x=UNITS - found.x) for found in self.found[::-1]))


class Judge(nn.Module):
    """Images -> what each cell and the whole image show, as logits. `kinds` are the things that it distinguishes."""

    def __init__(self, kinds: tuple[str, ...] = KINDS):
        super().__init__()
        self.kinds = kinds
        self.cell = (2, len(kinds), len(PAINTS))  # of each cell: thing and light, the kind of the thing, its colour
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=2, padding=1),  # (B, 24, 32, 32)
            nn.SiLU(),
            nn.Conv2d(24, 32, 4, stride=2, padding=1),  # (B, 32, 16, 16)
            ResidualBlock(32, 32, 8, 1e-5),
        )
        self.down8 = nn.Sequential(Downsample(32, symmetric=True), ResidualBlock(32, 64, 8, 1e-5))
        self.down4 = nn.Sequential(Downsample(64, symmetric=True), ResidualBlock(64, 96, 8, 1e-5))
        self.merge8, self.merge16 = ResidualBlock(96 + 64, 64, 8, 1e-5), ResidualBlock(64 + 32, 48, 8, 1e-5)
        self.cells = nn.Conv2d(48, sum(self.cell), 1)
        self.whole = nn.Linear(96 * 16, sum(CLASSES))
        nn.init.constant_(self.cells.bias[:2], -2.0)  # at the start, most cells are empty

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> logits of the cells (B, 17, 16, 16) and of the whole image (B, 11)."""
        x = resize(images, SIDE) if images.shape[-1] != SIDE else images  # (B, 3, 64, 64)
        x16 = self.stem(x)  # (B, 32, 16, 16)
        x8 = self.down8(x16)  # (B, 64, 8, 8)
        x4 = self.down4(x8)  # (B, 96, 4, 4)
        x = self.merge8(torch.cat([F.interpolate(x4, scale_factor=2.0), x8], dim=1))  # (B, 64, 8, 8)
        x = self.merge16(torch.cat([F.interpolate(x, scale_factor=2.0), x16], dim=1))  # (B, 48, 16, 16)
        return self.cells(F.silu(x)), self.whole(F.silu(x4).flatten(1))

    @torch.no_grad()
    def look(self, images: Tensor) -> list[Seen]:
        """images (N, 3, H, W) in [-1, 1] -> what each of them shows."""
        seen = []
        for part in images.split(64):
            cells, whole = self(part)
            answers = [logits.argmax(dim=1).tolist() for logits in whole.split(CLASSES, dim=1)]
            for i, (time, terrain, clouds) in enumerate(zip(*answers)):
                found = tuple(sorted(self._peaks(cells[i]), key=lambda found: found.x))
                seen.append(Seen(TIMES[time], TERRAINS[terrain], bool(clouds), found))
        return seen

    def _peaks(self, cells: Tensor) -> list[Found]:
        """Logits (17, 16, 16) -> the things and lights at the peaks of the likelihood."""
        heat, kinds, paints = cells.split(self.cell)
        heat = heat.sigmoid()  # (2, 16, 16): things and lights
        peaks = (heat > THRESHOLD) & (heat == F.max_pool2d(heat[None], 3, stride=1, padding=1)[0])
        found = []
        for is_light, row, column in peaks.nonzero().tolist():
            kind = LIGHT if is_light else self.kinds[kinds[:, row, column].argmax()]
            x, y = ((number + 0.5) * UNITS / GRID for number in (column, row))
            found.append(Found(kind, PAINTS[paints[:, row, column].argmax()], x, y))
        return found

    def with_kinds(self, more: tuple[str, ...]) -> Judge:
        """A judge of more kinds of things, with these weights. It takes a new kind for a thing that is not whole, until
        it is trained."""
        new, state = Judge((*self.kinds, *more)), self.state_dict()
        odd, end = 2 + self.kinds.index(ODD), 2 + len(self.kinds)
        for name in ("cells.weight", "cells.bias"):
            rows = state[name]
            state[name] = torch.cat([rows[:end], rows[[odd] * len(more)], rows[end:]])
        new.load_state_dict(state)
        return new


class JudgeStage:
    """The judge, as a stage for the training loop."""

    name = "judge"
    learning_rate = 4e-3
    # The losses of cells are means over the things in a batch, and parts of a batch have different numbers of them.
    divisible = False
    ema = 0.99
    batch_size = 64

    def __init__(self, pixels: np.ndarray, truths: list[Seen], judge: Judge | None = None):
        """pixels: uint8 (N, 64, 64, 3); truths: what they show; judge: one to train further."""
        judge = judge or Judge()
        self.config = {"kinds": list(judge.kinds), "colours": list(PAINTS), "grid": GRID}
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        self.truths = truths
        self.networks = nn.ModuleDict({"judge": judge})

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random images with some noise, half of them mirrored, (B, 3, 64, 64), and what the judge should say of them,
        see `targets`."""
        indices = torch.randint(len(self.pixels), (self.batch_size,), generator=generator)
        mirrored = torch.rand(self.batch_size, generator=generator) < 0.5
        images = from_uint8(self.pixels[indices])
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        level = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)  # generated images are noisier than renders
        noise = level * torch.randn(images.shape, generator=generator)
        truths = [self.truths[i] for i in indices.tolist()]
        truths = [truth.mirrored if mirror else truth for truth, mirror in zip(truths, mirrored.tolist())]
        return images + noise, *targets(truths, self.networks["judge"].kinds)

    def loss(self, images: Tensor, heat: Tensor, kind: Tensor, paint: Tensor, wanted: Tensor) -> Tensor:
        """The focal loss of the heat, and the cross-entropies of all else. Images (B, 3, 64, 64), the rest as `targets`
        returns it; kinds and colours count only in the cells of things."""
        judge = self.networks["judge"]
        cells, whole = (logits.float() for logits in judge(images))
        heats, kinds, paints = cells.split(judge.cell, dim=1)
        losses = [F.cross_entropy(logit, wanted[:, i]) for i, logit in enumerate(whole.split(CLASSES, dim=1))]
        loss = torch.stack(losses).mean() + focal_loss(heats, heat)
        if (kind == ABSENT).all():
            return loss
        return loss + sum(
            F.cross_entropy(logit, right, ignore_index=ABSENT) for logit, right in ((kinds, kind), (paints, paint))
        )


def targets(truths: list[Seen], names: tuple[str, ...] = KINDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the judge should say of B images: the heat of things and lights (B, 2, 16, 16), which is 1 in the cell of
    one and falls around it; the kinds and colours of things in their cells, and ABSENT elsewhere, (B, 16, 16) each;
    time, terrain and clouds (B, 3)."""
    heat = torch.zeros(len(truths), 2, GRID, GRID)
    kind, paint = (torch.full((len(truths), GRID, GRID), ABSENT) for _ in range(2))
    centres = torch.arange(GRID) + 0.5
    for i, truth in enumerate(truths):
        for found in truth.found:
            x, y = found.x * GRID / UNITS, found.y * GRID / UNITS
            row, column = min(int(y), GRID - 1), min(int(x), GRID - 1)
            near = torch.exp(-((centres[None] - x) ** 2 + (centres[:, None] - y) ** 2))
            is_light = found.kind == LIGHT
            heat[i, int(is_light)] = torch.maximum(heat[i, int(is_light)], near)
            heat[i, int(is_light), row, column] = 1
            if not is_light:
                kind[i, row, column], paint[i, row, column] = names.index(found.kind), PAINTS.index(found.colour)
    wanted = [[TIMES.index(truth.time), TERRAINS.index(truth.terrain), int(truth.clouds)] for truth in truths]
    return heat, kind, paint, torch.tensor(wanted)


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """The loss for peaks in heat maps (1904.07850, eq. 1), per peak. Both are (B, 2, 16, 16).

    Cells next to a peak count less than others, and cells that are right already count little.
    """
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    peaks = heat == 1
    there = (log_q.exp() ** 2 * log_p)[peaks].sum()
    elsewhere = ((1 - heat) ** 4 * log_p.exp() ** 2 * log_q)[~peaks].sum()
    return -(there + elsewhere) / max(1, int(peaks.sum()))


def judge_picture(seed: int, size: int = SIDE, names: tuple[str, ...] = THINGS[1:]) -> tuple[Image.Image, Seen]:
    """An image to train or test the judge on, (size, size) pixels, and what it shows: in a third a scene as it should
    be, otherwise any number of things and suns anywhere, some of them spoiled. `names` are those of the things."""
    rng = random.Random(f"judge {seed}")
    scene = random_scene(rng, held_out=None)
    if names != THINGS[1:] and scene.thing != "none":
        scene = replace(scene, thing=rng.choice(names))
    if rng.random() < 1 / 3:
        drawing = draw(scene, seed, size)
        found = [_found(*pair) for pair in zip(scene.things, drawing.spots)]
        return drawing.image, _truth(scene, drawing.lights, found)
    things = _anything(rng, names)
    lights = _any_lights(rng, scene.terrain, things)
    drawing = draw(scene, seed, size, things, lights)
    image, found = drawing.image, []
    for i, (thing, spot) in enumerate(things):
        found.append(_found(thing, spot))
        if rng.random() < 0.5:
            other, kind, colour = _spoil(rng, thing, names)
            changed = [*things[:i], *([(other, spot)] if other else []), *things[i + 1 :]]
            even = other is not None and colour != MIXED and rng.random() < 0.25
            spoiled = draw(scene, seed, size, changed, lights).image
            mask = _half(drawing.image, spoiled, thing, spot, even, rng)
            if mask is not None:
                image = Image.composite(spoiled, image, mask)
                found[-1] = replace(found[-1], kind=kind, colour=colour)
    return image, _truth(replace(scene, clouds=drawing.clouds > 0), lights, found)


def category(truth: Seen) -> str:
    """Which kind of image this is, to test the judge on each."""
    if any(thing.kind == ODD for thing in truth.things):
        return "not whole"
    if any(thing.colour == MIXED for thing in truth.things):
        return "two colours"
    if truth.lights > 1:
        return "two suns"
    return f"{len(truth.things)} things"


def _kind(thing: Thing) -> str:
    return ODD if thing.kind == "bare windmill" else thing.kind


def _found(thing: Thing, spot: Spot) -> Found:
    return Found(_kind(thing), thing.colour, spot.x, spot.y - spot.scale * MIDDLES[thing.kind])


def _truth(scene: Scene, lights: list, found: list[Found]) -> Seen:
    found = [*found, *(Found(LIGHT, "white", x, y) for x, y in lights)]
    return Seen(scene.time, scene.terrain, scene.clouds, tuple(sorted(found, key=lambda each: each.x)))


def _anything(rng: random.Random, names: tuple[str, ...]) -> list[tuple[Thing, Spot]]:
    """None to three things anywhere, from back to front. They are often equal, as in images that show a thing twice."""
    things: list[tuple[Thing, Spot]] = []
    first = rng.choice(names), rng.choice(COLOURS)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 2, 3))):
        kind, colour = first if rng.random() < 0.4 else (rng.choice(names), rng.choice(COLOURS))
        for _ in range(50):
            y = rng.uniform(70, 100) if kind == "balloon" else rng.uniform(94, 118)
            spot = Spot(rng.uniform(18, 110), y, rng.uniform(0.68, 1.08))
            if all(abs(spot.x - other.x) > 30 for _, other in things):
                things.append((Thing(kind, colour, "centre"), spot))
                break
    return sorted(things, key=lambda each: each[1].y)


def _any_lights(rng: random.Random, terrain: str, things: list[tuple[Thing, Spot]]) -> list[tuple[float, float]]:
    """None to two suns or moons anywhere in the sky, but not behind things or mountains."""
    lowest = 25 if terrain == "mountains" else 52
    lights: list[tuple[float, float]] = []
    for _ in range(rng.choice((0, 1, 1, 2, 2))):
        for _ in range(50):
            x, y = rng.uniform(12, 116), rng.uniform(14, lowest)
            hidden = any(abs(x - spot.x) < 24 * spot.scale + 10 and y > spot.y - 82 * spot.scale for _, spot in things)
            if not hidden and all(math.hypot(x - a, y - b) > 27 for a, b in lights):
                lights.append((x, y))
                break
    return lights


def _spoil(rng: random.Random, thing: Thing, names: tuple[str, ...]) -> tuple[Thing | None, str, str]:
    """What to mix into a thing: itself in another colour, another thing, or nothing. And its kind and colour then."""
    how = rng.choice(("colour", "colour", "kind", "kind", "missing"))
    if how == "colour":
        return replace(thing, colour=rng.choice([c for c in COLOURS if c != thing.colour])), _kind(thing), MIXED
    if how == "kind":
        return replace(thing, kind=rng.choice([k for k in names if k != thing.kind])), ODD, thing.colour
    return None, ODD, thing.colour


def _half(
    image: Image.Image, other: Image.Image, thing: Thing, spot: Spot, even: bool, rng: random.Random
) -> Image.Image | None:
    """Where to show `other` instead of `image`: on one side of a line through the middle of the thing at `spot`; or
    everywhere, half transparent. Only where the two differ, so that nothing else changes.

    None if either would hardly be seen, because another thing is in front of it.
    """
    scale = image.width / UNITS
    x, y = np.meshgrid(*[(np.arange(image.width) + 0.5) / scale] * 2)
    angle, middle = rng.uniform(0, 2 * math.pi), spot.y - spot.scale * (MIDDLES[thing.kind] + rng.uniform(-4, 4))
    side = (x - spot.x) * math.cos(angle) + (y - middle) * math.sin(angle)
    differs = (np.asarray(image) != np.asarray(other)).any(axis=2)
    mask = differs * (np.full_like(x, 0.5) if even else np.clip(side + 0.5, 0, 1))  # the edge is as soft as one unit
    if min(mask.sum(), (differs - mask).sum()) < VISIBLE * mask.size:
        return None
    return Image.fromarray((255 * mask).astype(np.uint8))


def load_judge(path: Path, kinds: tuple[str, ...] = KINDS) -> Judge:
    """Load the judge of these kinds from a checkpoint file. Raises ValueError if it is another network, and the errors
    of `read_state_dict`."""
    judge, state = Judge(kinds), read_state_dict(path)
    shapes = {name: tensor.shape for name, tensor in judge.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        raise ValueError(f"{path} is not a judge of this version: choose another --out, or delete that file.")
    judge.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return judge.eval().requires_grad_(False)
