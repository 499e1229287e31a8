"""ControlNets at work: the images that they steer by, their strengths, and what the U-Net gets at each step.

In: the controls of a run, and at each step what the U-Net gets. Out: the sum of their residuals (`controlnet.py`).
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sd.adapters.controlnet import HINT_SCALE, ControlNet
from sd.adapters.controlnet_files import check_family, ends_in, load_controlnet
from sd.checkpoints import hub
from sd.images import ImageSource, alpha_mask, check_array, fill_transparent, image_to_tensor, read_image
from sd.models import Models
from sd.runtime import warn
from sd.runtime.devices import device_and_dtype
from sd.runtime.not_finite import check_finite

if TYPE_CHECKING:
    from sd.inpainting import Region

MAX_CONTROLS, MAX_STRENGTH = 10, 10


@dataclass(frozen=True)
class Control:
    """A ControlNet, or the path of one, and the image that it steers by: an item of `generate(..., control=[...])`.

    image            RGB, resized and cropped to the size of the result. Transparent parts are black. For a ControlNet
                     whose name ends in _inpaint, they are to be filled: erase them in the image to be changed
    strength         what its residuals are multiplied by, from 0 to 10
    start, end       the part of the run in which it works, as shares of the steps
    guess_mode       works without a prompt: the unconditional half of guidance gets no residuals, and residual i of
                     0..12 is multiplied by 10^(-1 + i/12) as well (the paper's section 3.4, in the form of diffusers)
    """

    net: ControlNet | str | os.PathLike
    image: ImageSource
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    @property
    def path(self) -> str | None:
        """Where the ControlNet is from, or None for one that was not loaded from a file."""
        source = self.net.source if isinstance(self.net, ControlNet) else self.net
        return None if source is None else str(source)

    @property
    def inpaints(self) -> bool:
        """Whether the ControlNet fills the transparent parts of the image."""
        return self.net.inpaints if isinstance(self.net, ControlNet) else ends_in("inpaint", self.net)

    def read(self) -> Control:
        """The same with its image read: a PIL image of mode RGB, or RGBA with the parts to be filled transparent.

        Raises what `read_image` raises, FileNotFoundError if the path of the ControlNet does not exist, and ValueError
        if it fills transparent parts and the image has none.
        """
        if not (isinstance(self.net, ControlNet) or hub.is_name(self.net) or Path(self.net).exists()):
            raise FileNotFoundError(f"There is no ControlNet at {self.net}: give a file or a folder.")
        image = read_image(self.image, behind="black", name="control.image")
        return replace(self, image=self._with_mask() if self.inpaints else image)

    def _with_mask(self) -> Image.Image:
        """The image with alpha 0 where it is to be filled, and 255 elsewhere."""
        try:
            alpha = alpha_mask(self.image).point([255] * 128 + [0] * 128)
        except ValueError:  # without transparency
            alpha = None
        if alpha is None or alpha.getextrema()[0] != 0:
            name = Path(self.path or "ControlNet").name
            raise ValueError(
                f"control.image should be transparent where {name} fills it: erase these parts. It has no such parts."
            )
        image = fill_transparent(self.image)  # so that no other colour comes in where it is resized
        image.putalpha(alpha)
        return image

    def loaded(self, models: Models) -> Control:
        """The same with its ControlNet loaded. Raises what `load_controlnet` raises, and ValueError if it does not fit
        the models."""
        net = self.net if isinstance(self.net, ControlNet) else load_controlnet(self.net, models)
        check_family(net.config, models.config.unet)
        if models.config.vae.downscale != HINT_SCALE:
            raise ValueError(
                f"A ControlNet should be used with a VAE of {HINT_SCALE} pixels to a latent, not of "
                f"{models.config.vae.downscale}."
            )
        return replace(self, net=net)

    def to_dict(self) -> dict:
        """The settings for JSON, without the image. Raises ValueError for a ControlNet that no file gave."""
        _require(self.path is not None, "net", self.net, "loaded from a file, to be stored by its path")
        shares = {name: float(getattr(self, name)) for name in ("strength", "start", "end")}
        return {"net": self.path, **shares, "guess_mode": bool(self.guess_mode)}

    def works(self, step: int, steps: int) -> bool:
        """Whether it is at work in step `step`, counted from 0: the whole step must lie between start and end."""
        return self.start <= step / steps and (step + 1) / steps <= self.end

    def residuals(self, latents: Tensor, context: Tensor, timesteps: Tensor, features: Tensor) -> list[Tensor]:
        """As `ControlNet.forward`, multiplied by the strengths."""
        residuals = self.net(latents, context, timesteps, features)
        last = len(residuals) - 1
        fading = self.guess_mode and not self.net.global_pool
        strength = float(self.strength)  # a Fraction cannot multiply a tensor
        factors = [strength * (10 ** (i / last - 1) if fading else 1) for i in range(last + 1)]
        return [factor * residual for factor, residual in zip(factors, residuals)]


def check_controls(controls: object) -> None:
    """Raises ValueError for anything but a list of at most 10 controls with allowed settings."""
    listed = isinstance(controls, (list, tuple)) and all(isinstance(one, Control) for one in controls)
    if not listed or len(controls) > MAX_CONTROLS:
        allowed = f"a list of at most {MAX_CONTROLS} Control(net, image)"
        items = controls if isinstance(controls, (list, tuple)) else []
        kinds = " and ".join(dict.fromkeys(type(one).__name__ for one in items))
        found = f"{len(items)} of type {kinds}" if items else type(controls).__name__  # a network's repr fills pages
        raise ValueError(f"control should be {allowed}, not {found}.")
    for one in controls:
        net, image = isinstance(one.net, (ControlNet, str, os.PathLike)), one.image
        _require(net, "net", one.net, "what load_controlnet returns, or a path")
        known = isinstance(image, (str, os.PathLike, Image.Image, np.ndarray)) or hasattr(image, "read")
        _require(known, "image", image, "a path, an open file, a PIL image or an array")
        if isinstance(image, np.ndarray):
            check_array(image, "control.image")
        for name, most in (("strength", MAX_STRENGTH), ("start", 1), ("end", 1)):
            value = getattr(one, name)
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            _require(number and 0 <= value <= most, name, value, f"a number from 0 to {most}")
        _require(one.start < one.end, "start", one.start, f"less than the end, {one.end}")
        _require(isinstance(one.guess_mode, (bool, np.bool_)), "guess_mode", one.guess_mode, "True or False")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"control.{name} should be {allowed}, not {' '.join(repr(value).split()):.200}.")


def controls_from_dicts(values: object, image_from: Callable[[str, object], Image.Image | None]) -> list[Control]:
    """Unchecked controls from JSON: dicts as `Control.to_dict` returns, with the image as text. `image_from` turns its
    name and text into an image. Raises ValueError for anything else."""
    names = {field.name for field in fields(Control)}
    for one in values if isinstance(values, list) else [values]:
        if not isinstance(one, dict) or not {"net", "image"} <= one.keys() <= names or not isinstance(one["net"], str):
            raise ValueError(f"control should be a list of dicts of {', '.join(sorted(names))}, not {values!r:.80}.")
    return [Control(**(one | {"image": image_from("control.image", one["image"])})) for one in values]


class Steering:
    """All controls of one run, with the features of their images. Their ControlNets must be loaded."""

    def __init__(self, controls: Sequence[Control], latents: Tensor, region: Region | None = None):
        """latents (B, 4, h, w): their size is that of the run. `region` is the part of a larger image that inpainting
        repaints, which the control images then show, too."""
        self.controls, self.features = controls, []  # features: each (1, 320, h, w)
        for control in controls:
            image = control.read().image
            image = _hint(image, latents.shape[2] * HINT_SCALE, latents.shape[3] * HINT_SCALE, region)
            self.features.append(control.net.hint(image.to(*device_and_dtype(control.net))))

    def residuals(
        self, latents: Tensor, context: Tensor, timesteps: Tensor, step: int, steps: int, guided: bool
    ) -> list[Tensor] | None:
        """What `Diffusion.forward` gets in step `step` of `steps`: the sum of all controls' residuals, or None if none
        is at work. The others are the U-Net's arguments, with the unconditional half first if `guided`."""
        total = None
        if step == 0:
            self._warn_of_idle(steps)
        for control, features in zip(self.controls, self.features):
            if not control.works(step, steps):
                continue
            alone = guided and (control.guess_mode or control.net.global_pool)  # the half with the prompt
            rows = slice(len(latents) // 2 if alone else 0, None)
            device, dtype = device_and_dtype(control.net)
            inputs = latents[rows].to(device, dtype), context[rows].to(device, dtype), timesteps[rows].to(device)
            residuals = control.residuals(*inputs, features)
            when = f" at step {step + 1} of {steps}"
            peaks = torch.stack(
                [residual.abs().amax() for residual in residuals]
            )  # checked at once: a GPU waits for it
            check_finite(peaks, control.net, "ControlNet", latents, when)
            residuals = [residual.to(latents) for residual in residuals]
            if alone:
                residuals = [torch.cat([torch.zeros_like(residual), residual]) for residual in residuals]
            total = residuals if total is None else [a + b for a, b in zip(total, residuals)]
        return total

    def _warn_of_idle(self, steps: int) -> None:
        for control in self.controls:
            if not any(control.works(step, steps) for step in range(steps)):
                share = f"{control.start:g} and {control.end:g} of the run"
                warn(f"control has no effect: no step of {steps} lies between {share}.")


def _hint(image: Image.Image, height: int, width: int, region: Region | None) -> Tensor:
    """An image as `Control.read` returns it -> float32 (1, 3, height, width) in [0, 1], and -1 where transparent."""
    hint = _resized(image.convert("RGB"), height, width, region)
    if image.mode == "RGB":
        return hint
    return hint.masked_fill(_resized(image.getchannel("A"), height, width, region) < 0.5, -1)


def _resized(image: Image.Image, height: int, width: int, region: Region | None) -> Tensor:
    """An image without alpha -> float32 (1, 3, height, width) in [0, 1]: the whole, or its part in the region."""
    if region is not None:
        whole = image_to_tensor(image, *region.image.shape[:2])  # (1, 3, H, W)
        left, top, right, bottom = region.box
        part = whole[..., top:bottom, left:right]
        levels = nn.functional.interpolate(part, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    else:
        levels = image_to_tensor(image, height, width)
    return (levels + 1) / 2
