"""ControlNets with random weights, and files of them in every layout that people share."""

import copy
import re
from functools import cache

import torch

from scripts.benchmarks.synthetic_checkpoint import random_weight
from sd.adapters.controlnet import ControlNet
from sd.adapters.controlnet_files import PREFIX, RULES
from sd.checkpoints.key_rules import inverse, rename
from sd.config import UNetConfig
from sd.model_converter import CONVOLUTIONS_1X1, UNET_RULES, fuse_qkv, split_qkv
from sd.models import NoInitialisation

# CompVis' names of a ControlNet's parts -> those of diffusers, written out: the rules of `sd` are tested against these.
PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0.": "controlnet_cond_embedding.conv_in.",
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
}


def random_controlnet(config: UNetConfig, seed: int = 0, global_pool: bool = False) -> ControlNet:
    """A ControlNet with random weights that keep activations at unit scale."""
    make = _small if max(config.channels) <= 64 else _make
    return copy.deepcopy(make(config, seed, global_pool))


def _make(config: UNetConfig, seed: int, global_pool: bool) -> ControlNet:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"), NoInitialisation():
        network = ControlNet(config, global_pool)
    state = {
        name: random_weight(name, tensor.shape, generator) for name, tensor in split_qkv(network.state_dict()).items()
    }
    network.load_state_dict(fuse_qkv(state), assign=True)
    return network.eval().requires_grad_(False)


_small = cache(_make)


def cldm_state(network: ControlNet, prefix: str = PREFIX, kernels: bool = True) -> dict[str, torch.Tensor]:
    """Its tensors as in the published files; with `kernels`, as for SD 1.5, projections are 1x1 convolutions."""
    state = {}
    for name, tensor in split_qkv(network.state_dict()).items():
        key = rename(name, inverse(RULES + UNET_RULES))
        kernel = kernels and CONVOLUTIONS_1X1.search(key)
        state[prefix + key] = tensor[:, :, None, None] if kernel else tensor
    return state


def diffusers_name(key: str) -> str:
    """input_blocks.4.1.proj_in.weight -> down_blocks.1.attentions.0.proj_in.weight, for two blocks a level."""
    for old, new in PARTS.items():
        key = key.replace(old, new)
    key = re.sub(r"zero_convs\.(\d+)\.0", r"controlnet_down_blocks.\1", key)
    key = re.sub(r"input_hint_block\.(\d+)", lambda m: f"controlnet_cond_embedding.blocks.{int(m[1]) // 2 - 1}", key)
    if not (place := re.match(r"input_blocks\.(\d+)\.(\d)\.(op\.)?", key)):
        return key
    level, layer = divmod(int(place[1]) - 1, 3)
    kind = "downsamplers.0.conv." if place[3] else f"{('resnets', 'attentions')[int(place[2])]}.{layer}."
    return f"down_blocks.{level}.{kind}{key[place.end() :]}"


def diffusers_config(config: UNetConfig, **more: object) -> dict:
    """The config.json of a ControlNet in the layout of diffusers."""
    heads = config.heads if config.head_width is None else [config.heads_of(width) for width in config.channels]
    return {
        "_class_name": "ControlNetModel",
        "in_channels": config.in_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention],
        "layers_per_block": config.blocks_per_level,
        "attention_head_dim": heads,
        "cross_attention_dim": config.context_width,
        "norm_num_groups": config.groups,
        "use_linear_projection": config.head_width is not None,
    } | more
