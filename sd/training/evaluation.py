"""Measure how well a model follows its prompts. The judge (judge.py) says what each generated image shows.

In: a model, and prompts of which it is known what they ask for. Out: for each thing that can be asked for, the share of
images that show it.

There are six kinds of prompts, and for each kind prompts with combinations that were trained on and with held-out ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.models import Models
from sd.runtime.devices import device_and_dtype
from sd.tokenizer import Tokenizer
from sd.training.judge import MIXED, ODD, Found, Seen
from sd.training.loop import load_state
from sd.training.samples import decode, draw_latents
from sd.training.text import CaptionEncoder, ImageEncoder, retrieval
from sd.training.vae import psnr, reconstruct
from sd.training.world.newcomers import is_pictured
from sd.training.world.scenes import (
    AND_WORDS,
    ATTRIBUTES,
    BEHIND_WORDS,
    BESIDE_WORDS,
    SECOND_COLOUR,
    Scene,
    add_second,
    caption,
    is_held_out,
    random_scene,
)

AROUND = ("time", "terrain", "light", "clouds")  # what a prompt can ask for besides things
# What `marks` looks at. "number" and "whole" are about all things in the image, the others about what was asked for.
BESIDE = 44  # units, of 128: things side by side are 60 or more apart, things behind one another 28
MARKS = ("time", "terrain", "thing", "colour", "position", "light", "clouds", "number", "whole")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what it asks for: those attributes of the scene that are in `mention`."""

    text: str
    scene: Scene
    mention: frozenset[str]


def _some(names: Iterable[str], rng: random.Random, most: int) -> frozenset[str]:
    """Up to `most` of these names: every number is equally likely."""
    return frozenset(rng.sample(list(names), rng.randint(0, most)))


def _full(scene: Scene, rng: random.Random) -> Prompt | None:
    if len(scene.things) != 1:
        return None
    mention = frozenset(ATTRIBUTES)
    return Prompt(caption(scene, rng, mention), scene, mention)


def _short(scene: Scene, rng: random.Random) -> Prompt | None:
    if len(scene.things) != 1:
        return None
    mention = _some([name for name in ATTRIBUTES if name != "thing"], rng, 5) | {"thing"}
    return Prompt(caption(scene, rng, mention), scene, mention)


def _none(scene: Scene, rng: random.Random) -> Prompt | None:
    if scene.things:
        return None
    mention = _some(AROUND, rng, 4) | {"thing"}
    return Prompt(caption(scene, rng, mention), scene, mention)


def _two_in(how: str, wordings: tuple[str, ...]) -> Callable[[Scene, random.Random], Prompt | None]:
    def make(scene: Scene, rng: random.Random) -> Prompt | None:
        if not scene.things:
            return None
        scene = add_second(scene, rng, how)
        if scene.is_behind != (how == "behind"):
            return None
        mention = _some(AROUND, rng, 4) | {"thing"}
        if how != "twice":
            mention |= {"colour", SECOND_COLOUR, "position"}
        elif rng.random() < 0.5:
            mention |= {"colour", SECOND_COLOUR}
        return Prompt(caption(scene, rng, mention, wordings), scene, mention)

    return make


def _relation(scene: Scene, rng: random.Random) -> Prompt | None:
    how, wordings = rng.choice((("beside", BESIDE_WORDS), ("behind", BEHIND_WORDS)))
    return _two_in(how, wordings)(scene, rng)


PROMPTS: dict[str, Callable[[Scene, random.Random], Prompt | None]] = {
    "full": _full,  # one thing, and every attribute is mentioned
    "short": _short,  # one thing, and none to five other attributes
    "two": _two_in("beside", AND_WORDS),  # "a red house and a blue tree", and none to four attributes of the rest
    "twice": _two_in("twice", AND_WORDS),  # "two yellow tents", "two tents"
    "relation": _relation,  # "a red house left of a blue tree", "a red house behind a blue tree"
    "none": _none,  # "an empty desert", "no house, only green hills"
}


def make_prompts(kind: str, count: int, held_out: bool, seed: int = 0) -> list[Prompt]:
    """Random prompts of a kind in `PROMPTS`. Those with `held_out` mention a combination that is never trained on."""
    rng = random.Random(f"prompts {kind} {seed} {held_out}")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        prompt = PROMPTS[kind](random_scene(rng, None), rng)
        if prompt and is_held_out(prompt.scene) == is_held_out(prompt.scene, prompt.mention) == held_out:
            prompts.append(prompt)
    return prompts


def newcomer_prompts(kind: str, count: int, held_out: bool, seed: int = 0) -> list[Prompt]:
    """Random prompts for a newcomer that mention every attribute. Those with `held_out` have a time, a terrain or a
    colour that `newcomer_pictures` does not show."""
    rng = random.Random(f"prompts {kind} {seed} {held_out}")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        scene = Scene(
            **{name: rng.choice(values) for name, values in ATTRIBUTES.items() if name != "thing"}, thing=kind
        )
        if is_pictured(scene) != held_out:
            mention = frozenset(ATTRIBUTES)
            prompts.append(Prompt(caption(scene, rng, mention), scene, mention))
    return prompts


