"""The variants of checkpoints that people share -> the one layout that `model_converter` reads.

In: whatever state dict a file held. Out: the same tensors under the keys of the CompVis Stable Diffusion 1.5 file,
without what trainers store beside the weights; or a CheckpointError that says what the file is instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import Tensor

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.diffusers_folder import OTHER_PIPELINES, is_diffusers_vae, vae_names
from sd.checkpoints.key_rules import CLIP_PREFIX, OPENCLIP_PREFIX, POSITION_IDS, SGM_PREFIX, UNET_PREFIX, VAE_PREFIX
from sd.checkpoints.self_description import MARKS, described, prediction_said, warn_of_unnamed_words
from sd.config import LCM_SAMPLING, SD2, SD2_BASE, SD2_INPAINTING, SD15, SD15_INPAINTING, SD_TURBO, ModelConfig
from sd.runtime import warn

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
TEXT_PREFIXES = (f"{CLIP_PREFIX}text_model.", OPENCLIP_PREFIX)
NETWORK_PREFIXES = (UNET_PREFIX, *TEXT_PREFIXES, *(VAE_PREFIX + part for part in VAE_PARTS))
NUMBER = re.compile(r"\d+")
FIRST_WEIGHT = f"{UNET_PREFIX}input_blocks.0.0.weight"
GUIDANCE_WEIGHT = f"{UNET_PREFIX}time_embedding.cond_proj.weight"  # of LCMs
GUIDANCE_WIDTH = 256  # of the published ones
IMAGE_EMBEDDING = f"{UNET_PREFIX}label_emb.0.0.weight"  # of Stable unCLIP
TOKEN_TABLE = re.compile(re.escape(CLIP_PREFIX) + r"(text_model\.)?embeddings\.token_embedding\.weight$")
VAE_ATTENTION = re.compile(re.escape(VAE_PREFIX) + r"((?:en|de)coder\.mid\.attn_1\.)(to_q|to_k|to_v|to_out\.0)(\.\w+)")
VAE_ATTENTION_NAMES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
AVERAGED_PREFIX = "model_ema.diffusion_model"
MAX_NAMED = 5  # tensors that the warning about unknown ones names

# What trainers store beside the weights: the noise schedule, averaged copies, losses, CLIP's image encoder, and the
# scales of float8 weights.
EXTRAS = re.compile(
    r"(betas|alphas_cumprod(_prev)?|(sqrt|log)_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor|ddim_sigmas"
    r"|scaled_fp8|.*\.(scale_weight|scale_input)|model_ema\..*|embedding_manager\..*"
    r"|(first_stage_model\.)?loss\..*|first_stage_model\.(model_ema\..*|logvar)"
    r"|denoiser\.sigmas|cond_stage_model\.model\.(logit_scale|text_projection|transformer\.resblocks\.23\..*)"
    r"|cond_stage_model\.(logit_scale|text_projection.*"
    r"|transformer\.(text_model\.)?(logit_scale|text_projection.*|vision_model\..*|visual_projection.*)))$"
)

# A pattern in any key of a file, and what such a file is unless it holds a whole model.
OTHER_FILES = [
    (r"(^|\.)lora_|\.lora_|_lora\.", "is a LoRA, a small change to a model rather than a model"),
    (r"^conditioner\.embedders\.(?!0\.model\.)", "is a Stable Diffusion XL checkpoint"),
    (r"\.joint_blocks\.", "is a Stable Diffusion 3 checkpoint"),
    (r"\.double_blocks\.", "is a FLUX checkpoint"),
    (r"(^|\.)(y_embedder|adaln_single|caption_projection)\.", "is a PixArt checkpoint"),
    (
        r"(^|\.)control_model\.|^zero_convs\.|^controlnet_(cond_embedding|down_blocks|mid_block)\.",
        "is a ControlNet, which steers a model: give it as `control=`",
    ),
    (
        r"^(decoder\.|encoder\.)?(layers\.)?\d+\.conv\.\d\.(weight|bias)$",
        "is TAESD, a tiny autoencoder: give it as `vae=`",
    ),
    (r"^(input_blocks|output_blocks)\.\d", "is a U-Net alone, without a text encoder and a VAE"),
    (
        r"^(encoder\.)?down_blocks\.|^(text_model|unet|vae)\.",
        "is one network of a folder in the layout of diffusers",
    ),
    (r"^string_to_param|^emb_params$|^\*$|^<.*>$", "is a textual inversion embedding"),
]


# How wide the prompt's context is for the U-Net of other models.
CONTEXT_WIDTHS = {
    (1280,): "is a Stable Diffusion XL refiner",
    (2048,): "is a Stable Diffusion XL checkpoint",
}


# The input channels of the U-Net of still others.
INPUTS = {
    (5,): OTHER_PIPELINES["Depth2Img"],
    (7,): OTHER_PIPELINES["Upscale"],
    (8,): OTHER_PIPELINES["InstructPix2Pix"],
}
# The bias by which ComfyUI tells models of SD 2.x that predict v: its standard deviation is above 0.09. Near it, there
# is doubt.
V_BIAS, V_SPREAD = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
DOUBTFUL_SPREADS = (0.06, 0.135)


def recognise(
    state: dict[str, Tensor], metadata: dict[str, str] | None = None, yaml: str = "", name: str = ""
) -> ModelConfig:
    """The configuration of a published checkpoint, from its keys and shapes, and from what it says of itself.

    It is one of the models in `sd.config`, perhaps with another prediction type, size or noise schedule. `metadata` is
    that of a safetensors file, `yaml` the text of the yaml beside it, `name` the file's. Raises CheckpointError for any
    other file, and says what the file is.
    """
    identify(state)
    widths = _context_widths(state)
    if other := widths & CONTEXT_WIDTHS.keys():
        raise _other_file(CONTEXT_WIDTHS[other.pop()])
    openclip = any(key.startswith((OPENCLIP_PREFIX, SGM_PREFIX)) for key in state)
    if widths and openclip and (1024,) not in widths:
        raise CheckpointError(
            f"The context of Stable Diffusion 2's U-Net should be 1024 wide, not {max(widths)[0]} as in this file."
        )
    first = state.get(FIRST_WEIGHT, state.get(averaged_name(FIRST_WEIGHT)))
    channels = None if first is None else tuple(first.shape[1:2])
    if channels in INPUTS:
        raise CheckpointError(f"This file is {INPUTS[channels]}.")
    if IMAGE_EMBEDDING in state:
        raise CheckpointError(f"This file is {OTHER_PIPELINES['UnCLIP']}.")
    if (1024,) in widths:
        # Of all models of SD 2.x, only SD-Turbo has these names. A copy with others looks like a base.
        turbo = any(key.startswith(SGM_PREFIX) for key in state) or "turbo" in name.lower()
        if channels == (9,):
            config = SD2_INPAINTING
        else:
            config = SD_TURBO if turbo else _base_or_v(state, metadata, yaml)
    else:
        config = SD15_INPAINTING if channels == (9,) else SD15
    guidance = state.get(GUIDANCE_WEIGHT, state.get(averaged_name(GUIDANCE_WEIGHT)))
    if guidance is not None:
        width = guidance.shape[1] if guidance.ndim == 2 else GUIDANCE_WIDTH  # the converter names the wrong shape
        config = replace(config, unet=replace(config.unet, guidance_width=width), sampling=LCM_SAMPLING)
    words = max((len(tensor) for key, tensor in state.items() if TOKEN_TABLE.match(key) and tensor.ndim), default=0)
    if words > config.text.vocab_size:
        warn_of_unnamed_words(words)
        config = replace(config, text=replace(config.text, vocab_size=words))
    return described(config, state.keys(), metadata, yaml)


def _context_widths(state: dict[str, Tensor]) -> set[tuple[int, ...]]:
    """The width of the prompt's context, (D,), in a set; an empty set for a file without a U-Net."""
    names = re.compile(rf"({re.escape(UNET_PREFIX)}|{re.escape(AVERAGED_PREFIX)}).*attn2\.?to_k")
    return {tuple(tensor.shape[1:2]) for key, tensor in state.items() if names.match(key)}


