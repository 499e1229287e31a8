"""Random weights that keep activations at unit scale, and small configurations, for tests that need a whole model."""

import math
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from sd.config import SD15, ModelConfig, TextConfig, UNetConfig, VAEConfig
from sd.model_converter import POSITION_IDS, compvis_shapes, empty_networks, from_compvis
from sd.model_loader import Models
from sd.tokenizer import Tokenizer

# As small as the topology allows, for what does not depend on width.
MICRO = ModelConfig(
    text=TextConfig(width=32, layers=2, heads=2),
    vae=VAEConfig(channels=(16, 16, 32, 32), groups=8, scaling_factor=0.5),
    unet=UNetConfig(channels=(16, 16, 32, 32), heads=2, groups=8, context_width=32),
    image_size=64,
)
INPAINTING_MICRO = replace(MICRO, unet=replace(MICRO.unet, in_channels=9))

# One network as wide as SD 1.5's (or half as wide), the others small: what a test pays for is what it tests.
FULL_TEXT = replace(MICRO, text=SD15.text)
FULL_VAE = replace(MICRO, vae=SD15.vae)
HALF_UNET = replace(MICRO, unet=replace(SD15.unet, channels=(160, 320, 640, 640)))
FULL_UNET = replace(MICRO, unet=SD15.unet)


def random_weight(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One weight, scaled by its role so that a deep network neither dies nor explodes."""
    noise = torch.randn(shape, generator=generator)
    if key.endswith("_embedding.weight"):
        return 0.5 * noise
    if key.endswith(".bias"):
        return 0.02 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    return noise / math.sqrt(math.prod(shape[1:]))


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint in the CompVis layout."""
    generator = torch.Generator().manual_seed(seed)
    shapes = compvis_shapes(config)
    positions = torch.arange(config.text.context_length)[None]
    return {
        key: positions if key == POSITION_IDS else random_weight(key, shape, generator) for key, shape in shapes.items()
    }


def random_networks(config: ModelConfig, seed: int = 0) -> SimpleNamespace:
    """The four networks with random weights, as `to_compvis` takes them."""
    networks = empty_networks(config)
    for name, state in from_compvis(random_state(config, seed), config).items():
        networks[name].load_state_dict(state, assign=True)
        networks[name].eval().requires_grad_(False)
    return SimpleNamespace(**networks)


def random_models(config: ModelConfig, seed: int = 0) -> Models:
    """The same as `load_models` gives."""
    networks = random_networks(config, seed)
    return Models(**vars(networks), tokenizer=Tokenizer(), config=config, device=torch.device("cpu"))
