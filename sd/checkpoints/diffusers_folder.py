"""A folder in the layout of diffusers -> the same weights in the one layout that `model_converter` reads.

In: a folder with a folder for each network, which holds its weights and its `config.json`:

    unet/           diffusion_pytorch_model.safetensors  config.json
    vae/            diffusion_pytorch_model.safetensors  config.json
    text_encoder/   model.safetensors                    config.json
    scheduler/                                           scheduler_config.json
    tokenizer/                                           words that textual inversion has added

Out: a `Checkpoint` with the keys of the CompVis file, and the configuration that the four JSON files describe.

The two layouts name the same tensors after different trees. CompVis numbers all stages of the U-Net in one sequence,
input_blocks.0 to 11. diffusers counts levels, and in each level its residual blocks, its transformers and its resizers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.folder_files import class_name, find_weights, read_added_words, read_json
from sd.checkpoints.key_rules import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, Value, rename, without_wrappers
from sd.checkpoints.self_description import warn_of_unnamed_words
from sd.checkpoints.shards import read_shards
from sd.config import LCM_SAMPLING, PREDICTION_TYPES, SD_TURBO, ModelConfig, TextConfig, UNetConfig
from sd.runtime import warn

NETWORKS = ("unet", "vae", "text_encoder")
ADAPTERS = {  # the classes of networks that are used with a model
    "ControlNetModel": "is the folder of a ControlNet: give it as `control=`",
    "AutoencoderTiny": "is the folder of a tiny autoencoder: give it as `vae=`",
}
TURBO_SCHEDULER = "EulerDiscreteScheduler"  # with trailing timesteps and OpenCLIP's text encoder: SD-Turbo
UNET_LEVELS = ("CrossAttnDownBlock2D", "DownBlock2D")  # with attention, and without

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
    },
    "vae": {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "shift_factor": None, "latents_mean": None},
    "text_encoder": {"layer_norm_eps": 1e-5},
    "scheduler": {"trained_betas": None},
}

# Values that may be one of several.
CHOICES = {
    "text_encoder": {"hidden_act": ("quick_gelu", "gelu")},
    "scheduler": {"prediction_type": PREDICTION_TYPES, "beta_schedule": ("scaled_linear", "linear")},
}

# What a folder holds if the name of its pipeline contains one of these.
OTHER_PIPELINES = {
    "XL": "Stable Diffusion XL",
    "Diffusion3": "Stable Diffusion 3",
    "Flux": "FLUX",
    "PixArt": "PixArt",
    "Depth2Img": "Stable Diffusion 2's depth model, whose U-Net also takes a map of depths",
    "Upscale": "Stable Diffusion 2's upscaler, whose U-Net also takes a small image",
    "InstructPix2Pix": "an InstructPix2Pix model, whose U-Net takes a second image",
    "UnCLIP": "Stable unCLIP, whose U-Net takes the embedding of an image",
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
        "guidance_width": "time_cond_proj_dim",
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
        "activation": "hidden_act",
    },
    "scheduler": {
        "num_training_steps": "num_train_timesteps",
        "beta_start": "beta_start",
        "beta_end": "beta_end",
        "beta_schedule": "beta_schedule",
        "prediction_type": "prediction_type",
        "rescale_betas_zero_snr": "rescale_betas_zero_snr",
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

    The folder of a lone VAE gives a checkpoint of the VAE only, and a model's folder may lack its VAE. Raises
    CheckpointError, which names the file, if another network or a config.json is missing or damaged, or does not belong
    to Stable Diffusion 1.x or 2.x; and whatever `read_checkpoint` raises.
    """
    if is_vae_folder(path):
        if (kind := class_name(path)) in ADAPTERS:
            raise CheckpointError(f"{path} {ADAPTERS[kind]}, beside a model.")
        if kind not in ("AutoencoderKL", None):
            raise CheckpointError(
                f"{path} is the folder of one network, {kind}; give the folder of a whole model, or of an "
                "AutoencoderKL as vae=."
            )
        file = _read_network(path, "vae")
        config = {"vae": fields_of(path, "vae")}
        return Checkpoint(_compvis_names("vae", file.state, ModelConfig()), config, file.mappings)
    pipeline = class_name(path, "model_index.json") or ""
    for part, model in OTHER_PIPELINES.items():
        if part in pipeline:
            raise CheckpointError(f"{path} is {model}; give a model of Stable Diffusion 1.x or 2.x.")
    networks = [name for name in NETWORKS if (path / name / "config.json").is_file()]
    if missing := [name for name in NETWORKS if name not in networks and name != "vae"]:
        raise CheckpointError(
            f"{path} is a folder without {missing[0]}/config.json; give a .ckpt or .safetensors file, or a folder in "
            "the layout of diffusers, with unet, vae and text_encoder."
        )
    config = _read_config(path, networks)
    words = _added_words(path, config.text)
    files = {name: _read_network(path / name, name) for name in networks}
    state, unreadable, mappings = {}, {}, ()
    for name, file in files.items():
        state |= _compvis_names(name, file.state, config)
        unreadable |= _compvis_names(name, file.unreadable, config)
        mappings += file.mappings
    # Without its scheduler, nothing in a folder says what a U-Net predicts. All of SD 1.x predict noise.
    guess = config.text.is_openclip and not (path / "scheduler" / "scheduler_config.json").is_file()
    return Checkpoint(
        state, config.to_dict(), mappings, unreadable=unreadable, added_words=words, prediction_guessed=guess
    )


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


