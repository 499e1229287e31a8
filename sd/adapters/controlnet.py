"""ControlNet: an image of edges, poses or depths steers the U-Net (2302.05543).

In: what the U-Net gets, latents (B, 4, h, w), context (B, 77, D) and timesteps (B,), and an image (B, 3, 8h, 8w) in
[0, 1]. Out: 13 residuals, which `Diffusion.forward` adds to its 12 kept maps and to the output of its middle.

The ControlNet is a copy of the U-Net's way down, trained further, between two kinds of new layers Z (eq. 2):

    y = F(x; W) + Z(F(x + Z(c; W_z1); W_c); W_z2)

c are the features of the image, and x + Z(c) the first feature map with them added. Z is a convolution that starts with
zeros: so training begins with y = F(x), a U-Net without a ControlNet.
"""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sd.checkpoints import hub
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.config_rules import check_config
from sd.checkpoints.diffusers_folder import fields_of, foreign, unet_name
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.folder_files import class_name, find_weights, read_json
from sd.checkpoints.key_rules import inverse, rename, without_wrappers
from sd.checkpoints.shards import INDEX, read_shards
from sd.checkpoints.variants import other_file
from sd.checkpoints.whole_model import name_in_errors
from sd.config import SD2, SD15, ModelConfig, UNetConfig
from sd.diffusion import ContractingPath
from sd.images import ImageSource, check_array, image_to_tensor, read_image
from sd.model_converter import UNET_RULES, check_fit, from_float8, fuse_qkv, split_qkv
from sd.models import Models, NoInitialisation
from sd.runtime import speed
from sd.runtime.devices import Device, best_device, best_dtype, device_and_dtype
from sd.runtime.not_finite import check_finite

if TYPE_CHECKING:
    from sd.inpainting import Region

HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256)  # of the convolutions that make features of the image
HALVING = (2, 4, 6)  # which of these convolutions halve height and width
MAX_CONTROLS, MAX_STRENGTH = 10, 10
HINT_SCALE = 8  # pixels of the image along one side of a latent

PREFIX = "control_model."  # of all keys in the published files, beside which a whole model may stand
DIFFERENCE, CONTROL_LORA = "difference", "lora_controlnet"  # tensors that mark two kinds of files
# Pairs (theirs, ours) and (diffusers, theirs), in the notation of `key_rules`; the other rules are those of the U-Net.
RULES = [("zero_convs.#.0", "zero_convs.#"), ("middle_block_out.0", "zero_middle"), ("input_hint_block", "hint")]
DIFFUSERS_RULES = [
    ("controlnet_down_blocks.#", "zero_convs.#.0"),
    ("controlnet_mid_block", "middle_block_out.0"),
    ("controlnet_cond_embedding.conv_in", "input_hint_block.0"),
    *((f"controlnet_cond_embedding.blocks.{i}", f"input_hint_block.{2 * i + 2}") for i in range(6)),
    ("controlnet_cond_embedding.conv_out", "input_hint_block.14"),
]
# A pattern in any key of a file, and what such a file is.
OTHER_CONTROLS = [
    (rf"^{CONTROL_LORA}$", "is a Control-LoRA, which has a ControlNet's weights as products of small matrices"),
    (r"^(adapter\.)?body\.\d", "is a T2I-Adapter, another kind of network"),
    (r"^(control_model\.)?label_emb\.|^(add|task|control_add)_embedding", "is a ControlNet of Stable Diffusion XL"),
    (r"^controlnet_(single_)?blocks\.|^controlnet_x_embedder", "is a ControlNet of Stable Diffusion 3 or FLUX"),
]
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # by context width


