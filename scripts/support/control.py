"""The flags of demo.py for ControlNets: checked, turned into `Control`s, saved in pictures and read back.

Every flag can be given several times. The first --control goes with the first --control-image, and so on. Numbers are
given once for all, or once for each --control.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from sd.adapters.control import Control
    from sd.models import Models
    from sd.request import Request

CANNY, NO_FILTER = "canny", "none"
NO_OPENCV = "--control-from canny needs the package opencv-python-headless: pip install -r requirements-control.txt"
LOW, HIGH = 100, 200  # thresholds of Canny's edges, as in the training of the ControlNet for them
# For each option, the web UI's name, and the default of `Control`.
NUMBERS = {
    "control_strength": ("Weight", 1.0),
    "control_start": ("Guidance Start", 0.0),
    "control_end": ("Guidance End", 1.0),
}
BALANCED, GUESS = "Balanced", "ControlNet is more important"  # the web UI's names without and with guess mode
SAVED = re.compile(r"ControlNet( \d+)?")


def add_control_flags(add: Callable) -> None:
    """Adds the flags to a parser, whose `add_argument` this takes."""
    paths = {"action": "append", "type": Path, "metavar": "PATH"}
    add("--control", help="a ControlNet, which follows --control-image: a file, a folder or owner/name", **paths)
    help = "an image of edges, poses or depths, as the ControlNet expects it; for one whose name ends in _inpaint, an "
    help += "image with the parts to fill erased (transparent)"
    add("--control-image", help=help, **paths)
    numbers = {"action": "append", "type": float, "metavar": "S"}
    add("--control-strength", help="how strongly to follow it, 0 to 10 (1)", **numbers)
    add("--control-start", help="the share of the steps after which it begins (0)", **numbers)
    add("--control-end", help="the share of the steps after which it ends (1)", **numbers)
    add("--guess-mode", action="store_true", help="follow --control-image more than the prompt, which may be empty")
    add(
        "--control-from",
        action="append",
        choices=(CANNY, NO_FILTER),
        help="canny makes edges of a photograph with OpenCV (requirements-control.txt); the package controlnet_aux "
        "makes images of poses and depths (none)",
    )


def check_control(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not fit together and for missing images, ImportError without OpenCV."""
    count, images = len(options.control or []), len(options.control_image or [])
    if count != images:
        given = f"{images} --control-image for {count} --control"
        raise ValueError(f"--control-image should be given once for each --control, not {given}.")
    for name in (*NUMBERS, "control_from"):
        values, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if values and not count:
            raise ValueError(f"--control and --control-image should be given with {flag}.")
        if values and len(values) not in (1, count):
            raise ValueError(f"{flag} should be given once, or once for each of {count} --control, not {len(values)}.")
    if options.guess_mode and not count:
        raise ValueError("--control and --control-image should be given with --guess-mode.")
    for path in options.control_image or []:
        if not path.is_file():
            raise ValueError(f"--control-image should be a file: there is none at {path}.")
    if CANNY in (options.control_from or []) and find_spec("cv2") is None:
        raise ImportError(NO_OPENCV)


def controls(options: argparse.Namespace) -> list[Control] | None:
    """What the flags say, for `Request`."""
    if not options.control:
        return None
    from sd.adapters.control import Control

    numbers = zip(*(_for_each(options, name) for name in NUMBERS))
    return [
        Control(net, image, *values, guess_mode=options.guess_mode)
        for net, image, values in zip(options.control, options.control_image, numbers)
    ]


def ready(options: argparse.Namespace, request: Request, models: Models) -> Request:
    """The request, whose images were read and whose size is known, with each of its ControlNets loaded once, and with
    edges where --control-from asks for them."""
    if not request.control:
        return request
    from sd.images import image_to_tensor, tensor_to_array

    made, nets = [], {}
    for control, source in zip(request.control, _for_each(options, "control_from")):
        if source == CANNY:
            image = control.image
            if request.padding_mask_crop is None:  # in the size of the result: smaller copies of lines vanish
                image = tensor_to_array(image_to_tensor(image, request.height, request.width))[0]
            control = replace(control, image=canny(image))
        made.append(replace(control, net=nets.get(control.path, control.net)).loaded(models))
        nets[control.path] = made[-1].net
    return replace(request, control=made)


def canny(image: Image.Image | np.ndarray) -> np.ndarray:
    """The edges of an image, PIL RGB or uint8 (H, W, 3), white on black: uint8 (H, W). ImportError without OpenCV."""
    import numpy as np

    try:
        import cv2
    except ImportError:
        raise ImportError(NO_OPENCV) from None
    return cv2.Canny(np.asarray(image), LOW, HIGH)


def saved_controls(options: argparse.Namespace, request: Request) -> dict[str, str]:
    """The settings of the ControlNets as sd-webui-controlnet writes them into a picture: {"ControlNet 0": ...}."""
    pairs = {}
    sources = _for_each(options, "control_from") if request.control else []
    for i, (control, source) in enumerate(zip(request.control or [], sources)):
        values = {"Module": source, "Model": Path(control.path).stem}
        numbers = (control.strength, control.start, control.end)
        values |= {name: f"{number:g}" for (name, _), number in zip(NUMBERS.values(), numbers)}
        values["Control Mode"] = GUESS if control.guess_mode else BALANCED
        # In the value, which is in quotes, a comma ends a setting.
        pairs[f"ControlNet {i}"] = ", ".join(f"{name}: {re.sub('[,:]', ' ', value)}" for name, value in values.items())
    return pairs


def take_controls(options: argparse.Namespace, pairs: dict[str, str]) -> list[str]:
    """Takes the settings of ControlNets out of those that a picture has, for options that were not given.

    Returns sentences for the user. Raises ValueError for a number that cannot be read.
    """
    names = [name for name in pairs if SAVED.fullmatch(name)]
    saved = [_parts(pairs.pop(name)) for name in names]
    if not saved:
        return []
    made_with = " and ".join(repr(one.get("Model", "unknown")) for one in saved)
    if len(options.control or []) != len(saved):
        return [f"{options.source} was made with {made_with}; --control and --control-image give a ControlNet."]
    for option, (name, default) in NUMBERS.items():
        if getattr(options, option) is None:
            texts = [one.get(name, str(default)) for one in saved]
            try:
                setattr(options, option, [float(text) for text in texts])
            except ValueError:
                raise ValueError(f"{options.source}: {name} should be a number, not {texts!r:.80}.") from None
    sources = [one.get("Module", NO_FILTER) for one in saved]
    if options.control_from is None and set(sources) <= {CANNY, NO_FILTER}:
        options.control_from = sources
    options.guess_mode |= all(one.get("Control Mode") == GUESS for one in saved)
    ours = " and ".join(repr(path.stem) for path in options.control)
    return [f"{options.source} was made with the ControlNet {made_with}, not {ours}."] if ours != made_with else []


def _parts(text: str) -> dict[str, str]:
    """ "Model: canny, Weight: 1" -> its parts."""
    parts = (part.partition(":") for part in text.split(","))
    return {name.strip(): value.strip() for name, _, value in parts}


def _for_each(options: argparse.Namespace, name: str) -> list:
    """The values of an option, one for each --control."""
    default = NUMBERS[name][1] if name in NUMBERS else NO_FILTER
    values = getattr(options, name) or [default]
    return values * len(options.control) if len(values) == 1 else values
