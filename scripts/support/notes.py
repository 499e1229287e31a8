"""What demo.py says before it draws, one line each: no error, but perhaps not what was meant."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from scripts.support.command_line import demo_name

if TYPE_CHECKING:
    from sd.models import Models
    from sd.request import Request

FAR_ABOVE = 2  # times the pixels that the model was trained on


def say(line: str) -> None:
    """Prints a line on standard error, after the program's name."""
    print(f"{demo_name()}: {line}", file=sys.stderr)


def note_unquoted(prompts: list[str]) -> None:
    """For several prompts of one word each: quotes may be missing."""
    if len(prompts) > 1 and all(prompt and len(prompt.split()) == 1 for prompt in prompts):
        one = " ".join(prompts)
        say(f'{len(prompts)} prompts were given, and each is drawn. One prompt stands in quotes: "{one}".')


def note_unknown_words(prompts: list[str]) -> None:
    """For words that the tiny model was never trained on."""
    from sd.prompts.other_tools import without_notation
    from sd.training.world.vocabulary import unknown_words

    if words := unknown_words(without_notation(" ".join(prompts))):
        unknown = ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
        say(f"the tiny model was not trained on {unknown}: --world lists its words.")


def note_crop(options: argparse.Namespace, request: Request) -> None:
    """If cropping --image removes more than a twentieth of it."""
    if request.input_image is None or request.padding_mask_crop is not None:
        return
    width, height = request.input_image.size
    wanted = request.width / request.height
    if min(wanted * height / width, width / height / wanted) < 0.95:
        say(
            f"{options.image}, {width} x {height}, is cropped around its centre to the shape of "
            f"{request.width} x {request.height}; --width and --height choose another."
        )


def note_size(request: Request, models: Models) -> None:
    """If the image is far larger than those that the model was trained on."""
    side = models.config.image_size
    times = request.width * request.height / side**2
    if times > FAR_ABOVE:
        say(
            f"{request.width} x {request.height} is {times:.3g} times the {side} x {side} pixels that the model was "
            f"trained on: expect repeated objects, and steps that take about {times:.3g} times as long, or longer."
        )
