"""All settings of `generate` in one dataclass, which checks them. `request_json` converts them."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from PIL import Image
from torch import Tensor

from sd.config import SD15, SPACINGS
from sd.images import ImageSource, check_array, read_image, read_mask_image, warn_about_mask
from sd.models import Models
from sd.prompts.weights import parse
from sd.runtime.devices import Device, best_device
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer, clean

MAX_PIXELS = 8192  # of a side: one feature map of SD 1.5's decoder then takes 34 GB in 16 bits
MAX_FEATHER = 1000
MAX_SCALE = 1000
MAX_CLIP_SKIP = 24
MAX_FACTOR = 10  # of FreeU
MAX_HIRES = 8
MAX_QUOTED = 200  # characters of a value that an error quotes


@dataclass(frozen=True)
class Request:
    """The settings of one image, or of one for each prompt of a list. `pipeline.generate` explains them.

    None is the model's own default. `check` raises ValueError for a setting that is not allowed.
    """

    prompt: str | list[str]
    uncond_prompt: str | list[str] | None = ""
    input_image: ImageSource | None = None
    mask_image: ImageSource | None = None
    strength: float = 0.8
    do_cfg: bool = True
    cfg_scale: float | None = None
    sampler_name: str | None = None
    n_inference_steps: int | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    feather: float = 0
    padding_mask_crop: int | None = None
    cfg_rescale: float = 0
    cfg_interval: Sequence[float] | None = None
    deep_cache: int = 1
    control: Sequence | None = None  # of `sd.adapters.control.Control`
    clip_skip: int = 1
    freeu: Sequence[float] | None = None
    hires_scale: float = 1
    hires_strength: float = 0.6
    hires_latents: bool = False
    timestep_spacing: str | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompts, as a list even if there is only one."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    def check(self) -> None:
        """Raises ValueError for the first setting that is not allowed, with one sentence that names it."""
        check_prompts(self.prompt, self.uncond_prompt)
        _check_notation("prompt", self.prompt)
        _check_notation("uncond_prompt", self.uncond_prompt or "")
        for name, image in (("input_image", self.input_image), ("mask_image", self.mask_image)):
            _require(image is None or _is_image(image), name, image, "a path, an open file, a PIL image or an array")
            if isinstance(image, np.ndarray):
                check_array(image, name)
        given = self.mask_image is None or self.input_image is not None
        _require(given, "input_image", self.input_image, "given with mask_image")
        _require(isinstance(self.do_cfg, (bool, np.bool_)), "do_cfg", self.do_cfg, "True or False")
        _check_number("strength", self.strength, 0, 1, "a number above 0 and at most 1", above=True)
        _check_number("feather", self.feather, 0, math.inf, "a number of pixels, 0 or more")
        _require(self.feather <= MAX_FEATHER, "feather", self.feather, f"at most {MAX_FEATHER} pixels")
        padding = self.padding_mask_crop
        _require(padding is None or self.mask_image is not None, "mask_image", None, "given with padding_mask_crop")
        if padding is not None:
            allowed = f"a whole number of pixels, 0 to {MAX_PIXELS}"
            _check_number("padding_mask_crop", padding, 0, MAX_PIXELS, allowed, whole=True)
        scale = 1 if self.cfg_scale is None else self.cfg_scale
        _check_number("cfg_scale", scale, -math.inf, math.inf, "a number; 1 to 14 is usual")
        _require(abs(scale) <= MAX_SCALE, "cfg_scale", scale, f"from -{MAX_SCALE} to {MAX_SCALE}")
        _check_number("cfg_rescale", self.cfg_rescale, 0, 1, "a number from 0 to 1")
        if self.cfg_interval is not None:
            fine = _are_numbers(self.cfg_interval, 2, 1) and self.cfg_interval[0] <= self.cfg_interval[1]
            allowed = "two numbers from 0 to 1, the smaller first, such as (0, 0.6)"
            _require(fine, "cfg_interval", self.cfg_interval, allowed)
        known = self.sampler_name is None or (isinstance(self.sampler_name, str) and self.sampler_name in SAMPLERS)
        _require(known, "sampler_name", self.sampler_name, f"one of {', '.join(SAMPLERS)}")
        if self.n_inference_steps is not None:
            check_steps("n_inference_steps", self.n_inference_steps)
            if self.sampler_name is not None:
                most = SAMPLERS[self.sampler_name].max_steps
                allowed = f"at most {most} with the sampler {self.sampler_name}"
                _require(self.n_inference_steps <= most, "n_inference_steps", self.n_inference_steps, allowed)
        spacing = self.timestep_spacing
        known = spacing is None or (isinstance(spacing, str) and spacing in SPACINGS)
        _require(known, "timestep_spacing", spacing, f"one of {', '.join(SPACINGS)}")
        check_steps("deep_cache", self.deep_cache)
        if self.seed is not None:
            _check_number("seed", self.seed, 0, 2**63 - 1, "a whole number from 0 to 2**63 - 1", whole=True)
        check_size(self.height, self.width, SD15.vae.downscale)
        if self.control is not None:
            from sd.adapters.control import check_controls  # only here: most images are drawn without one

            check_controls(self.control)
        allowed = f"a whole number from 1 to {MAX_CLIP_SKIP}"
        _check_number("clip_skip", self.clip_skip, 1, MAX_CLIP_SKIP, allowed, whole=True)
        if self.freeu is not None:
            fine = _are_numbers(self.freeu, 4, MAX_FACTOR)
            _require(fine, "freeu", self.freeu, f"four numbers from 0 to {MAX_FACTOR}, such as (1.5, 1.6, 0.9, 0.2)")
        _check_number("hires_scale", self.hires_scale, 1, MAX_HIRES, f"a number from 1 to {MAX_HIRES}")
        _check_number("hires_strength", self.hires_strength, 0, 1, "a number above 0 and at most 1", above=True)
        _require(isinstance(self.hires_latents, (bool, np.bool_)), "hires_latents", self.hires_latents, "True or False")
        largest = self.hires_scale * max(self.height or 0, self.width or 0)
        _require(largest <= MAX_PIXELS, "hires_scale", self.hires_scale, f"so small that no side exceeds {MAX_PIXELS}")
        masked = self.mask_image is not None and self.hires_scale > 1
        _require(not masked, "hires_scale", self.hires_scale, "1 with mask_image")

    def read_images(self) -> Request:
        """The same request with its images read: PIL images instead of paths. Warns about a mask that repaints next
        to nothing, or nearly everything. Raises what `read_image` and `Control.read` raise."""
        image = None if self.input_image is None else read_image(self.input_image, name="input_image")
        mask = None if self.mask_image is None else read_mask_image(self.mask_image, image)
        if mask is not None:
            warn_about_mask(mask)
        control = self.control and [one.read() for one in self.control]
        return replace(self, input_image=image, mask_image=mask, control=control)

    def to_dict(self) -> dict:
        """The request as a dict for JSON. Images are read and become PNG data URLs, so that no file is needed. A
        ControlNet travels as its path."""
        from sd.request_json import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Request:
        """The inverse of `to_dict`: an unchecked request. It opens no files: images must be PNG data URLs. (`draw` will
        open the paths of ControlNets.)

        Raises ValueError for no dict, an unknown setting, a missing prompt, or an image that is not a PNG data URL.
        """
        from sd.request_json import from_dict

        return from_dict(cls, values)


def check_models(models: object, tokenizer: object, device: Device, idle_device: Device) -> None:
    """Raises ValueError unless these are valid arguments of `generate`, or None."""
    _require(models is None or isinstance(models, Models), "models", models, "what load_models returns")
    _require(tokenizer is None or isinstance(tokenizer, Tokenizer), "tokenizer", tokenizer, "a Tokenizer")
    for name, value in (("device", device), ("idle_device", idle_device)):
        _require(_is_device(value), name, value, "one that torch can use here, such as 'cpu'")


def check_size(height: int | None, width: int | None, multiple: int) -> None:
    """Raises ValueError unless each is None, or a multiple of `multiple` pixels and at most 8192."""
    for name, size in (("height", height), ("width", width)):
        ok = size is None or (_is_number(size, multiple, whole=True) and size % multiple == 0)
        _require(ok, name, size, f"a multiple of {multiple} pixels")
        _require(size is None or size <= MAX_PIXELS, name, size, f"at most {MAX_PIXELS} pixels")


def latent_shape(models: Models, batch_size: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
    """(B, 4, H/8, W/8) for a size in pixels; None is the model's own. Raises ValueError as `check_size` does."""
    vae, default = models.config.vae, models.config.image_size
    check_size(height, width, vae.downscale)
    height, width = int(height or default), int(width or default)
    return batch_size, vae.latent_channels, height // vae.downscale, width // vae.downscale


