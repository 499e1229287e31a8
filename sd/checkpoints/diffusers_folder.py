"""A folder in the layout of diffusers -> the same weights in the one layout that `model_converter` reads.

In: a folder with a folder for each network, which holds its weights and its `config.json`:

    unet/           diffusion_pytorch_model.safetensors  config.json
    vae/            diffusion_pytorch_model.safetensors  config.json
    text_encoder/   model.safetensors                    config.json
    scheduler/                                           scheduler_config.json

Out: a `Checkpoint` with the keys of the CompVis file, and the configuration that the four JSON files describe.

The two layouts name the same tensors after different trees. CompVis numbers all stages of the U-Net in one sequence,
input_blocks.0 to 11. diffusers counts levels, and in each level its residual blocks, its transformers and its resizers.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.key_rules import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, rename
from sd.config import ModelConfig, UNetConfig

NETWORKS = ("unet", "vae", "text_encoder")
UNET_LEVELS = ("CrossAttnDownBlock2D", "DownBlock2D")  # with attention, and without
MAX_JSON_BYTES = 1 << 20

# Values in config.json that every Stable Diffusion 1.x has. They may be absent; other values mean other computations.
FIXED = {
    "unet": {
        "act_fn": "silu",
        "addition_embed_type": None,
        "center_input_sample": False,
        "class_embed_type": None,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "use_linear_projection": False,
    },
    "vae": {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "shift_factor": None, "latents_mean": None},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {"rescale_betas_zero_snr": False, "trained_betas": None},
}

# The fields of a ModelConfig: our name, their name.
FIELDS = {
    "unet": {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "channels": "block_out_channels",
        "attention": "down_block_types",  # the kind of each level: with or without attention
        "blocks_per_level": "layers_per_block",
        "heads": "attention_head_dim",  # the number of heads, in spite of its name
        "groups": "norm_num_groups",
        "context_width": "cross_attention_dim",
        "side": "sample_size",  # of the latents; gives the image size
    },
    "vae": {
        "channels": "block_out_channels",
        "blocks_per_level": "layers_per_block",
        "latent_channels": "latent_channels",
        "groups": "norm_num_groups",
        "scaling_factor": "scaling_factor",
    },
    "text_encoder": {
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
    },
    "scheduler": {
        "num_training_steps": "num_train_timesteps",
        "beta_start": "beta_start",
        "beta_end": "beta_end",
        "beta_schedule": "beta_schedule",
        "prediction_type": "prediction_type",
    },
}

# Pairs (diffusers, CompVis), in the notation of `key_rules`.
UNET_RULES = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("resnets.#.norm1", "resnets.#.in_layers.0"),
    ("resnets.#.conv1", "resnets.#.in_layers.2"),
    ("resnets.#.time_emb_proj", "resnets.#.emb_layers.1"),
    ("resnets.#.norm2", "resnets.#.out_layers.0"),
    ("resnets.#.conv2", "resnets.#.out_layers.3"),
    ("resnets.#.conv_shortcut", "resnets.#.skip_connection"),
    ("downsamplers.#.conv", "downsamplers.#.op"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
]
VAE_RULES = [
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    # attention: the names in older files, then those in newer ones
    *[("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")],
    *[("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("group_norm", "norm")],
]
UNET_STAGE = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)")
VAE_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d{1,3})\.(.+)")


def read_folder(path: Path) -> Checkpoint:
    """The weights and the configuration of a folder, mapped into memory like `read_checkpoint` does.

    The folder of a lone VAE gives a checkpoint of the VAE only. Raises CheckpointError, which names the file, if a
    network or its config.json is missing or damaged, or does not belong to Stable Diffusion 1.x; and whatever
    `read_checkpoint` raises.
    """
    if is_vae_folder(path):
        file = read_checkpoint(_weights(path))
        return Checkpoint(_vae_state(file), {"vae": _fields(path, "vae")}, file.mappings)
    if missing := [name for name in NETWORKS if not (path / name / "config.json").is_file()]:
        raise CheckpointError(
            f"{path} is a folder without {missing[0]}/config.json; give a .ckpt or .safetensors file, or a folder in "
            "the layout of diffusers, with unet, vae and text_encoder."
        )
    config = _read_config(path)
    files = {name: read_checkpoint(_weights(path / name)) for name in NETWORKS}
    unet = {UNET_PREFIX + unet_name(key, config.unet): tensor for key, tensor in files["unet"].state.items()}
    text = {CLIP_PREFIX + key: tensor for key, tensor in files["text_encoder"].state.items()}
    mappings = sum((file.mappings for file in files.values()), ())
    return Checkpoint(unet | _vae_state(files["vae"]) | text, config.to_dict(), mappings)


def is_vae_folder(path: Path) -> bool:
    """Whether this is the folder of a lone VAE rather than of a whole model."""
    return (path / "config.json").is_file() and not (path / "unet").exists()


def unet_name(key: str, config: UNetConfig) -> str:
    """down_blocks.0.resnets.0.norm1.weight -> input_blocks.1.0.in_layers.0.weight. Other keys stay unchanged."""
    key = rename(key, UNET_RULES)
    match = UNET_STAGE.fullmatch(key)
    if match is None:
        return key
    side, level, kind, number, rest = match.groups()
    blocks, attends = config.blocks_per_level, dict(enumerate(reversed(config.attention)))
    # Down, a level has `blocks` stages, then one that halves. Up, it has one more stage; its last one also doubles.
    stage = int(level) * (blocks + 1) + (blocks if kind.endswith("samplers") else int(number))
    if side == "down":
        stage += 1  # stage 0 is conv_in
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2 if attends.get(int(level)) else 1}[kind]
    return f"{'input' if side == 'down' else 'output'}_blocks.{stage}.{slot}.{rest}"


def vae_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a VAE, decoder.up_blocks.0.resnets.0.norm1.weight -> decoder.up.3.block.0.norm1.weight."""
    # On the way up, diffusers counts levels from the coarsest; CompVis counts from the finest on both ways.
    last = max((int(level) for level in re.findall(r"\.up_blocks\.(\d{1,3})\.", "\n".join(state))), default=0)

    def renamed(key: str) -> str:
        if match := VAE_LEVEL.fullmatch(key):
            network, side, level, rest = match.groups()
            key = f"{network}.{side}.{last - int(level) if side == 'up' else level}.{rest}"
        return rename(key, VAE_RULES)

    return {renamed(key): tensor for key, tensor in state.items()}


