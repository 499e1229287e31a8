"""A folder in the layout of diffusers -> the same weights in the one layout that `model_converter` knows.

In: a folder with a folder for each network, which holds its weights and its `config.json`:

    unet/           diffusion_pytorch_model.safetensors  config.json
    vae/            diffusion_pytorch_model.safetensors  config.json
    text_encoder/   model.safetensors                    config.json
    scheduler/                                           scheduler_config.json

Out: a `Checkpoint` with the keys of the CompVis file and the configuration that the four descriptions add up to.

The two layouts name the same tensors after different trees. CompVis numbers the U-Net's stages in one row,
input_blocks.0 to 11; diffusers counts levels, and in each of them its blocks, its transformers and what resizes.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.files import read_checkpoint
from sd.config import ModelConfig, UNetConfig

NETWORKS = ("unet", "vae", "text_encoder")
UNET_LEVELS = ("CrossAttnDownBlock2D", "DownBlock2D")  # with attention, and without
MAX_JSON_BYTES = 1 << 20

# What a network of Stable Diffusion 1.x has in its config.json, if it says anything of it; others compute otherwise.
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

# Their names of the numbers that a ModelConfig holds, under ours.
FIELDS = {
    "unet": {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "channels": "block_out_channels",
        "attention": "down_block_types",  # the kinds of the levels, of which one attends
        "blocks_per_level": "layers_per_block",
        "heads": "attention_head_dim",  # the number of heads, in spite of its name
        "groups": "norm_num_groups",
        "context_width": "cross_attention_dim",
        "side": "sample_size",  # of the latents: says how large the pictures are
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

# Pairs: diffusers' name, CompVis's name. Each replaces whole dotted segments of a key.
UNET_NAMES = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
]
UNET_BLOCK_NAMES = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
VAE_NAMES = [
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    # attention, as older files name it and as newer ones do
    *[("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")],
    *[("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("group_norm", "norm")],
]
UNET_PLACE = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)")
VAE_LEVEL = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(.+)")


def read_folder(path: Path) -> Checkpoint:
    """The weights and the configuration of a folder, mapped into memory as `read_checkpoint` does.

    A folder that holds a VAE itself gives a checkpoint of that alone. Raises CheckpointError, which names the file, if
    a network or its description is missing or damaged, or if it is not one of Stable Diffusion 1.x; and what
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
    unet = {f"model.diffusion_model.{unet_name(key, config.unet)}": t for key, t in files["unet"].state.items()}
    text = {f"cond_stage_model.transformer.{key}": t for key, t in files["text_encoder"].state.items()}
    mappings = sum((file.mappings for file in files.values()), ())
    return Checkpoint(unet | _vae_state(files["vae"]) | text, config.to_dict(), mappings)


def is_vae_folder(path: Path) -> bool:
    """Whether it is a VAE's own folder, and not one of a whole model."""
    return (path / "config.json").is_file() and not (path / "unet").exists()


def unet_name(key: str, config: UNetConfig) -> str:
    """down_blocks.0.resnets.0.norm1.weight -> input_blocks.1.0.in_layers.0.weight. A key that fits no rule is kept."""
    match = UNET_PLACE.fullmatch(key)
    if match is None:
        return _renamed(key, UNET_NAMES + UNET_BLOCK_NAMES if ".resnets." in key else UNET_NAMES)
    side, level, kind, number, rest = match.groups()
    blocks, attends = config.blocks_per_level, dict(enumerate(reversed(config.attention)))
    # Down, a level has `blocks` stages and one that halves; up, it has one more, the last of which doubles as well.
    stage = int(level) * (blocks + 1) + (blocks if kind.endswith("samplers") else int(number))
    if side == "down":
        stage += 1  # conv_in is the first
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2 if attends.get(int(level)) else 1}[kind]
    names = {"resnets": UNET_BLOCK_NAMES, "downsamplers": [("conv", "op")]}.get(kind, [])
    return f"{'input' if side == 'down' else 'output'}_blocks.{stage}.{slot}.{_renamed(rest, names)}"


def vae_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a VAE, decoder.up_blocks.0.resnets.0.norm1.weight -> decoder.up.3.block.0.norm1.weight."""
    # Going up, diffusers counts the levels from the coarsest, CompVis from the finest as on the way down.
    last = max((int(level) for level in re.findall(r"\.up_blocks\.(\d{1,3})\.", "\n".join(state))), default=0)

    def renamed(key: str) -> str:
        network, _, rest = key.partition(".")
        if match := VAE_LEVEL.fullmatch(rest):
            side, level, rest = match.groups()
            rest = f"{side}.{last - int(level) if side == 'up' else level}.{rest}"
        return f"{network}.{_renamed(rest, VAE_NAMES)}"

    return {renamed(key): tensor for key, tensor in state.items()}


def is_diffusers_vae(state: dict[str, Tensor]) -> bool:
    """Whether these are the keys of a VAE in the layout of diffusers."""
    return any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in state)


def _vae_state(file: Checkpoint) -> dict[str, Tensor]:
    return {f"first_stage_model.{key}": tensor for key, tensor in vae_names(file.state).items()}


def _renamed(key: str, names: list[tuple[str, str]]) -> str:
    for diffusers, compvis in names:
        key = re.sub(rf"(?<![^.]){re.escape(diffusers)}(?![^.])", compvis, key)
    return key


def _weights(folder: Path) -> Path:
    """The file with a network's weights: safetensors if there is one, of the widest precision."""
    for suffix in (".safetensors", ".bin"):
        files = [file for file in folder.glob(f"*{suffix}") if not re.search(r"non_ema|-of-\d+", file.name)]
        if files:
            return min(files, key=lambda file: (len(file.name), file.name))  # "model", before "model.fp16"
    raise CheckpointError(f"{folder} has no weights: it should hold a .safetensors or a .bin file, in one piece.")


def _read_config(path: Path) -> ModelConfig:
    parts = {name: _fields(path / name, name) for name in (*NETWORKS, "scheduler")}
    side = parts["unet"].pop("side", None)
    values = {"text": parts["text_encoder"], "schedule": parts["scheduler"], "unet": parts["unet"], "vae": parts["vae"]}
    config = ModelConfig.from_dict(values)
    return replace(config, image_size=side * config.vae.downscale) if type(side) is int and side > 0 else config


def _fields(folder: Path, name: str) -> dict[str, object]:
    """What a description says, under the names that the classes of config.py have for it."""
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
    """The values of a description. Raises CheckpointError if it is damaged, or if one of them is not as `fixed`."""
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
