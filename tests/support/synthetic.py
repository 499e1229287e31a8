"""Small configurations and random weights for tests that need a whole model. Activations stay at unit scale."""

import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import torch

from scripts.benchmarks import synthetic_checkpoint
from sd.config import LCM_SAMPLING, SD2, SD15, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from sd.model_converter import from_compvis
from sd.models import Models, empty_networks
from sd.tokenizer import Tokenizer

# As small as the topology allows, for tests that do not depend on the width.
MICRO = ModelConfig(
    text=TextConfig(width=32, layers=2, heads=2),
    vae=VAEConfig(channels=(16, 16, 32, 32), groups=8, scaling_factor=0.5),
    unet=UNetConfig(channels=(16, 16, 32, 32), heads=2, groups=8, context_width=32),
    image_size=64,
)
FEW_LAYERS = replace(
    MICRO,
    vae=replace(MICRO.vae, blocks_per_level=1),
    unet=replace(MICRO.unet, channels=(16, 32), attention=(True, False), blocks_per_level=1),
)
# SD 2.x: OpenCLIP's text encoder, heads of one width, v-prediction.
SD2_MICRO = ModelConfig(
    text=TextConfig(width=32, layers=3, heads=2, activation="gelu", zero_padding=True),
    vae=MICRO.vae,
    unet=UNetConfig(channels=(16, 16, 32, 32), head_width=8, groups=8, context_width=32),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    image_size=64,
)
SD2_INPAINTING_MICRO = replace(
    SD2_MICRO, unet=replace(SD2_MICRO.unet, in_channels=9), schedule=ScheduleConfig(prediction_type="epsilon")
)
FULL_SD2_TEXT = replace(SD2_MICRO, text=SD2.text)
FULL_SD2_UNET = replace(SD2_MICRO, unet=SD2.unet)
# A latent consistency model, whose U-Net reads the guidance scale.
LCM_MICRO = replace(MICRO, unet=replace(MICRO.unet, guidance_width=256), sampling=LCM_SAMPLING)
INPAINTING_MICRO = replace(MICRO, unet=replace(MICRO.unet, in_channels=9))

# One network as wide as SD 1.5's, or half as wide. The other networks are small, to save time.
FULL_TEXT = replace(MICRO, text=SD15.text)
FULL_VAE = replace(MICRO, vae=SD15.vae)
HALF_UNET = replace(MICRO, unet=replace(SD15.unet, channels=(160, 320, 640, 640)))
FULL_UNET = replace(MICRO, unet=SD15.unet)


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint with random weights, in the CompVis layout."""
    make = _small_state if is_small(config) else synthetic_checkpoint.random_state
    return copy.deepcopy(make(config, seed))


def random_networks(config: ModelConfig, seed: int = 0) -> SimpleNamespace:
    """The four networks with random weights, in the form that `to_compvis` takes."""
    return copy.deepcopy(_small_networks(config, seed)) if is_small(config) else _make_networks(config, seed)


def random_models(config: ModelConfig, seed: int = 0) -> Models:
    """The same networks in the form that `load_models` returns."""
    networks = random_networks(config, seed)
    return Models(
        **vars(networks),
        tokenizer=_tokenizer(0 if config.text.zero_padding else None),
        config=config,
        device=torch.device("cpu"),
    )


def is_small(config: ModelConfig) -> bool:
    """Whether its networks are small enough to be kept in memory: copying them is much faster than making them."""
    return max(config.text.width, *config.vae.channels, *config.unet.channels) <= 64


def _make_networks(config: ModelConfig, seed: int) -> SimpleNamespace:
    networks = empty_networks(config)
    for name, state in from_compvis(random_state(config, seed), config).items():
        networks[name].load_state_dict(state, assign=True)
        networks[name].eval().requires_grad_(False)
    return SimpleNamespace(**networks)


_small_networks = cache(_make_networks)
_small_state = cache(synthetic_checkpoint.random_state)


@cache
def _tokenizer(pad_token_id: int | None) -> Tokenizer:
    return Tokenizer(pad_token_id=pad_token_id)
