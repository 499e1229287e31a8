"""Measure how well a ControlNet is followed: scenes are drawn again along their lines, in another colour and time.

In: a model and a ControlNet. Out: the share of the given lines that are in the pictures, the share of the pictures'
edges that follow given lines, and the judge's marks for what the prompts ask for (`evaluation.py`).
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sd.adapters.controlnet import ControlNet
from sd.images import from_uint8
from sd.models import Models
from sd.training.control import draw_steered
from sd.training.evaluation import Prompt, marks, shares
from sd.training.judge import Judge
from sd.training.outlines import agreement, outlines, scribbles
from sd.training.world.render import render
from sd.training.world.scenes import ATTRIBUTES, COLOURS, TIMES, caption, is_held_out, random_scene

FIRST_SEED = 30_000_000  # of the scenes; no model trains on them
WITHIN = {"outlines": 2, "scribbles": 4}  # pixels; a scribble is bent by up to some 4 and has lines up to 4 wide
AT_ONCE = 25


def scenes_in_other_words(count: int, size: int) -> tuple[Tensor, list[Prompt]]:
    """Pictures of scenes with one thing, (N, 3, H, W) in [-1, 1], and for each a prompt for the same scene in another
    colour and at another time. No combination is a held-out one."""
    pictures, prompts = [], []
    rng = random.Random(FIRST_SEED)
    while len(prompts) < count:
        scene = random_scene(rng)
        colour = rng.choice([colour for colour in COLOURS if colour != scene.colour])
        other = replace(scene, colour=colour, time=rng.choice([time for time in TIMES if time != scene.time]))
        if len(scene.things) == 1 and not is_held_out(other):
            pictures.append(np.asarray(render(scene, FIRST_SEED + len(prompts), size)))
            mention = frozenset(ATTRIBUTES)
            prompts.append(Prompt(caption(other, rng, mention), other, mention))
    return _as_tensor(pictures), prompts


def _as_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Pictures of one size, uint8 (H, W, 3) -> (N, 3, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def measure_following(
    models: Models,
    control: ControlNet,
    judge: Judge,
    kind: str,
    count: int,
    sampler_name: str,
    steps: int,
    cfg_scale: float,
) -> tuple[dict[str, tuple[float, int]], Tensor]:
    """Draw `count` scenes along outlines or scribbles of them. `kind` is a key of `WITHIN`.

    Returns the shares, each with the number of pictures: "given" of the given lines that the pictures have, "found" of
    the pictures' edges that follow given lines, or lines of the scene that are missing in its scribble, and those of
    `evaluation.shares`; and the pictures, (N, 3, H, W) in [-1, 1].
    """
    pictures, prompts = scenes_in_other_words(count, models.config.image_size)
    lines = _lines(pictures, kind)
    drawn = []
    for start in range(0, count, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        texts = [prompt.text for prompt in prompts[part]]
        hints = lines[part].expand(-1, 3, -1, -1)
        drawn.append(draw_steered(models, control, hints, texts, sampler_name, steps, cfg_scale))
    drawn = torch.cat(drawn)
    given, found = _followed(outlines(pictures), lines, drawn, WITHIN[kind])
    seen = shares([marks(prompt, one) for prompt, one in zip(prompts, judge.look(drawn))])
    return {"given": (given, count), "found": (found, count)} | seen, drawn


def measure_renders(kind: str, count: int, size: int) -> dict[str, tuple[float, int]]:
    """The shares "given" and "found" of `measure_following` for what the toy world itself draws for these prompts. They
    are well below 1: at another time, some edges are too weak to be found, others become strong, and the sun moves."""
    pictures, prompts = scenes_in_other_words(count, size)
    renders = [np.asarray(render(prompt.scene, FIRST_SEED + i, size)) for i, prompt in enumerate(prompts)]
    given, found = _followed(outlines(pictures), _lines(pictures, kind), _as_tensor(renders), WITHIN[kind])
    return {"given": (given, count), "found": (found, count)}


def _lines(pictures: Tensor, kind: str) -> Tensor:
    """What is given to follow, (N, 1, H, W)."""
    whole = outlines(pictures)
    return scribbles(whole, torch.Generator().manual_seed(FIRST_SEED)) if kind == "scribbles" else whole


def _followed(whole: Tensor, lines: Tensor, drawn: Tensor, within: int) -> tuple[float, float]:
    """The shares "given" and "found". `whole` are all outlines of the scenes, `lines` those that were given."""
    edges = outlines(drawn)
    given, _ = agreement(lines, edges, within)
    _, found = agreement(torch.maximum(lines, whole), edges, within)
    return given, found