def vae_names(state: dict[str, Value]) -> dict[str, Value]:
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


def _compvis_names(network: str, entries: dict[str, Value], config: ModelConfig) -> dict[str, Value]:
    """The entries of one network under the keys of the CompVis file."""
    entries = without_wrappers(entries)
    if network == "unet":
        return {UNET_PREFIX + unet_name(key, config.unet): value for key, value in entries.items()}
    if network == "vae":
        return {VAE_PREFIX + key: value for key, value in vae_names(entries).items()}
    return {CLIP_PREFIX + key: value for key, value in entries.items()}


def _read_network(folder: Path, name: str) -> Checkpoint:
    """The weights of one network, from one file or several."""
    path = find_weights(folder, name)
    return read_shards(path) if path.suffix == ".json" else read_checkpoint(path)


def _added_words(path: Path, config: TextConfig) -> dict[str, int]:
    """The words that textual inversion has added. Warns of words without a vector, and of vectors without a word."""
    if config.vocab_size < TextConfig.vocab_size:
        raise foreign(path / "text_encoder", "vocab_size", f"{TextConfig.vocab_size} or more", config.vocab_size)
    words = read_added_words(path / "tokenizer", TextConfig.vocab_size)
    known = {word: token for word, token in words.items() if token < config.vocab_size}
    for word in sorted(words.keys() - known.keys())[:1]:
        warn(f"The text encoder has no vector for the word {word!r:.80}: it is read as letters.")
    if config.vocab_size > TextConfig.vocab_size and not words:
        warn_of_unnamed_words(config.vocab_size)
    return known


def _read_config(path: Path, networks: list[str]) -> ModelConfig:
    parts = {name: fields_of(path / name, name) for name in (*networks, "scheduler")}
    side = parts["unet"].pop("side", None)
    values = {"text": parts["text_encoder"], "schedule": parts["scheduler"], "unet": parts["unet"]}
    values["vae"] = parts.get("vae", {})
    config = ModelConfig.from_dict(values)
    turbo = config.text.is_openclip and config.schedule == SD_TURBO.schedule
    if turbo and class_name(path / "scheduler", "scheduler_config.json") == TURBO_SCHEDULER:
        config = replace(config, sampling=SD_TURBO.sampling)
    if config.unet.guidance_width is not None:
        config = replace(config, sampling=LCM_SAMPLING)
    return replace(config, image_size=side * config.vae.downscale) if type(side) is int and side > 0 else config


def fields_of(folder: Path, name: str) -> dict[str, object]:
    """What a JSON file says, under the field names of config.py."""
    path = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
    if name == "scheduler" and not path.is_file():
        return {}
    values = read_json(path)
    for field, value in FIXED[name].items():
        if values.get(field, value) != value:
            raise foreign(path, field, repr(value), values[field])
    for field, choices in CHOICES.get(name, {}).items():
        if values.get(field, choices[0]) not in choices:
            raise foreign(path, field, " or ".join(map(repr, choices)), values[field])
    fields = {ours: values[theirs] for ours, theirs in FIELDS[name].items() if theirs in values}
    # Other spacings are left to the sampler, and with zero-terminal SNR all samplers start at the last timestep anyway.
    trailing = values.get("timestep_spacing") == "trailing" and not fields.get("rescale_betas_zero_snr")
    if name == "scheduler" and trailing:
        fields["timestep_spacing"] = "trailing"
    # diffusers before 0.9 wrote a wrong size, 32, for 512 x 512 pixels; its pipelines say so, too.
    early = re.match(r"0\.[0-8]\.", str(values.get("_diffusers_version")))
    if name == "unet" and early and fields.get("side") == 32:
        del fields["side"]
    if name == "text_encoder":
        fields["zero_padding"] = fields.get("activation") == "gelu"
    if name == "unet" and isinstance(heads := fields.get("heads"), list):
        same = len(heads) > 0 and heads == heads[:1] * len(heads)
        fields |= {"heads": heads[0]} if same else {"heads": UNetConfig.heads, "head_width": _head_width(path, fields)}
    if name == "unet" and "attention" in fields:
        kinds = fields["attention"]
        if not isinstance(kinds, list) or any(kind not in UNET_LEVELS for kind in kinds):
            raise foreign(path, FIELDS["unet"]["attention"], f"a list of {UNET_LEVELS}", kinds)
        fields["attention"] = [kind == UNET_LEVELS[0] for kind in kinds]
    return fields


def _head_width(path: Path, fields: dict[str, object]) -> int:
    """The width of a head, from the numbers of heads of all levels."""
    heads, channels = fields["heads"], fields.get("channels")
    try:
        widths = {width / count for width, count in zip(channels, heads)}
        if len(widths) == 1 and len(channels) == len(heads):
            return int(widths.pop())
    except (TypeError, ZeroDivisionError):
        pass
    raise foreign(path, "attention_head_dim", "one number, or one for each level in proportion to its width", heads)


def foreign(path: Path, name: str, expected: str, value: object) -> CheckpointError:
    return CheckpointError(f"{path}: {name} should be {expected}, as in Stable Diffusion, not {value!r:.80}.")