def _base_or_v(state: dict[str, Tensor], metadata: dict[str, str] | None, yaml: str) -> ModelConfig:
    """SD 2.x's model for noise and 512 pixels, or the one for v and 768. All their tensors have the same shapes."""
    said = prediction_said(state.keys(), metadata or {}, yaml) or prediction_by_bias(state)
    return SD2 if said == "v_prediction" else SD2_BASE


def prediction_by_bias(state: dict[str, Tensor]) -> str:
    """What a U-Net of SD 2.x seems to predict."""
    return "v_prediction" if _spread(state) > V_SPREAD else "epsilon"


def is_doubtful(state: dict[str, Tensor]) -> bool:
    """Whether `prediction_by_bias` may be wrong."""
    low, high = DOUBTFUL_SPREADS
    return _v_bias(state) is None or low < _spread(state) < high


def _spread(state: dict[str, Tensor]) -> float:
    bias = _v_bias(state)
    return 0.0 if bias is None else bias.float().std().item()


def _v_bias(state: dict[str, Tensor]) -> Tensor | None:
    return state.get(V_BIAS, state.get(averaged_name(V_BIAS)))


def is_guess(config: ModelConfig, state: dict[str, Tensor], metadata: dict[str, str], yaml: str) -> bool:
    """Whether nothing but a doubtful bias shows what the U-Net of a recognised file predicts."""
    base_or_v = (config.unet, config.sampling) == (SD2.unet, SD2.sampling)
    return base_or_v and is_doubtful(state) and prediction_said(state.keys(), metadata, yaml) is None


