"""Tiny autoencoders with random weights, and files of them in every layout that people share."""

import json
from pathlib import Path

import torch
from torch import nn

from sd.adapters.tiny_autoencoder import NETWORKS
from sd.checkpoints.files import write_checkpoint

CONFIG = {
    "_class_name": "AutoencoderTiny",
    "act_fn": "relu",
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "scaling_factor": 1.0,
}


def random_tiny_autoencoder(seed: int = 0) -> dict[str, nn.Module]:
    """Both halves. ReLU keeps half, so weights are large; those that end a block are small."""
    torch.manual_seed(seed)
    networks = {name: network() for name, network in NETWORKS.items()}
    for name, tensor in ((key, x) for network in networks.values() for key, x in network.state_dict().items()):
        if tensor.ndim == 4:
            gain = 0.1 if ".conv.4." in name else 1.3
            tensor.copy_(torch.randn(tensor.shape) * gain / tensor[0].numel() ** 0.5)
    decoder = networks["decoder"].layers[19]
    decoder.weight.data.mul_(0.3)
    decoder.bias.data.add_(0.5)  # pictures are in [0, 1]
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def published(networks: dict[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """{"encoder": tensors under the names in taesd_encoder.pth, "decoder": ...}."""
    states = {name: network.state_dict() for name, network in networks.items()}
    return {name: {key.removeprefix("layers."): x for key, x in state.items()} for name, state in states.items()}


def diffusers_state(networks: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Both under the names of diffusers' AutoencoderTiny."""
    state = {}
    for name, tensors in published(networks).items():
        for key, tensor in tensors.items():
            number, rest = key.split(".", 1)
            state[f"{name}.layers.{int(number) - (name == 'decoder')}.{rest}"] = tensor
    return state


def write_published(folder: Path, networks: dict[str, nn.Module], suffix: str = "pth") -> Path:
    folder.mkdir(exist_ok=True)
    for name, state in published(networks).items():
        write_checkpoint(folder / f"taesd_{name}.{suffix}", state)
    return folder


def write_diffusers(folder: Path, networks: dict[str, nn.Module], **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    write_checkpoint(folder / "diffusion_pytorch_model.safetensors", diffusers_state(networks))
    return folder