def is_diffusers_vae(state: dict[str, Tensor]) -> bool:
    """Whether these are the keys of a VAE in the layout of diffusers."""
    return any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in state)


def _vae_state(file: Checkpoint) -> dict[str, Tensor]:
    return {VAE_PREFIX + key: tensor for key, tensor in vae_names(file.state).items()}


def _weights(folder: Path) -> Path:
    """The file with a network's weights: safetensors before .bin, full precision before float16."""
    for suffix in (".safetensors", ".bin"):
        files = [file for file in folder.glob(f"*{suffix}") if not re.search(r"non_ema|-of-\d+", file.name)]
        if files:
            return min(files, key=lambda file: (len(file.name), file.name))  # "model", before "model.fp16"
    raise CheckpointError(f"{folder} has no weights: it should hold a .safetensors or .bin file that is not split.")


def _read_config(path: Path) -> ModelConfig:
    parts = {name: _fields(path / name, name) for name in (*NETWORKS, "scheduler")}
    side = parts["unet"].pop("side", None)
    values = {"text": parts["text_encoder"], "schedule": parts["scheduler"], "unet": parts["unet"], "vae": parts["vae"]}
    config = ModelConfig.from_dict(values)
    return replace(config, image_size=side * config.vae.downscale) if type(side) is int and side > 0 else config


def _fields(folder: Path, name: str) -> dict[str, object]:
    """What a JSON file says, under the field names of config.py."""
    path = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
    if name == "scheduler" and not path.is_file():
        return {}
    values = _read_json(path, FIXED[name])
    fields = {ours: values[theirs] for ours, theirs in FIELDS[name].items() if theirs in values}
    if name == "unet" and "attention" in fields:
        kinds = fields["attention"]
        if not isinstance(kinds, list) or any(kind not in UNET_LEVELS for kind in kinds):
            raise _foreign(path, FIELDS["unet"]["attention"], f"a list of {UNET_LEVELS}", kinds)
        fields["attention"] = [kind == UNET_LEVELS[0] for kind in kinds]
    return fields


def _read_json(path: Path, fixed: dict[str, object]) -> dict:
    """The values in a JSON file. Raises CheckpointError if it is damaged, or if a value differs from `fixed`."""
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it should hold a JSON object; download it again.")
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise _foreign(path, name, repr(value), values[name])
    return values


def _foreign(path: Path, name: str, expected: str, value: object) -> CheckpointError:
    return CheckpointError(f"{path}: {name} should be {expected}, as in Stable Diffusion 1.x, not {value!r:.80}.")