class ControlNet(ContractingPath):
    """The network. With `global_pool`, as for control_v11e_sd15_shuffle, a residual is the mean over its map."""

    def __init__(self, config: UNetConfig, global_pool: bool = False):
        super().__init__(config)
        self.global_pool = global_pool
        self.source: Path | str | None = None  # the file or folder that it was loaded from
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(zip(HINT_WIDTHS, HINT_WIDTHS[1:])):
            layers += [nn.Conv2d(width, following, 3, padding=1, stride=2 if i in HALVING else 1), nn.SiLU()]
        self.hint = nn.Sequential(*layers, nn.Conv2d(HINT_WIDTHS[-1], config.channels[0], 3, padding=1))
        self.zero_convs = nn.ModuleList(nn.Conv2d(width, width, 1) for width in self.skip_widths)
        self.zero_middle = nn.Conv2d(config.channels[-1], config.channels[-1], 1)

    def forward(self, latents: Tensor, context: Tensor, timesteps: Tensor, features: Tensor) -> list[Tensor]:
        """latents (B, 4, h, w), context (B, 77, D), timesteps (B,) -> 13 residuals, (B, 320, h, w) to (B, 1280, h/8,
        w/8). `features` (B or 1, 320, h, w) are `hint` of an image (B or 1, 3, 8h, 8w): the same at all steps."""
        time = self.embed_time(timesteps, latents.dtype)  # (B, 1280)
        x = self.down[0](latents, time, context) + features  # x + Z(c; W_z1): (B, 320, h, w)
        residuals = [self.zero_convs[0](x)]
        for stage, zero_conv in zip(self.down[1:], self.zero_convs[1:]):
            x = stage(x, time, context)  # (B, 320, h, w) down to (B, 1280, h/8, w/8)
            residuals.append(zero_conv(x))  # Z(F(x + Z(c)); W_z2)
        residuals.append(self.zero_middle(self.middle(x, time, context)))
        return [x.mean((2, 3), keepdim=True) for x in residuals] if self.global_pool else residuals


