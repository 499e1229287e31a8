"""A model -> a folder in the layout of diffusers, which `StableDiffusionPipeline.from_pretrained` opens.

`checkpoints.diffusers_folder` reads such folders, and says how the two layouts differ. Here its rules are applied
backwards.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from sd.checkpoints.diffusers_folder import FIELDS, UNET_LEVELS, UNET_RULES, VAE_RULES
from sd.checkpoints.files import write_checkpoint
from sd.checkpoints.key_rules import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, inverse, rename
from sd.config import ModelConfig, UNetConfig
from sd.decoder import Decoder
from sd.model_converter import split_qkv, to_compvis, to_their_name
from sd.models import Models
from sd.prompts.added_words import flat, grouped
from sd.tokenizer import END, START, Tokenizer

VERSION = {"_diffusers_version": "0.21.0"}  # the first one in which all values below have today's meaning
STAGE = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")
LEVEL = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.(.+)")
# Of the two names that diffusers has had for the parts of a VAE's attention, the newer ones.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "group_norm")
VAE_NAMES = [rule for rule in VAE_RULES if rule[0] not in ("query", "key", "value", "proj_attn")]


def save_folder(models: Models, path: str | Path) -> None:
    """Writes a model, in the dtype that it has, as a folder that diffusers and `load_models` open.

    The folder must be new or empty, and appears only once it is complete. It has no place for the default sampler,
    steps and guidance of a model. Words of textual inversion are kept: a name for each vector, as diffusers reads them.

    Raises ValueError if those names clash, or for a model with a tiny autoencoder; FileExistsError, and another OSError
    if it cannot be written.
    """
    if not isinstance(models.decoder, Decoder):
        raise ValueError(
            "models should have their own VAE to be saved, not a tiny autoencoder: load them without vae=."
        )
    path = Path(path)
    _vector_names(models.tokenizer)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} should be the name of a new folder: it exists, and is not empty.")
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".incomplete", dir=path.parent))
    try:
        _write(models, incomplete)
        incomplete.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            path.rmdir()  # it is empty, and Windows replaces no folder
        incomplete.replace(path)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _write(models: Models, folder: Path) -> None:
    config, state = models.config, to_compvis(models)
    unet = {unet_name(key, config.unet): tensor for key, tensor in _part(state, UNET_PREFIX).items()}
    files = {
        "unet": ("diffusion_pytorch_model", unet),
        "vae": ("diffusion_pytorch_model", vae_names(_part(state, VAE_PREFIX))),
        "text_encoder": ("model", _text_encoder(models)),
    }
    configs = {"unet": _unet(config), "vae": _vae(config), "text_encoder": _text(config)}
    for network, (stem, tensors) in files.items():
        (folder / network).mkdir()
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_checkpoint(folder / network / f"{stem}.safetensors", contiguous)
        _json(folder / network / "config.json", configs[network])
    _json(folder / "scheduler" / "scheduler_config.json", _scheduler(config))
    _tokenizer(models.tokenizer, folder / "tokenizer")
    _json(folder / "model_index.json", _index(config))


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def unet_name(key: str, config: UNetConfig) -> str:
    """input_blocks.1.0.in_layers.0.weight -> down_blocks.0.resnets.0.norm1.weight: `diffusers_folder.unet_name`
    backwards."""
    if match := STAGE.fullmatch(key):
        side, stage, slot, rest = match[1], int(match[2]), int(match[3]), match[4]
        if side == "input" and stage == 0:
            return f"conv_in.{rest}"
        level, number = divmod(stage - (side == "input"), config.blocks_per_level + 1)
        attends = config.attention[level if side == "input" else -1 - level]
        if side == "input" and number == config.blocks_per_level:
            kind, number = "downsamplers", 0
        elif slot == 0:
            kind = "resnets"
        elif slot == 1 and attends:
            kind = "attentions"
        else:
            kind, number = "upsamplers", 0
        key = f"{'down' if side == 'input' else 'up'}_blocks.{level}.{kind}.{number}.{rest}"
    return rename(key, inverse(UNET_RULES))


def vae_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """decoder.up.3.block.0.norm1.weight -> decoder.up_blocks.0.resnets.0.norm1.weight, for all tensors of a VAE."""
    last = max(int(level) for level in re.findall(r"\.up\.(\d+)\.", "\n".join(state)))

    def renamed(key: str) -> str:
        attention = ".mid.attn_1." in key  # elsewhere, "norm" and "q" are other things
        if match := LEVEL.fullmatch(key):
            network, side, level, rest = match.groups()
            key = f"{network}.{side}_blocks.{last - int(level) if side == 'up' else level}.{rest}"
        rules = VAE_NAMES if attention else [rule for rule in VAE_NAMES if rule[0] not in ATTENTION]
        return rename(key, inverse(rules))

    # Its attention has linear layers there, and 1x1 convolutions in the CompVis file.
    return {
        renamed(key): tensor[:, :, 0, 0] if ".attn_1." in key and tensor.ndim == 4 else tensor
        for key, tensor in state.items()
    }


def _text_encoder(models: Models) -> dict[str, Tensor]:
    """The text encoder under transformers' names."""
    ours = {f"clip.{key}": tensor for key, tensor in models.clip.state_dict().items()}
    return {to_their_name(key).removeprefix(CLIP_PREFIX): tensor for key, tensor in split_qkv(ours).items()}


