"""The checkpoints found in the wild -> the one layout that `model_converter` knows.

In: whatever state dict a file held. Out: the same tensors under the keys of the CompVis Stable Diffusion 1.5 file, less
the baggage that trainers leave in; or a CheckpointError that says what the file is instead.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.diffusers_folder import is_diffusers_vae, vae_names
from sd.config import SD15, SD15_INPAINTING, ModelConfig

CLIP_PREFIX = "cond_stage_model.transformer."
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PLACES = (UNET_PREFIX, f"{CLIP_PREFIX}text_model.", *(VAE_PREFIX + part for part in VAE_PARTS))
NAMED = 5  # of the tensors that are left out

# What trainers store beside the weights: the noise schedule, averaged copies, losses, CLIP's other half.
BAGGAGE = re.compile(
    r"(betas|alphas_cumprod(_prev)?|(sqrt|log)_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor|ddim_sigmas"
    r"|model_ema\..*|(first_stage_model\.)?loss\..*|first_stage_model\.(model_ema\..*|logvar)|embedding_manager\..*"
    r"|cond_stage_model\.(logit_scale|text_projection.*"
    r"|transformer\.(text_model\.)?(logit_scale|text_projection.*|vision_model\..*|visual_projection.*)))$"
)
V_PREDICTION = "v_pred"  # the name of an empty tensor by which some trainers say what the U-Net predicts

# A pattern found among a file's keys, and what such a file is.
OTHERS = [
    (r"(^|\.)lora_|\.lora_|_lora\.", "is a LoRA, a small change to a model rather than a model"),
    (r"^conditioner\.embedders\.", "is a Stable Diffusion XL checkpoint"),
    (r"\.joint_blocks\.", "is a Stable Diffusion 3 checkpoint"),
    (r"^cond_stage_model\.model\.", "is a Stable Diffusion 2 checkpoint"),
    (r"(^|\.)control_model\.", "is a ControlNet, an addition to a model rather than a model"),
    (
        r"^(encoder\.)?down_blocks\.|^(text_model|unet|vae)\.",
        "is one network of a folder in the layout of diffusers: give that folder",
    ),
    (r"^string_to_param|^emb_params$|^\*$|^<.*>$", "is a textual inversion embedding"),
]


def recognise(state: dict[str, Tensor]) -> ModelConfig:
    """The configuration of a published checkpoint, from its keys and shapes: SD15 or SD15_INPAINTING, or either of
    them for a U-Net that predicts v.

    Raises CheckpointError for a file that is something else, and says what.
    """
    identify(state)
    first = state.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    channels = None if first is None else tuple(first.shape[1:2])
    if channels == (8,):
        raise CheckpointError("This file is an InstructPix2Pix model, whose U-Net sees a second picture.")
    config = SD15_INPAINTING if channels == (9,) else SD15
    return with_prediction(config, "v_prediction") if V_PREDICTION in state else config


def with_prediction(config: ModelConfig, prediction_type: str) -> ModelConfig:
    """The configuration, but for what its U-Net predicts."""
    return replace(config, schedule=replace(config.schedule, prediction_type=prediction_type))


def identify(keys: Iterable[str]) -> None:
    """Raises CheckpointError if these are the keys of a file that is not a Stable Diffusion 1.x checkpoint."""
    keys = list(keys)
    for pattern, description in OTHERS:
        if any(re.search(pattern, key) for key in keys):
            raise CheckpointError(f"This file {description}; what is needed is a Stable Diffusion 1.x checkpoint.")
    if not any(key.startswith((UNET_PREFIX, CLIP_PREFIX)) for key in keys):
        if any(key.removeprefix(VAE_PREFIX).startswith(VAE_PARTS) for key in keys):
            raise CheckpointError("This file is a VAE alone: give it as `vae=`, beside a full checkpoint.")
        raise CheckpointError(
            f"This file has no Stable Diffusion weights: none of its {len(keys)} keys starts with {UNET_PREFIX!r}."
        )


def standard_layout(state: dict[str, Tensor], ema: bool = False) -> dict[str, Tensor]:
    """Standard keys and no baggage; with `ema`, the U-Net's averaged weights in the place of its plain ones.

    Tensors of which nobody knows what they are stay behind too, with a warning, if they claim no place in a network.
    """
    standard = {_with_text_model(key): tensor for key, tensor in state.items() if not BAGGAGE.match(key)}
    if strange := [key for key in standard if not key.startswith(PLACES) and key != V_PREDICTION]:
        names = ", ".join(strange[:NAMED]) + (", ..." if len(strange) > NAMED else "")
        warnings.warn(f"Left out, as Stable Diffusion 1.x has no place for it: {names:.300}", stacklevel=2)
    standard = {key: tensor for key, tensor in standard.items() if key.startswith(PLACES)}
    return standard | averaged(state) if ema else standard


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's exponential moving average, under its plain keys.

    The trainer stored it as "model_ema." + the key less "model." and all dots. Raises CheckpointError if there is none.
    """
    averages = {}
    for key in state:
        if key.startswith(UNET_PREFIX):
            name = "model_ema." + key.removeprefix("model.").replace(".", "")
            if name not in state:
                raise CheckpointError(f"This checkpoint has no averaged weights for {key}: load it with ema=False.")
            averages[key] = state[name]
    return averages


def vae_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's keys of a VAE-only file, or of a full checkpoint, with their prefix. Raises CheckpointError if none."""
    if is_diffusers_vae(state):
        state = vae_names(state)
    if not any(key.startswith(VAE_PREFIX) for key in state):
        state = {VAE_PREFIX + key: tensor for key, tensor in state.items() if key.startswith(VAE_PARTS)}
    state = standard_layout({key: tensor for key, tensor in state.items() if key.startswith(VAE_PREFIX)})
    if f"{VAE_PREFIX}decoder.conv_in.weight" not in state:
        raise CheckpointError("This file has no VAE in the layout of Stable Diffusion 1.x.")
    return state


def _with_text_model(key: str) -> str:
    """Some files leave "text_model." out of the text encoder's keys."""
    rest = key.removeprefix(CLIP_PREFIX)
    if rest != key and not rest.startswith("text_model."):
        return f"{CLIP_PREFIX}text_model.{rest}"
    return key
