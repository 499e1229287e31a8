"""The key names and shapes of published checkpoints <-> those of our networks.

In: a flat state dict in the CompVis layout of Stable Diffusion 1.x, {"model.diffusion_model.time_embed.0.weight": ...}.
Out: one state dict per network, {"clip": ..., "encoder": ..., ...}. And back, exact to the bit.

Three things differ. Names are translated by the rules below, in both directions. Queries, keys and values are three
matrices there and one here. Some 1x1 convolutions there are linear layers here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.key_rules import (
    CLIP_PREFIX,
    OPENCLIP_PREFIX,
    POSITION_IDS,
    SGM_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    inverse,
    rename,
    without_wrappers,
)
from sd.checkpoints.variants import recognise, standard_key, standard_layout, warn_of_unknown
from sd.config import ModelConfig
from sd.models import empty_networks

# Pairs (theirs, ours), in the notation of `sd.checkpoints.key_rules`. First, how the keys of each network begin.
PREFIXES = [
    (f"{CLIP_PREFIX}text_model.", "clip."),
    (OPENCLIP_PREFIX, "openclip."),
    (f"{VAE_PREFIX}encoder.", "encoder."),
    (f"{VAE_PREFIX}quant_conv.", "encoder.quant_conv."),
    (f"{VAE_PREFIX}decoder.", "decoder."),
    (f"{VAE_PREFIX}post_quant_conv.", "decoder.post_quant_conv."),
    (UNET_PREFIX, "diffusion."),
]

# Then, what the parts of each network are called.
CLIP_RULES = [
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding", "position_embedding"),
    ("encoder.layers", "layers"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("self_attn.q_proj", "attention.qkv.q"),
    ("self_attn.k_proj", "attention.qkv.k"),
    ("self_attn.v_proj", "attention.qkv.v"),
    ("self_attn.out_proj", "attention.out"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("final_layer_norm", "norm"),
]
# SD 2.x has OpenCLIP's text encoder, which keeps its queries, keys and values in one matrix, too.
OPENCLIP_RULES = [
    ("positional_embedding", "position_embedding.weight"),
    ("transformer.resblocks", "layers"),
    ("ln_1", "norm1"),
    ("ln_2", "norm2"),
    ("attn.in_proj_weight", "attention.qkv.weight"),
    ("attn.in_proj_bias", "attention.qkv.bias"),
    ("attn.out_proj", "attention.out"),
    ("mlp.c_fc", "mlp.0"),
    ("mlp.c_proj", "mlp.2"),
    ("ln_final", "norm"),
]
VAE_RULES = [
    ("nin_shortcut", "shortcut"),
    ("mid.block_1", "middle.0"),
    ("mid.block_2", "middle.2"),
    ("mid.attn_1.norm", "middle.1.norm"),
    ("mid.attn_1.q", "middle.1.attention.qkv.q"),
    ("mid.attn_1.k", "middle.1.attention.qkv.k"),
    ("mid.attn_1.v", "middle.1.attention.qkv.v"),
    ("mid.attn_1.proj_out", "middle.1.attention.out"),
]
ENCODER_RULES = [("down.#.block", "levels.#.blocks"), ("down.#.downsample", "levels.#.downsample"), *VAE_RULES]
DECODER_RULES = [("up.#.block", "levels.#.blocks"), ("up.#.upsample", "levels.#.upsample"), *VAE_RULES]
UNET_RULES = [
    ("time_embedding.cond_proj", "guidance_projection"),  # of LCMs, under diffusers' name in all files
    ("time_embed", "time_embedding"),
    ("input_blocks", "down"),
    ("down.#.0.op", "down.#.0.conv"),
    ("middle_block", "middle"),
    ("output_blocks", "up"),
    ("out.0", "norm_out"),
    ("out.2", "conv_out"),
    # transformers
    ("transformer_blocks.0.norm1", "self_norm"),
    ("transformer_blocks.0.attn1.to_q", "self_attention.qkv.q"),
    ("transformer_blocks.0.attn1.to_k", "self_attention.qkv.k"),
    ("transformer_blocks.0.attn1.to_v", "self_attention.qkv.v"),
    ("transformer_blocks.0.attn1.to_out.0", "self_attention.out"),
    ("transformer_blocks.0.norm2", "cross_norm"),
    ("transformer_blocks.0.attn2.to_q", "cross_attention.query"),
    ("transformer_blocks.0.attn2.to_k", "cross_attention.key"),
    ("transformer_blocks.0.attn2.to_v", "cross_attention.value"),
    ("transformer_blocks.0.attn2.to_out.0", "cross_attention.out"),
    ("transformer_blocks.0.norm3", "mlp_norm"),
    ("transformer_blocks.0.ff.net.0", "mlp.0"),
    ("transformer_blocks.0.ff.net.2", "mlp.1"),
    # residual blocks
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "shortcut"),
]
RULES = {"clip": CLIP_RULES, "encoder": ENCODER_RULES, "decoder": DECODER_RULES, "diffusion": UNET_RULES}
RULES["openclip"] = OPENCLIP_RULES  # of the network "clip", if the file has it under these names

# Weights of 1x1 convolutions in their files, (out, in, 1, 1), and of linear layers here, (out, in). In files of SD 2.x,
# those of the U-Net are linear layers, too.
CONVOLUTIONS_1X1 = re.compile(r"(proj_in|proj_out|attn_1\.[qkv])\.weight$")
VAE_CONVOLUTIONS_1X1 = re.compile(r"attn_1\.(proj_out|[qkv])\.weight$")

PARTS = {"U-Net": UNET_PREFIX, "text encoder": (CLIP_PREFIX, OPENCLIP_PREFIX), "VAE": VAE_PREFIX}
NETWORKS = {"clip": "text encoder", "openclip": "text encoder", "encoder": "VAE's encoder", "decoder": "VAE's decoder"}
NETWORKS["diffusion"] = "U-Net"
KNOWN_NAMES = 4096  # names that are kept in memory: a model has about 1,100, and the rules take 0.1 ms for each
MAX_LISTED = 3  # problems of one kind in one network that an error names


@lru_cache(KNOWN_NAMES)
def to_our_name(key: str) -> str:
    """model.diffusion_model.time_embed.0.weight -> diffusion.time_embedding.0.weight. KeyError for other prefixes."""
    key = rename(key, PREFIXES)
    return rename(key, RULES[key.split(".")[0]])


@lru_cache(KNOWN_NAMES)
def to_their_name(key: str) -> str:
    """The inverse of `to_our_name`."""
    return rename(key, inverse(PREFIXES + RULES[key.split(".")[0]]))


def from_compvis(
    state: dict[str, Tensor],
    config: ModelConfig | None = None,
    ema: bool = False,
    networks: dict[str, nn.Module] | None = None,
    unreadable: dict[str, str] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """A CompVis state dict -> the state dicts of our four networks, {"clip": {...}, "encoder": ..., ...}.

    Without `config`, it is recognised from the tensors' shapes. `ema` takes the averaged U-Net weights, `model_ema.*`.
    `networks` are empty networks of this configuration: passing them saves building them again. `unreadable` are
    tensors of the file that could not be read, and why. Tensors that no network uses are left out, with a warning. None
    are copied except the fused matrices and those in float8, in which torch computes nothing: they become float16.
    Raises CheckpointError, which sums up missing keys, wrong shapes and dtypes for each network.
    """
    state = without_wrappers(state)
    config = config or recognise(state)
    shapes = compvis_shapes(config, networks)
    shapes.pop(POSITION_IDS, None)
    if config.text.is_openclip:
        state = _openclip_names(state)
    weights = standard_layout(state, ema, shapes.keys())
    _check(weights, shapes, unreadable or {})
    warn_of_unknown(state, weights)
    ours = {}
    for key, tensor in weights.items():
        tensor = from_float8(key, tensor, state)
        tensor = tensor.reshape(shapes[key])  # some files store 1x1 kernels as matrices, others matrices as kernels
        ours[to_our_name(key)] = tensor.flatten(1) if CONVOLUTIONS_1X1.search(key) else tensor
    states = {name: {} for name in ("clip", "encoder", "decoder", "diffusion")}
    for key, tensor in fuse_qkv(ours).items():
        network, name = key.removeprefix("open").split(".", 1)
        states[network][name] = tensor
    return states


def to_compvis(models) -> dict[str, Tensor]:
    """An object with `clip`, `encoder`, `decoder` and `diffusion` -> a CompVis state dict, with every key of the SD 1.5
    file except the noise schedule. Its tensors are views of the networks' own.

    Of the 1,242 keys of SD 2.1's file, 28 are not written: 12 of the noise schedule, 2 that trainers keep, and in the
    text encoder `text_projection`, `logit_scale` and 12 of the last layer, whose output SD 2 does not use. No image
    depends on them, and open_clip and diffusers load the file without them.
    """
    text = "openclip" if models.clip.config.is_openclip else "clip"
    networks = {text: models.clip, "encoder": models.encoder, "decoder": models.decoder, "diffusion": models.diffusion}
    states = {name: network.state_dict() for name, network in networks.items()}
    ours = {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}
    kernels = CONVOLUTIONS_1X1 if text == "clip" else VAE_CONVOLUTIONS_1X1
    state = {}
    if text == "clip":
        positions = ours["clip.position_embedding.weight"]
        ids = torch.arange(len(positions))  # on the CPU first: on the meta device, arange would load a compiler
        state[POSITION_IDS] = ids[None].to(positions.device)
    for name, tensor in split_qkv(ours).items():
        key = to_their_name(name)
        state[key] = tensor[:, :, None, None] if kernels.search(key) else tensor
    return state


def _openclip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the text encoder under OpenCLIP's names, if it is under SD-Turbo's or transformers'."""
    state = {rename(key, [(SGM_PREFIX, OPENCLIP_PREFIX)]): tensor for key, tensor in state.items()}
    text = {key: tensor for key, tensor in state.items() if key.startswith(CLIP_PREFIX) and key != POSITION_IDS}
    ours = {to_our_name(standard_key(key)): tensor for key, tensor in text.items()}
    try:
        renamed = {to_their_name(f"open{name}"): tensor for name, tensor in fuse_qkv(ours).items()}
    except KeyError as missing:  # queries without keys or values
        raise CheckpointError(f"The text encoder has no {to_their_name(missing.args[0])}.") from None
    return {key: tensor for key, tensor in state.items() if key not in text} | renamed


