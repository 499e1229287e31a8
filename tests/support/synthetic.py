"""Small configurations and random weights for tests that need a whole model. Activations stay at unit scale."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from scripts.benchmarks.synthetic_checkpoint import random_state
from sd.config import SD15, ModelConfig, TextConfig, UNetConfig, VAEConfig
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
INPAINTING_MICRO = replace(MICRO, unet=replace(MICRO.unet, in_channels=9))

# One network as wide as SD 1.5's, or half as wide. The other networks are small, to save time.
FULL_TEXT = replace(MICRO, text=SD15.text)
FULL_VAE = replace(MICRO, vae=SD15.vae)
HALF_UNET = replace(MICRO, unet=replace(SD15.unet, channels=(160, 320, 640, 640)))
FULL_UNET = replace(MICRO, unet=SD15.unet)


def random_networks(config: ModelConfig, seed: int = 0) -> SimpleNamespace:
    """The four networks with random weights, in the form that `to_compvis` takes."""
    networks = empty_networks(config)
    for name, state in from_compvis(random_state(config, seed), config).items():
        networks[name].load_state_dict(state, assign=True)
        networks[name].eval().requires_grad_(False)
    return SimpleNamespace(**networks)


def random_models(config: ModelConfig, seed: int = 0) -> Models:
    """The same networks in the form that `load_models` returns."""
    networks = random_networks(config, seed)
    return Models(**vars(networks), tokenizer=Tokenizer(), config=config, device=torch.device("cpu"))
