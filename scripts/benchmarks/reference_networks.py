"""The networks of diffusers and transformers with our weights, for the parity tests and the benchmark.

In: our configuration and a CompVis state dict. Out: their network with the same weights. These go through the
converter of diffusers, so that our key rules are tested too. Both libraries are optional: requirements-dev.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import diffusers
import transformers
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from sd.checkpoints.files import read_state_dict
from sd.checkpoints.key_rules import CLIP_PREFIX, OPENCLIP_PREFIX, UNET_PREFIX
from sd.config import SD15, ModelConfig

GUIDANCE = "time_embedding.cond_proj.weight"  # of LCMs


def unet(config: ModelConfig, state: dict[str, Tensor]) -> nn.Module:
    """diffusers' U-Net."""
    c = config.unet
    model = diffusers.UNet2DConditionModel(
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        block_out_channels=c.channels,
        down_block_types=["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in c.attention],
        up_block_types=["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(c.attention)],
        layers_per_block=c.blocks_per_level,
        # diffusers' name for the number of heads
        attention_head_dim=c.heads if c.head_width is None else [c.heads_of(width) for width in c.channels],
        use_linear_projection=config.text.is_openclip,
        norm_num_groups=c.groups,
        cross_attention_dim=c.context_width,
        time_cond_proj_dim=c.guidance_width,
        sample_size=64,  # a default that we never use, but its pipelines require one
    )
    weights = single_file_utils.convert_ldm_unet_checkpoint(state, dict(model.config))
    if c.guidance_width is not None:  # the converter of diffusers leaves it out
        weights[GUIDANCE] = state[UNET_PREFIX + GUIDANCE]
    return _load(model, weights)


def vae(config: ModelConfig, state: dict[str, Tensor]) -> nn.Module:
    """diffusers' autoencoder."""
    c = config.vae
    model = diffusers.AutoencoderKL(
        block_out_channels=c.channels,
        down_block_types=["DownEncoderBlock2D"] * len(c.channels),
        up_block_types=["UpDecoderBlock2D"] * len(c.channels),
        layers_per_block=c.blocks_per_level,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        scaling_factor=c.scaling_factor,
        sample_size=config.image_size,
    )
    return _load(model, single_file_utils.convert_ldm_vae_checkpoint(state, dict(model.config)))


def text_encoder(config: ModelConfig, state: dict[str, Tensor]) -> nn.Module:
    """transformers' CLIP text encoder."""
    c = config.text
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            intermediate_size=4 * c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            max_position_embeddings=c.context_length,
            hidden_act=c.activation,
        )
    )
    prefix = f"{CLIP_PREFIX}text_model."
    if c.is_openclip:
        weights = single_file_utils.convert_open_clip_checkpoint(model, state, OPENCLIP_PREFIX)
    else:
        weights = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    # transformers 4 has "text_model." in its keys, 5 does not.
    return _load(model, {key: weights[key.removeprefix("text_model.")] for key in model.state_dict()})


def _load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict({key: tensor.clone() for key, tensor in state.items()})
    return model.eval().requires_grad_(False)


def main() -> None:
    """python scripts/benchmarks/reference_networks.py CHECKPOINT FOLDER: writes a folder for diffusers."""
    checkpoint, folder = map(Path, sys.argv[1:])
    state = read_state_dict(checkpoint)
    incomplete = folder.with_name(f".{folder.name}.incomplete")
    for name, build in {"text": text_encoder, "vae": vae, "unet": unet}.items():
        build(SD15, state).save_pretrained(incomplete / name)
    incomplete.rename(folder)


if __name__ == "__main__":
    main()