def compvis_shapes(config: ModelConfig, networks: dict[str, nn.Module] | None = None) -> dict[str, torch.Size]:
    """The keys and shapes of a checkpoint of this configuration; `networks` as in `from_compvis`."""
    networks = networks or empty_networks(config)
    return {key: tensor.shape for key, tensor in to_compvis(SimpleNamespace(**networks)).items()}


def from_float8(key: str, tensor: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Float8 numbers as float16, which has all of them, times the scale that ComfyUI stores with some. Other tensors
    are returned as they are."""
    if tensor.dtype.itemsize > 1:
        return tensor
    scale = state.get(f"{key.removesuffix('weight')}scale_weight")
    if scale is None:
        return tensor.half()
    if scale.numel() != 1:
        raise CheckpointError(f"The scale of {key} should be one number, not a tensor of {tuple(scale.shape)}.")
    return (tensor.float() * scale.float().reshape(())).half()


def fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """qkv.q, qkv.k and qkv.v (each (width, ...)) -> one qkv (3 width, ...)."""
    fused = {}
    for name, tensor in state.items():
        if ".qkv.q." in name:
            parts = [state[name.replace(".qkv.q.", f".qkv.{part}.")] for part in "qkv"]
            fused[name.replace(".qkv.q.", ".qkv.")] = torch.cat(parts)
        elif ".qkv.k." not in name and ".qkv.v." not in name:
            fused[name] = tensor
    return fused


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `fuse_qkv`."""
    split = {}
    for name, tensor in state.items():
        if ".qkv." in name and not name.startswith("openclip."):
            for part, piece in zip("qkv", tensor.chunk(3)):
                split[name.replace(".qkv.", f".qkv.{part}.")] = piece
        else:
            split[name] = tensor
    return split


def _check(state: dict[str, Tensor], shapes: dict[str, torch.Size], unreadable: dict[str, str]) -> None:
    """Raises CheckpointError unless `state` has exactly these keys and shapes, in floating point."""
    held = {*state, *unreadable}
    needed = [part for part, prefix in PARTS.items() if any(key.startswith(prefix) for key in shapes)]
    if absent := [part for part in needed if not any(key.startswith(PARTS[part]) for key in held)]:
        vae = "give one with --vae, or with vae= in Python"
        advice = vae if absent == ["VAE"] else "give the file of a whole model"
        raise CheckpointError(f"This checkpoint has no {' and no '.join(absent)}: {advice}.")
    check_fit(state, shapes, unreadable, lambda key: NETWORKS[rename(key, PREFIXES).split(".")[0]])


def check_fit(
    state: dict[str, Tensor],
    shapes: dict[str, torch.Size],
    unreadable: dict[str, str],
    network_of: Callable[[str], str],
) -> None:
    """Raises CheckpointError unless `state` has exactly these keys and shapes, in floating point. It sums up what is
    wrong in each network; `network_of` gives the name of a key's network."""
    problems: dict[tuple[str, str], list[str]] = {}  # of each network and kind of problem
    for key in [*shapes, *(key for key in state if key not in shapes)]:
        kind, text = _problem(key, state.get(key), shapes.get(key), unreadable)
        if text:
            problems.setdefault((network_of(key), kind), []).append(text)
    if problems:
        count = sum(map(len, problems.values()))
        lines = [f"\n  {network}: {kind}{_listed(texts)}" for (network, kind), texts in problems.items()]
        raise CheckpointError(f"The checkpoint does not fit the network, {count} problems:{''.join(lines)}")


def _problem(key: str, tensor: Tensor | None, shape: torch.Size | None, unreadable: dict[str, str]) -> tuple[str, str]:
    """What a list of problems of one kind begins with, and this one's text, which is empty if there is no problem."""
    if shape is None:
        return "unknown key ", key
    if tensor is None:
        return ("unreadable key ", f"{key} of {unreadable[key]}") if key in unreadable else ("missing key ", key)
    if _without_ones(tensor.shape) != _without_ones(shape):
        return "", f"{key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    return "", "" if tensor.is_floating_point() else f"{key} holds {tensor.dtype}, expected floating point"


def _listed(texts: list[str]) -> str:
    """The first few of many texts, and how many more there are."""
    more = [f"and {len(texts) - MAX_LISTED} more"] if len(texts) > MAX_LISTED else []
    return "; ".join(texts[:MAX_LISTED] + more)


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    """The shape without a 1x1 kernel's two ones."""
    return tuple(shape[:2]) if shape[2:] == (1, 1) else tuple(shape)
