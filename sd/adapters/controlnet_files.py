"""A file or folder -> a `ControlNet` ready to run: the names of the original code and of diffusers, whole or as
differences from a model. What other files are, the errors say.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sd.adapters.controlnet import ControlNet
from sd.adapters.other_files import what_it_is
from sd.checkpoints import hub
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.config_rules import check_config
from sd.checkpoints.diffusers_folder import fields_of, foreign, unet_name
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.folder_files import class_name, find_weights, read_json
from sd.checkpoints.key_rules import inverse, rename, without_wrappers
from sd.checkpoints.shards import INDEX, read_shards
from sd.checkpoints.whole_model import name_in_errors
from sd.config import SD2, SD15, ModelConfig, UNetConfig
from sd.model_converter import UNET_RULES, check_fit, from_float8, fuse_qkv, split_qkv
from sd.models import Models, NoInitialisation
from sd.runtime import speed
from sd.runtime.devices import Device, best_device, best_dtype, device_and_dtype

PREFIX = "control_model."  # of all keys in the published files, beside which a whole model may stand
DIFFUSERS_FILE = "diffusion_pytorch_model"  # what diffusers calls each of its files
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
        from a name that ends in _shuffle. A name that ends in _inpaint means `ControlNet.inpaints`.

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
            network = ControlNet(config, pools if global_pool is None else global_pool, ends_in("inpaint", source))
        weights = _weights(checkpoint, network, models)
    network.source = source
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False)
    pack = speed.can_pack(device, dtype) if packs is None else packs and speed.can_pack(device, dtype)
    speed.place_network(network, device, dtype, pack)
    checkpoint.release()
    return network


def ends_in(kind: str, source: str | os.PathLike) -> bool:
    """Whether a file, folder or model on the hub has a name such as control_v11p_sd15_inpaint, or ..._inpaint_fp16.pth,
    for the kind "inpaint"."""
    path = Path(source)
    name = path.parent.name if path.name.startswith(DIFFUSERS_FILE) else path.name
    return re.search(rf"_{kind}(_fp16)?(\.\w+)*(@[^:]*)?$", name, re.IGNORECASE) is not None


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
        description = what_it_is(keys) or "has no zero convolutions, as ControlNets have; it may make control images"
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
    pools = ends_in("shuffle", path)
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
        check_family(config, models.config.unet)
    return config, pools


def check_family(config: UNetConfig, unet: UNetConfig) -> None:
    """Raises CheckpointError unless a ControlNet of this configuration fits this U-Net."""

    def shape(sizes: UNetConfig) -> tuple:
        return sizes.context_width, sizes.channels, sizes.attention, sizes.blocks_per_level, sizes.out_channels

    def described(sizes: UNetConfig) -> str:
        family = FAMILIES.get(sizes.context_width, "a model")
        channels = f", channels {', '.join(map(str, sizes.channels))}" if config.channels != unet.channels else ""
        return f"{family} (context of {sizes.context_width}{channels})"

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
