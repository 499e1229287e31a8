"""The four networks of a Stable Diffusion model, with the tokenizer and the configuration they were built from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sd.clip import CLIP
from sd.config import ModelConfig
from sd.decoder import Decoder
from sd.diffusion import Diffusion
from sd.encoder import Encoder
from sd.tokenizer import Tokenizer


@dataclass
class Models:
    """Everything that `generate` needs."""

    clip: CLIP
    encoder: Encoder
    decoder: Decoder
    diffusion: Diffusion
    tokenizer: Tokenizer
    config: ModelConfig
    device: torch.device  # where the networks compute


def empty_networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The four networks on the meta device: shapes without memory, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"), NoInitialisation():
        return {
            "clip": CLIP(config.text),
            "encoder": Encoder(config.vae),
            "decoder": Decoder(config.vae),
            "diffusion": Diffusion(config.unet),
        }


class NoInitialisation(TorchFunctionMode):
    """Skips the initialisation of parameters: even on the meta device, `normal_` loads a compiler for a second."""

    SKIPPED = (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in self.SKIPPED else func(*args, **kwargs)