def marks(prompt: Prompt, seen: Seen) -> dict[str, bool]:
    """Whether an image shows what the prompt asks for: a mark for each of `MARKS` that can be given.

    thing: each thing that was asked for is there. colour: each is there in its own colour. position: it is where it
    should be; or of two things, the right one is on the left, or in front. light: there is one sun or moon, or none, as
    asked for; without being asked for, there is at most one. number: there are as many things as asked for, and no
    more. whole: and each is one whole thing of one colour.

    A sun by day is not the moon that was asked for, and a thing beside another is not behind it.
    """
    scene, mention, right = prompt.scene, prompt.mention, {}
    for name in ("time", "terrain", "clouds"):
        if name in mention:
            right[name] = getattr(seen, name) == getattr(scene, name)
    right["light"] = seen.lights <= 1
    if "light" in mention:  # "with the moon" also says that it is night
        right["light"] = seen.lights == scene.light and (seen.time == "night") == (scene.time == "night")
    if "thing" not in mention:
        right["number"] = len(seen.things) <= 1
        return right
    right["number"] = len(seen.things) == len(scene.things)
    if not scene.things:
        return right
    right["whole"] = right["number"] and all(thing.kind != ODD and thing.colour != MIXED for thing in seen.things)
    kinds = [thing.kind for thing in scene.things]
    ways = [way for way in permutations(seen.things, len(kinds)) if [thing.kind for thing in way] == kinds]
    right["thing"] = bool(ways)
    coloured = [way for way in ways if _colours_fit(scene, mention, way)]
    if {"colour", SECOND_COLOUR} & mention:
        right["colour"] = bool(coloured)
    if "position" in mention and not scene.is_twice:
        right["position"] = any(_is_placed(scene, way) for way in (coloured if scene.second else ways))
    return right


def _colours_fit(scene: Scene, mention: frozenset[str], way: tuple[Found, ...]) -> bool:
    asked = zip(scene.things, way, ("colour", SECOND_COLOUR))
    return all(thing.colour == found.colour for thing, found, name in asked if name in mention)


def _is_placed(scene: Scene, way: tuple[Found, ...]) -> bool:
    """Whether one thing is where it should be in the image, or the first of two is on the left or in front."""
    if scene.is_behind:  # not side by side
        return abs(way[0].x - way[1].x) < BESIDE and way[0].foot > way[1].foot
    if scene.second:
        return way[0].x < way[1].x
    return scene.position == ("left" if way[0].x < 47.5 else "centre" if way[0].x < 80.5 else "right")


def called_right(truth: Seen, seen: Seen) -> bool:
    """Whether the judge calls an image what it is: time, terrain and clouds, the number of lights, and the number of
    things, their kinds and their colours. Of an odd thing, the colour does not count."""
    if (truth.time, truth.terrain, truth.clouds, truth.lights) != (seen.time, seen.terrain, seen.clouds, seen.lights):
        return False
    return sorted(map(_name, truth.things)) == sorted(map(_name, seen.things))


def _name(found: Found) -> str:
    return ODD if found.kind == ODD else f"{found.colour} {found.kind}"


def shares(given: list[dict[str, bool]]) -> dict[str, tuple[float, int]]:
    """The marks of N images -> for each of `MARKS` the share, in 0..1, of images in which it is right, and in how many
    images it was given. "mean" is the mean of these shares, "all" the share of images in which every mark is right."""
    counts = {name: [each[name] for each in given if name in each] for name in MARKS}
    result = {name: (sum(right) / len(right), len(right)) for name, right in counts.items() if right}
    mean = sum(share for share, _ in result.values()) / len(result)
    every = sum(all(each.values()) for each in given) / len(given)
    return result | {"mean": (mean, len(given)), "all": (every, len(given))}


def draw_prompts(
    models: Models, prompts: list[str], sampler_name: str, steps: int, cfg_scale: float, deep_cache: int = 1
) -> Tensor:
    """One image for each of N prompts -> (N, 3, H, W) in [-1, 1]. Image i has seed i."""
    images = []
    for start in range(0, len(prompts), 32):
        latents = draw_latents(
            models, prompts[start : start + 32], sampler_name, steps, cfg_scale, seed=start, deep_cache=deep_cache
        )
        images.append(decode(models, latents))
    return torch.cat(images)


@torch.no_grad()
def through_the_vae(models: Models, images: Tensor) -> tuple[Tensor, float]:
    """Images (N, 3, H, W) in [-1, 1] -> the same after encoding and decoding, and the mean PSNR in dB."""
    parts = [
        reconstruct(models.encoder, models.decoder, part.to(*device_and_dtype(models.encoder))).float().cpu()
        for part in images.split(16)
    ]
    copies = torch.cat(parts)
    return copies, psnr(images, copies).mean().item()


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval, (low, high), of a share observed in `count` images (Wilson 1927)."""
    z = 1.96
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (centre - half) / (1 + z**2 / count), (centre + half) / (1 + z**2 / count)


def load_encoders(text_state: Path, models: Models) -> nn.ModuleDict | None:
    """Load the two encoders of stage 2 from its state file.

    Returns None if the file does not exist, or if it belongs to another training run than the text encoder of `models`.
    Raises TrainingError if it is damaged.
    """
    if not text_state.exists():
        return None
    state, own = load_state(text_state)["average"], models.clip.position_embedding.weight.cpu()
    # Stage 3 zeroed some token embeddings, so compare the position embeddings. A checkpoint has them in float16.
    if not torch.equal(state["captions.clip.position_embedding.weight"].half().to(own.dtype), own):
        return None
    networks = nn.ModuleDict({"pictures": ImageEncoder(), "captions": CaptionEncoder(models.config.text)}).eval()
    networks.load_state_dict({name: tensor for name, tensor in state.items() if name != "log_scale"})
    return networks


@torch.no_grad()
def second_opinion(encoders: nn.ModuleDict, tokenizer: Tokenizer, images: Tensor, prompts: list[str]) -> float:
    """The share, in 0..1, of N images whose own prompt is the most similar of all N, according to these encoders.

    images (N, 3, H, W) in [-1, 1].
    """
    seen = torch.cat([encoders["pictures"](part) for part in images.split(64)])
    return retrieval(seen, encoders["captions"](tokenizer(prompts)))