def with_prediction(config: ModelConfig, prediction_type: str) -> ModelConfig:
    """The configuration with another `prediction_type`."""
    return replace(config, schedule=replace(config.schedule, prediction_type=prediction_type))


def identify(keys: Iterable[str]) -> None:
    """Raises CheckpointError, which says what the file is, unless these are keys of Stable Diffusion.

    A file with a U-Net and a text encoder of Stable Diffusion 1.x or 2.x is a model, whatever else it holds.
    """
    keys = list(keys)
    unet = any(key.startswith((UNET_PREFIX, AVERAGED_PREFIX)) for key in keys)
    text = any(key.startswith((CLIP_PREFIX, OPENCLIP_PREFIX, SGM_PREFIX)) for key in keys)
    if unet and text:
        return
    if description := other_file(keys):
        raise _other_file(description)
    if not unet and not text:
        if any(key.removeprefix(VAE_PREFIX).startswith(VAE_PARTS) for key in keys):
            raise CheckpointError("This file is a VAE alone: give it as `vae=`, beside a full checkpoint.")
        raise CheckpointError(
            f"This file has no Stable Diffusion weights: none of its {len(keys)} keys starts with {UNET_PREFIX!r}."
        )


def other_file(keys: Collection[str]) -> str | None:
    """What a file with these keys is instead of a model, if it is known here: "is a LoRA, ..."."""
    return next((what for pattern, what in OTHER_FILES if any(re.search(pattern, key) for key in keys)), None)