def image_size(models: Models, shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """(H, W) in pixels for a `latent_shape`."""
    return shape[2] * models.config.vae.downscale, shape[3] * models.config.vae.downscale


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError, with the argument's `name`, unless a tensor has this shape, where a text is any number."""
    given = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
    fits = len(given) == len(shape) and all(isinstance(n, str) or n == size for n, size in zip(shape, given))
    if not fits or 0 in given:
        raise ValueError(f"{name} should be a tensor ({', '.join(map(str, shape))}), not {given or _shown(tensor)}.")


def check_steps(name: str, steps: int) -> None:
    """Raises ValueError, with the setting's `name`, unless `steps` is a whole number from 1 to 1000."""
    most = SD15.schedule.num_training_steps
    _check_number(name, steps, 1, most, f"a whole number from 1 to {most}", whole=True)


def check_prompts(prompt: str | Sequence[str], uncond_prompt: str | Sequence[str] | None) -> None:
    """Raises ValueError unless these are texts, with one `uncond_prompt` for all prompts, one for each, or None."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    _require(_is_texts(prompts), "prompt", prompt, "a text or a list of one text or more")
    if uncond_prompt is None or isinstance(uncond_prompt, str):
        return
    _require(_is_texts(uncond_prompt), "uncond_prompt", uncond_prompt, "a text or a list of texts")
    paired = len(uncond_prompt) == len(prompts)
    _require(paired, "uncond_prompt", uncond_prompt, f"one text, or {len(prompts)} like the prompts")


def _check_notation(name: str, texts: str | Sequence[str]) -> None:
    """Raises ValueError for a text that cannot be read or whose weights are malformed."""
    for text in dict.fromkeys([texts] if isinstance(texts, str) else texts):
        for piece, _ in chain(*parse(text, name)):
            try:
                clean(piece)
            except ValueError as error:
                reason = str(error)
                raise ValueError(f"{name} should be text that can be read: {reason[0].lower()}{reason[1:]}") from None


def _check_number(
    name: str, value: object, low: float, high: float, allowed: str, whole: bool = False, above: bool = False
) -> None:
    """`above` excludes the lower limit itself."""
    _require(_is_number(value, low, high, whole) and not (above and value == low), name, value, allowed)


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} should be {allowed}, not {_shown(value)}.")


def _shown(value: object) -> str:
    """A value as an error quotes it: on one line, and shortened."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # any exception of a foreign class, or an int of thousands of digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _is_number(value: object, low: float = -math.inf, high: float = math.inf, whole: bool = False) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and bool(low <= value <= high)
    except OverflowError:  # an int that no float can hold
        return False


def _are_numbers(values: object, count: int, high: float) -> bool:
    """Whether these are so many numbers from 0 to `high`, in a list or a tuple."""
    listed = isinstance(values, (list, tuple)) and len(values) == count
    return listed and all(_is_number(value, 0, high) for value in values)


def _is_image(value: object) -> bool:
    return isinstance(value, (str, os.PathLike, Image.Image, np.ndarray)) or hasattr(value, "read")


def _is_device(value: object) -> bool:
    try:
        best_device(value)
    except (ValueError, OverflowError):
        return False
    return True
