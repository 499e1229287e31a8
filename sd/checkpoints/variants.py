"""The variants of checkpoints that people share -> the one layout that `model_converter` reads.

In: whatever state dict a file held. Out: the same tensors under the keys of the CompVis Stable Diffusion 1.5 file,
without what trainers store beside the weights; or a CheckpointError that says what the file is instead.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.diffusers_folder import is_diffusers_vae, vae_names
from sd.checkpoints.key_rules import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from sd.config import SD15, SD15_INPAINTING, ModelConfig

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
NETWORK_PREFIXES = (UNET_PREFIX, f"{CLIP_PREFIX}text_model.", *(VAE_PREFIX + part for part in VAE_PARTS))
MAX_NAMED = 5  # tensors that the warning about unknown ones names

# What trainers store beside the weights: the noise schedule, averaged copies, losses, CLIP's image encoder.
EXTRAS = re.compile(
    r"(betas|alphas_cumprod(_prev)?|(sqrt|log)_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor|ddim_sigmas"
    r"|model_ema\..*|(first_stage_model\.)?loss\..*|first_stage_model\.(model_ema\..*|logvar)|embedding_manager\..*"
    r"|cond_stage_model\.(logit_scale|text_projection.*"
    r"|transformer\.(text_model\.)?(logit_scale|text_projection.*|vision_model\..*|visual_projection.*)))$"
)
V_PREDICTION = "v_pred"  # the name of an empty tensor with which some trainers mark a U-Net that predicts v

# A pattern in any key of a file, and what such a file is.
OTHER_FILES = [
    (r"(^|\.)lora_|\.lora_|_lora\.", "is a LoRA, a small change to a model rather than a model"),
    (r"^conditioner\.embedders\.", "is a Stable Diffusion XL checkpoint"),
    (r"\.joint_blocks\.", "is a Stable Diffusion 3 checkpoint"),
    (r"^cond_stage_model\.model\.", "is a Stable Diffusion 2 checkpoint"),
    (r"(^|\.)control_model\.", "is a ControlNet, an addition to a model rather than a model"),
    (
        r"^(encoder\.)?down_blocks\.|^(text_model|unet|vae)\.",
        "is one network of a folder in the layout of diffusers",
    ),
    (r"^string_to_param|^emb_params$|^\*$|^<.*>$", "is a textual inversion embedding"),
]


def recognise(state: dict[str, Tensor]) -> ModelConfig:
    """The configuration of a published checkpoint, from its keys and shapes.

    It is SD15 or SD15_INPAINTING, perhaps with v-prediction. Raises CheckpointError for any other file, and says what
    the file is.
    """
    identify(state)
    first = state.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    channels = None if first is None else tuple(first.shape[1:2])
    if channels == (8,):
        raise CheckpointError("This file is an InstructPix2Pix model, whose U-Net takes a second image.")
    config = SD15_INPAINTING if channels == (9,) else SD15
    return with_prediction(config, "v_prediction") if V_PREDICTION in state else config


def with_prediction(config: ModelConfig, prediction_type: str) -> ModelConfig:
    """The configuration with another `prediction_type`."""
    return replace(config, schedule=replace(config.schedule, prediction_type=prediction_type))


def identify(keys: Iterable[str]) -> None:
    """Raises CheckpointError, which says what the file is, unless these are keys of Stable Diffusion 1.x."""
    keys = list(keys)
    for pattern, description in OTHER_FILES:
        if any(re.search(pattern, key) for key in keys):
            raise CheckpointError(
                f"This file {description}; give a Stable Diffusion 1.x checkpoint, a file or a folder."
            )
    if not any(key.startswith((UNET_PREFIX, CLIP_PREFIX)) for key in keys):
        if any(key.removeprefix(VAE_PREFIX).startswith(VAE_PARTS) for key in keys):
            raise CheckpointError("This file is a VAE alone: give it as `vae=`, beside a full checkpoint.")
        raise CheckpointError(
            f"This file has no Stable Diffusion weights: none of its {len(keys)} keys starts with {UNET_PREFIX!r}."
        )


def standard_layout(state: dict[str, Tensor], ema: bool = False) -> dict[str, Tensor]:
    """The tensors of the networks under standard keys. With `ema`, the U-Net's averaged weights replace its plain ones.

    Unknown tensors outside the networks are dropped with a warning. Those inside stay: the converter refuses them.
    """
    standard = {_with_text_model(key): tensor for key, tensor in state.items() if not EXTRAS.match(key)}
    if unknown := [key for key in standard if not key.startswith(NETWORK_PREFIXES) and key != V_PREDICTION]:
        names = ", ".join(unknown[:MAX_NAMED]) + (", ..." if len(unknown) > MAX_NAMED else "")
        warnings.warn(f"Left out, as Stable Diffusion 1.x has no place for it: {names:.300}", stacklevel=2)
    standard = {key: tensor for key, tensor in standard.items() if key.startswith(NETWORK_PREFIXES)}
    return standard | averaged(state) if ema else standard


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exponential moving average of the U-Net's weights, under their plain keys.

    In the file its keys are "model_ema." and then the plain key without "model." and without dots. Raises
    CheckpointError if the file has none.
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
    """The VAE's tensors from a file of a lone VAE or a full checkpoint, under standard keys.

    Raises CheckpointError if there are none.
    """
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
