"""The four networks of a Stable Diffusion model, with the tokenizer and the configuration they were built from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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
    loras: tuple = ()  # those in the weights, each (path, strength in the U-Net, in the text encoder)
    change: Callable | None = field(default=None, repr=False)  # makes `with_loras`; from `load_models`

    def with_loras(self, loras: Iterable) -> Models:
        """Models with these LoRAs, and without those before; `loras` are as in `load_models`. An empty list gives the
        checkpoint's own weights, to the bit.

        These models stay as they are: both share what no LoRA changes. Changed layers are read again from the
        checkpoint's file. Raises ValueError if the models are not from `load_models`, and what it raises for LoRAs.
        """
        if self.change is None:
            raise ValueError("models should be what load_models returns: a LoRA changes the weights in their file.")
        return self.change(self, loras)


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
