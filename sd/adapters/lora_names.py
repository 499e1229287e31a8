"""The names in LoRA files -> our layers, and what each tensor is for.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight        kohya's trainer, and most files
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight                diffusers today, as PEFT names it
    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight    diffusers in 2023

A name has three parts: the network, the path of the layer in diffusers' U-Net or in transformers' text encoder, and the
tensor's part in the formula. Kohya's path has underscores in place of dots, and no rule can undo that: `to_out_0` is
to_out.0, and not to.out.0. So we walk our own layers, write each one's name in every way that files have it, and look
names up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from sd.checkpoints.diffusers_folder import UNET_RULES
from sd.checkpoints.key_rules import CLIP_PREFIX, UNET_PREFIX, inverse, rename
from sd.config import UNetConfig
from sd.model_converter import split_qkv, to_their_name

CHANGEABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
STAGE = re.compile(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)")

# How a key ends -> the tensor's part in the formulas of lora.py. PEFT may put an adapter's name before ".weight".
PARTS = {
    r"\.lora_(up|B(\.\w+)?)\.weight|(\.lora|\.lora_linear_layer|_lora)\.up\.weight": "up",
    r"\.lora_(down|A(\.\w+)?)\.weight|(\.lora|\.lora_linear_layer|_lora)\.down\.weight": "down",
    r"\.lora_mid\.weight": "mid",
    r"\.lora_magnitude_vector(\.\w+){0,2}": "magnitude",
    r"\.w_norm": "diff",
    r"\.b_norm": "diff_b",
}
SAME_NAME = re.compile(r"(.+)\.(alpha|dora_scale|diff|diff_b|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)")
ENDINGS = [(re.compile(f"(?P<layer>.+?)(?:{ending})"), part) for ending, part in PARTS.items()]

# Older names of layers -> those of today, in the notation of `key_rules`.
OLD_NAMES = [
    ("base_model.model.", ""),
    ("processor.to_out", "to_out.0"),
    *[(f"processor.to_{part}", f"to_{part}") for part in "qkv"],
    *[(f"self_attn.to_{part}", f"self_attn.{part}_proj") for part in "qkv"],
    ("self_attn.to_out", "self_attn.out_proj"),
]


@dataclass(frozen=True)
class Layer:
    """A layer that a LoRA may change. Queries, keys and values are three layers in files and one matrix here."""

    network: str  # "diffusion" or "clip"
    module: str  # down.1.1.self_attention.qkv
    first_row: int  # of the module's weight
    shape: torch.Size  # of the layer's own weight
    has_bias: bool
    path: str  # in diffusers or transformers, with dots


def layer_names(networks: dict[str, nn.Module], config: UNetConfig) -> dict[str, Layer]:
    """All names that files have for the layers of `networks`, {"clip": ..., "diffusion": ...}, perhaps without memory.

    They are names with dots, and kohya's with underscores. Both follow the layers of diffusers' U-Net, and those
    of the original one.
    """
    names = {}
    for network in ("clip", "diffusion"):
        modules = {name: module for name, module in networks[network].named_modules() if isinstance(module, CHANGEABLE)}
        weights = {f"{network}.{name}.weight": module.weight for name, module in modules.items()}
        for key, weight in split_qkv(weights).items():
            module, _, part = key.removeprefix(f"{network}.").removesuffix(".weight").partition(".qkv.")
            module, first_row = (f"{module}.qkv", "qkv".index(part) * len(weight)) if part else (module, 0)
            theirs = to_their_name(key).removesuffix(".weight")
            if network == "clip":  # CLIP's names also for OpenCLIP, which trainers convert
                path = theirs.removeprefix(CLIP_PREFIX)
                dotted = (path, path.removeprefix("text_model."))
                prefixes = ("lora_te_", "lora_te1_", "text_encoder.")
            else:
                theirs = theirs.removeprefix(UNET_PREFIX)
                path = diffusers_name(theirs, config)
                dotted, prefixes = (path, theirs), ("lora_unet_", "unet.")
            has_bias = modules[module].bias is not None
            layer = Layer(network, module, first_row, weight.shape, has_bias, path)
            for name in dotted:
                names[name] = layer
                for prefix in prefixes:
                    names[prefix + (name if prefix.endswith(".") else name.replace(".", "_"))] = layer
    return names


def diffusers_name(name: str, config: UNetConfig) -> str:
    """input_blocks.1.1.proj_in -> down_blocks.0.attentions.0.proj_in: the inverse of `diffusers_folder.unet_name`."""
    match = STAGE.fullmatch(name)
    if match and not name.startswith("input_blocks.0."):  # that is conv_in
        side, stage, slot, rest = match.groups()
        down = side == "input"
        level, number = divmod(int(stage) - down, config.blocks_per_level + 1)
        attends = (config.attention if down else config.attention[::-1])[level]
        kind = "resnets" if slot == "0" else "attentions" if slot == "1" and attends else "upsamplers"
        if down and number == config.blocks_per_level:
            kind = "downsamplers"
        number = 0 if kind.endswith("samplers") else number
        name = f"{'down' if down else 'up'}_blocks.{level}.{kind}.{number}.{rest}"
    return rename(name, inverse(UNET_RULES))


def split_key(key: str) -> tuple[str, str] | None:
    """A key of a file -> the name of a layer, as in `layer_names`, and the tensor's part. None for any other key."""
    if match := SAME_NAME.fullmatch(key):
        return rename(match[1], OLD_NAMES), match[2]
    for ending, part in ENDINGS:
        if match := ending.fullmatch(key):
            return rename(match["layer"], OLD_NAMES), part
    return None