@dataclass(frozen=True)
class Control:
    """A ControlNet, or the path of one, and the image that it steers by: an item of `generate(..., control=[...])`.

    image            RGB, resized and cropped to the size of the result; transparent parts are black
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

    def read(self) -> Control:
        """The same with its image read. Raises what `read_image` raises, and FileNotFoundError if the path of the
        ControlNet does not exist."""
        if not (isinstance(self.net, ControlNet) or hub.is_name(self.net) or Path(self.net).exists()):
            raise FileNotFoundError(f"There is no ControlNet at {self.net}: give a file or a folder.")
        return replace(self, image=read_image(self.image, behind="black", name="control.image"))

    def loaded(self, models: Models) -> Control:
        """The same with its ControlNet loaded. Raises what `load_controlnet` raises, and ValueError if it does not fit
        the models."""
        net = self.net if isinstance(self.net, ControlNet) else load_controlnet(self.net, models)
        _check_family(net.config, models.config.unet)
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
        factors = [self.strength * (10 ** (i / last - 1) if fading else 1) for i in range(last + 1)]
        return [factor * residual for factor, residual in zip(factors, residuals)]


def check_controls(controls: object) -> None:
    """Raises ValueError for anything but a list of at most 10 controls with allowed settings."""
    listed = isinstance(controls, (list, tuple)) and all(isinstance(one, Control) for one in controls)
    if not listed or len(controls) > MAX_CONTROLS:
        allowed = f"a list of at most {MAX_CONTROLS} Control(net, image)"
        raise ValueError(f"control should be {allowed}, not {' '.join(repr(controls).split()):.200}.")
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
            image = _hint(control.image, latents.shape[2] * HINT_SCALE, latents.shape[3] * HINT_SCALE, region)
            self.features.append(control.net.hint(image.to(*device_and_dtype(control.net))))

    def residuals(
        self, latents: Tensor, context: Tensor, timesteps: Tensor, step: int, steps: int, guided: bool
    ) -> list[Tensor] | None:
        """What `Diffusion.forward` gets in step `step` of `steps`: the sum of all controls' residuals, or None if none
        is at work. The others are the U-Net's arguments, with the unconditional half first if `guided`."""
        total = None
        for control, features in zip(self.controls, self.features):
            if not control.works(step, steps):
                continue
            alone = guided and (control.guess_mode or control.net.global_pool)  # the half with the prompt
            rows = slice(len(latents) // 2 if alone else 0, None)
            device, dtype = device_and_dtype(control.net)
            inputs = latents[rows].to(device, dtype), context[rows].to(device, dtype), timesteps[rows].to(device)
            residuals = control.residuals(*inputs, features)
            when = f" at step {step + 1} of {steps}"
            check_finite(residuals[-1], control.net, "ControlNet", latents, when)  # whatever fails before reaches it
            residuals = [residual.to(latents) for residual in residuals]
            if alone:
                residuals = [torch.cat([torch.zeros_like(residual), residual]) for residual in residuals]
            total = residuals if total is None else [a + b for a, b in zip(total, residuals)]
        return total


def _hint(image: ImageSource, height: int, width: int, region: Region | None) -> Tensor:
    """A control image -> float32 (1, 3, height, width) in [0, 1]."""
    image = read_image(image, behind="black", name="control.image")
    if region is not None:
        whole = image_to_tensor(image, *region.image.shape[:2])  # (1, 3, H, W)
        left, top, right, bottom = region.box
        part = whole[..., top:bottom, left:right]
        levels = nn.functional.interpolate(part, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    else:
        levels = image_to_tensor(image, height, width)
    return (levels + 1) / 2


def load_controlnet(
    path: str | Path,
    models: Models | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    global_pool: bool | None = None,
) -> ControlNet:
    """The ControlNet of a file or folder, ready to run, in evaluation mode and without gradients.

    `path`: a .pth or .safetensors file as published, with or without a whole model in it, a file or folder in the
        layout of diffusers, or a name on the hub (`sd.checkpoints.hub`).
    `models`: those it is for. It gets their device and dtype. Files that hold differences from a model need them.
    `device`, `dtype`: others, or without `models` the same defaults as for `load_models`.
    `global_pool`: use the mean over each residual. By default it follows from a folder's config.json, and for a file
        from a name that ends in _shuffle.

    Raises FileNotFoundError, CheckpointError for a file that is not a ControlNet or belongs to another family than the
    models, TypeError for a path of another type, ValueError for an invalid device or dtype, and what `hub.fetch`
    raises.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"control should be the path of a file or a folder, not {path!r:.80}.")
    packs = None
    if models is not None:
        device, dtype = device or models.device, dtype or device_and_dtype(models.diffusion)[1]
        packs = any(isinstance(module, speed.PackedConvolution) for module in models.diffusion.modules())
    device = best_device(device)
    dtype = best_dtype(device, dtype)
    source, path = path, hub.fetch(path, dtype.itemsize == 2) if hub.is_name(path) else Path(path)
    with name_in_errors(path, argument="control: "):
        checkpoint = _read(path)
        config, pools = _configuration(checkpoint, path, models)
        with torch.device("meta"), NoInitialisation():
            network = ControlNet(config, pools if global_pool is None else global_pool)
        weights = _weights(checkpoint, network, models)
    network.source = source
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False)
    pack = speed.can_pack(device, dtype) if packs is None else packs and speed.can_pack(device, dtype)
    speed.place_network(network, device, dtype, pack)
    checkpoint.release()
    return network


def _read(path: Path) -> Checkpoint:
    """The tensors of a file or folder under the keys of the published files, without a prefix.

    Raises CheckpointError, which says what the file is, if it is not a ControlNet.
    """
    file = path
    if path.is_dir():
        if class_name(path) not in ("ControlNetModel", None) or not (path / "config.json").is_file():
            kind = class_name(path) or "something else"
            raise CheckpointError(f"This folder should be that of a ControlNetModel, with its config.json, not {kind}.")
        file = find_weights(path, "unet")
    checkpoint = read_shards(file) if file.name.endswith(INDEX) else read_checkpoint(file)
    keys = without_wrappers(checkpoint.state).keys()
    prefix = PREFIX if any(key.startswith(PREFIX) for key in keys) else ""
    description = next((what for pattern, what in OTHER_CONTROLS if any(re.search(pattern, key) for key in keys)), None)
    if description is None and not any("zero_convs." in key or key.startswith("controlnet_down_") for key in keys):
        description = other_file(keys) or "has no zero convolutions, as ControlNets have; it may make control images"
    if description:
        raise CheckpointError(f"This file {description}; give a ControlNet of Stable Diffusion 1.x or 2.x.")

    def own(entries: dict) -> dict:
        entries = {key: value for key, value in without_wrappers(entries).items() if key.startswith(prefix)}
        return {key.removeprefix(prefix): value for key, value in entries.items()}

    marks = {key: value for key, value in checkpoint.state.items() if key == DIFFERENCE}
    return replace(checkpoint, state=own(checkpoint.state) | marks, unreadable=own(checkpoint.unreadable))


def _configuration(checkpoint: Checkpoint, path: Path, models: Models | None) -> tuple[UNetConfig, bool]:
    """The sizes of a ControlNet, and whether its residuals are pooled: from config.json if there is one, or else those
    of the models, or of the published models with this context. Raises CheckpointError for another family's."""
    widths = {tensor.shape[1] for key, tensor in checkpoint.state.items() if "attn2.to_k" in key and tensor.ndim == 2}
    width = min(widths, default=None)
    folder = path if path.is_dir() else path.parent
    pools = re.search(r"_shuffle(_fp16)?$", path.stem) is not None
    if _is_diffusers(checkpoint.state) and (folder / "config.json").is_file():
        values = read_json(folder / "config.json")
        order = values.get("controlnet_conditioning_channel_order", "rgb")
        if order != "rgb":
            raise foreign(folder / "config.json", "controlnet_conditioning_channel_order", "'rgb'", order)
        fields = fields_of(folder, "unet")
        fields.pop("side", None)
        config = ModelConfig.from_dict({"unet": fields}).unet
        if config.in_channels != config.out_channels:
            raise foreign(folder / "config.json", "in_channels", str(config.out_channels), config.in_channels)
        pools = values.get("global_pool_conditions") is True
        check_config(replace(SD15, text=replace(SD15.text, width=config.context_width, heads=1), unet=config))
    else:
        known = (SD2 if width == SD2.unet.context_width else SD15).unet
        known = known if models is None else models.config.unet
        config = replace(known, in_channels=known.out_channels, context_width=width or known.context_width)
    if models is not None:
        _check_family(config, models.config.unet)
    return config, pools


def _check_family(config: UNetConfig, unet: UNetConfig) -> None:
    """Raises CheckpointError unless a ControlNet of this configuration fits this U-Net."""

    def shape(sizes: UNetConfig) -> tuple:
        return sizes.context_width, sizes.channels, sizes.attention, sizes.blocks_per_level, sizes.out_channels

    def described(sizes: UNetConfig) -> str:
        family = FAMILIES.get(sizes.context_width, "another model")
        return f"{family} (context of {sizes.context_width}, channels {', '.join(map(str, sizes.channels))})"

    if shape(config) != shape(unet):
        raise CheckpointError(
            f"The ControlNet should be one for {described(unet)}, like the model, not for {described(config)}."
        )


def _is_diffusers(state: dict[str, Tensor]) -> bool:
    return any(key.startswith("controlnet_") for key in state)


def _weights(checkpoint: Checkpoint, network: ControlNet, models: Models | None) -> dict[str, Tensor]:
    """The state dict of the network. Raises CheckpointError, which lists what is missing, unknown or misshapen."""
    state, unreadable = checkpoint.state, checkpoint.unreadable
    if _is_diffusers(state):

        def theirs(key: str) -> str:
            return unet_name(rename(key, DIFFUSERS_RULES), network.config)

        state, unreadable = ({theirs(key): x for key, x in each.items()} for each in (state, unreadable))
    is_difference = DIFFERENCE in state
    # In files of float8, some numbers are scales. Those of a whole model had other prefixes.
    weights = {key: x for key, x in state.items() if key != DIFFERENCE and not key.endswith(("scale_weight", "fp8"))}
    rules = RULES + UNET_RULES
    empty = split_qkv(network.state_dict())
    shapes = {rename(name, inverse(rules)): tensor.shape for name, tensor in empty.items()}
    check_fit(weights, shapes, unreadable, lambda _: "ControlNet")
    ours = {}
    for key, tensor in weights.items():
        ours[rename(key, rules)] = from_float8(key, tensor, state).reshape(shapes[key])
    ours = fuse_qkv(ours)
    return _add_base(ours, models) if is_difference else ours


def _add_base(weights: dict[str, Tensor], models: Models | None) -> dict[str, Tensor]:
    """Differences from a model -> the weights: whatever the U-Net has, too, is added. Zero convolutions are whole."""
    if models is None:
        raise CheckpointError("This ControlNet holds differences from its base model: give that as models=.")
    base = models.diffusion.state_dict()
    first = "down.0.0.weight"
    if base[first].shape != weights[first].shape:
        raise CheckpointError("The base of this ControlNet should be a model that is not for inpainting.")
    return {
        name: difference.float() + base[name].cpu().float() if name in base else difference
        for name, difference in weights.items()
    }