def standard_layout(
    state: dict[str, Tensor], ema: bool = False, known: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of the networks under standard keys, and nothing else.

    With `ema`, or if the file has no others, the U-Net's averaged weights are taken. `known` are the keys of the
    networks; without it, all keys inside a network are kept. A further block or layer is kept too: it shows that the
    network is another one, which the converter refuses.
    """
    weights = {standard_key(key): tensor for key, tensor in state.items() if not EXTRAS.match(key)}
    weights = {key: tensor for key, tensor in weights.items() if key.startswith(NETWORK_PREFIXES)}
    if known is not None:
        kinds = {NUMBER.sub("#", key) for key in known}
        weights = {key: tensor for key, tensor in weights.items() if NUMBER.sub("#", key) in kinds}
    averages = any(key.startswith(AVERAGED_PREFIX) for key in state)
    averages_only = averages and not any(key.startswith(UNET_PREFIX) for key in weights)
    return weights | averaged(state, known) if ema or averages_only else weights


def warn_of_unknown(state: dict[str, Tensor], weights: Collection[str]) -> None:
    """Names the tensors that are neither among the weights taken from the file nor what trainers store beside them."""
    known = {*weights, *MARKS, POSITION_IDS}
    if unknown := [key for key in map(standard_key, state) if key not in known and not EXTRAS.match(key)]:
        names = ", ".join(unknown[:MAX_NAMED]) + (", ..." if len(unknown) > MAX_NAMED else "")
        warn(f"Left out, as Stable Diffusion has no place for it: {names:.300}")


def averaged(state: dict[str, Tensor], known: Collection[str] | None = None) -> dict[str, Tensor]:
    """The exponential moving average of the U-Net's weights, under their plain keys.

    `known` are the keys of the networks; without it, those of the plain weights in the file. Raises CheckpointError if
    an average is missing.
    """
    keys = [key for key in (state if known is None else known) if key.startswith(UNET_PREFIX)]
    if missing := [key for key in keys if averaged_name(key) not in state]:
        advice = ": load it with ema=False" if any(key in state for key in keys) else ""
        raise CheckpointError(f"This checkpoint has no averaged weights for {missing[0]}{advice}.")
    return {key: state[averaged_name(key)] for key in keys}


def averaged_name(key: str) -> str:
    """model.diffusion_model.out.2.bias -> model_ema.diffusion_modelout2bias: trainers store averages without dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def vae_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors from a file of a lone VAE or a full checkpoint, under standard keys.

    Raises CheckpointError if there are none.
    """
    keys = list(state)
    embedders = [key for key in state if key.startswith("conditioner.embedders.")]  # SD-Turbo has them too
    if _context_widths(state) & CONTEXT_WIDTHS.keys() or any(not key.startswith(SGM_PREFIX) for key in embedders):
        raise CheckpointError("This file is a Stable Diffusion XL checkpoint, whose VAE makes other latents.")
    if is_diffusers_vae(state):
        state = vae_names(state)
    if not any(key.startswith(VAE_PREFIX) for key in state):
        state = {VAE_PREFIX + key: tensor for key, tensor in state.items() if key.startswith(VAE_PARTS)}
    state = standard_layout({key: tensor for key, tensor in state.items() if key.startswith(VAE_PREFIX)})
    if f"{VAE_PREFIX}decoder.conv_in.weight" not in state:
        if description := other_file(keys):
            raise CheckpointError(f"This file {description}; give a VAE of Stable Diffusion 1.x or 2.x.")
        raise CheckpointError("This file has no VAE in the layout of Stable Diffusion 1.x.")
    return state


def _other_file(description: str) -> CheckpointError:
    return CheckpointError(
        f"This file {description}; give a checkpoint of Stable Diffusion 1.x or 2.x, a file or folder."
    )


def standard_key(key: str) -> str:
    """Some files leave "text_model." out of the text encoder's keys, or give the VAE's attention diffusers' names."""
    if match := VAE_ATTENTION.fullmatch(key):
        return f"{VAE_PREFIX}{match[1]}{VAE_ATTENTION_NAMES[match[2]]}{match[3]}"
    rest = key.removeprefix(CLIP_PREFIX)
    if rest != key and not rest.startswith("text_model."):
        return f"{CLIP_PREFIX}text_model.{rest}"
    return key