def _values(network: str, config: object) -> dict:
    """The fields of one of our configurations under diffusers' names."""
    ours = asdict(config)
    return {theirs: ours[name] for name, theirs in FIELDS[network].items() if name in ours}


def _unet(config: ModelConfig) -> dict:
    unet = config.unet
    downs = [UNET_LEVELS[0] if attends else UNET_LEVELS[1] for attends in unet.attention]
    heads = unet.heads if unet.head_width is None else [unet.heads_of(width) for width in unet.channels]
    return (
        _values("unet", unet)
        | VERSION
        | {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": heads,
            "down_block_types": downs,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(downs)],
            "sample_size": config.image_size // config.vae.downscale,
            "use_linear_projection": config.text.is_openclip,
        }
    )


def _vae(config: ModelConfig) -> dict:
    levels = len(config.vae.channels)
    return (
        _values("vae", config.vae)
        | VERSION
        | {
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "sample_size": config.image_size,
        }
    )


def _text(config: ModelConfig) -> dict:
    return _values("text_encoder", config.text) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "intermediate_size": 4 * config.text.width,
        "projection_dim": config.text.width,
        "layer_norm_eps": 1e-5,
    }


def _scheduler(config: ModelConfig) -> dict:
    zero_snr = config.schedule.rescale_betas_zero_snr
    return (
        _values("scheduler", config.schedule)
        | VERSION
        | {
            "_class_name": _scheduler_class(config),
            "clip_sample": False,
            "set_alpha_to_one": True,  # as here: the last step ends at the image without noise
            "steps_offset": 1,
            "timestep_spacing": config.schedule.timestep_spacing or ("trailing" if zero_snr else "leading"),
        }
    )


def _scheduler_class(config: ModelConfig) -> str:
    known = {"euler": "EulerDiscreteScheduler", "lcm": "LCMScheduler"}
    return known.get(config.sampling.sampler, "DDIMScheduler")


def _index(config: ModelConfig) -> dict:
    kind = "StableDiffusionInpaintPipeline" if config.unet.inpaints else "StableDiffusionPipeline"
    kind = kind if config.unet.guidance_width is None else "LatentConsistencyModelPipeline"
    return VERSION | {
        "_class_name": kind,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", _scheduler_class(config)],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The vocabulary and merges as transformers' CLIPTokenizer reads them."""
    padding = tokenizer.symbols[tokenizer.pad_token_id]
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
    length = tokenizer.context_length
    _json(folder / "tokenizer_config.json", names | {"tokenizer_class": "CLIPTokenizer", "model_max_length": length})
    _json(folder / "special_tokens_map.json", names)
    _json(folder / "vocab.json", tokenizer.vocab)
    merges = "\n".join(map(" ".join, tokenizer.merges))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    if words := _vector_names(tokenizer):
        _json(folder / "added_tokens.json", words)


def _vector_names(tokenizer: Tokenizer) -> dict[str, int]:
    """A name for each vector of the added words, and its id. Raises ValueError if they would be read back as others."""
    added = getattr(tokenizer, "added", {})
    names = flat(added)
    groups = grouped(names)
    if clash := next((word for word, ids in added.items() if groups[word] != ids), None):
        raise ValueError(
            f"The word {clash!r:.80} should get another name to be saved: {f'{clash}_1'!r:.80} and so on would be its "
            "further vectors, and another word has such a name."
        )
    return names


def _json(path: Path, values: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
