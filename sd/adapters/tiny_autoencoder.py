"""TAESD: a tiny autoencoder in the place of the VAE, for SD 1.x and 2.x (github.com/madebyollin/taesd; no paper).

In and out are those of `Encoder` and `Decoder`: images (B, 3, H, W) in [-1, 1], and scaled latents (B, 4, H/8, W/8).
It was trained to give the VAE's own results, with 1.2 million weights in each half instead of 34 and 50 million, and
without attention or norms. So decoding is fast enough for every step, and an image loses some detail.

Two things differ. Its latents are those that the U-Net works on, so nothing is multiplied by 0.18215. And its encoder
gives one result, where the VAE's gives a distribution to sample from.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.checkpoints import hub
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.diffusers_folder import foreign
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.folder_files import class_name, find_weights, read_json
from sd.checkpoints.key_rules import without_wrappers
from sd.checkpoints.variants import other_file
from sd.checkpoints.whole_model import name_in_errors
from sd.model_converter import check_fit, from_float8
from sd.models import NoInitialisation
from sd.runtime import speed
from sd.runtime.devices import Device, best_device, best_dtype

WIDTH, LATENT_CHANNELS = 64, 4
LEVELS, BLOCKS = 3, 3  # how often a side is halved, and blocks at each of these sizes
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
LARGE_LATENTS = 16  # channels: Stable Diffusion 3 and FLUX
FAMILY_IN_NAME = re.compile("taesd(xl|3)|taef1", re.IGNORECASE)  # those of XL have the same shapes
# Values in config.json that may be absent; others mean other computations.
FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "scaling_factor": 1, "shift_factor": 0}


class Block(nn.Module):
    """relu(x + f(x)), where f is three 3x3 convolutions with ReLU in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 64, H, W) -> (B, 64, H, W)."""
        return F.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """3 tanh(x / 3): large latents are brought to between -3 and 3, small ones hardly change."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return 3 * torch.tanh(x / 3)


def _conv(in_channels: int = WIDTH, out_channels: int = WIDTH, **options: object) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)


def _blocks(count: int = BLOCKS) -> list[Block]:
    return [Block() for _ in range(count)]


class TinyEncoder(nn.Module):
    """The encoder. Its layers have the numbers that they have in the published file."""

    def __init__(self) -> None:
        super().__init__()
        layers = [_conv(3), *_blocks(1)]
        for _ in range(LEVELS):
            layers += [_conv(stride=2, bias=False), *_blocks()]
        self.layers = nn.Sequential(*layers, _conv(out_channels=LATENT_CHANNELS))

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8). `noise` is not used: see above."""
        latents = self.layers((image + 1) / 2)
        return latents if noise is None else latents.expand_as(noise)  # one image makes several latents


class TinyDecoder(nn.Module):
    """The decoder. Its layers have the numbers that they have in the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # set by `guidance.by_loss`; the maps are small enough without
        layers = [SoftClamp(), _conv(LATENT_CHANNELS), nn.ReLU()]
        for _ in range(LEVELS):
            layers += [*_blocks(), nn.Upsample(scale_factor=2), _conv(bias=False)]
        self.layers = nn.Sequential(*layers, *_blocks(1), _conv(out_channels=3))

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/8, W/8) -> image (B, 3, H, W), in [-1, 1] except for a little overshoot."""
        return 2 * self.layers(latents) - 1


NETWORKS = {"encoder": TinyEncoder, "decoder": TinyDecoder}


def is_tiny_autoencoder(path: str | Path) -> bool:
    """Whether a file or folder holds such an autoencoder, of any family. False for one that cannot be read."""
    try:
        path = Path(path)
        if path.is_dir():
            return class_name(path) == "AutoencoderTiny" or bool(_halves(path))
        return "TAESD" in (other_file(read_checkpoint(path).state) or "")
    except (OSError, ValueError, TypeError):
        return False


def load_tiny_autoencoder(
    path: str | Path, device: Device = None, dtype: torch.dtype | None = None, argument: str = "vae"
) -> dict[str, nn.Module]:
    """{"encoder": TinyEncoder, "decoder": TinyDecoder}, in evaluation mode and without gradients.

    `path`: a folder with the two published files, taesd_encoder and taesd_decoder; one of these two, beside the other;
    a folder or file in the layout of diffusers; or its name on the hub. `device` and `dtype` as for `load_models`.
    `argument` is what errors call it.

    The result lacks the encoder if there is only a decoder, which is enough for previews. Raises FileNotFoundError,
    CheckpointError for any other file and for the autoencoders of Stable Diffusion XL, 3 and FLUX, ValueError for an
    invalid device or dtype, and what `hub.fetch` raises.
    """
    device = best_device(device)
    dtype = best_dtype(device, dtype)
    path = hub.fetch(path) if hub.is_name(path) else Path(path)
    networks = {}
    with name_in_errors(path, argument=f"{argument}: "):
        for name, state in _read(path).items():
            with torch.device("meta"), NoInitialisation():
                network = NETWORKS[name]()
            shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
            check_fit(state, shapes, {}, lambda _, name=name: f"tiny {name}")
            weights = {key: from_float8(key, tensor, state).reshape(shapes[key]) for key, tensor in state.items()}
            network.load_state_dict(weights, assign=True)
            speed.place_network(network.eval().requires_grad_(False), device, dtype)
            networks[name] = network
    return networks


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each half, under our names: {"encoder": {"layers.0.weight": ...}, "decoder": ...}."""
    name = path.parents[1].name if path.parent.name == "snapshots" else path.name  # in the hub's cache, the model's
    if family := FAMILY_IN_NAME.search(name):
        raise CheckpointError(
            f"It should be the tiny autoencoder of Stable Diffusion 1.x and 2.x, taesd, not {family[0]}."
        )
    file = path
    if path.is_dir():
        if files := _halves(path):
            halves = {name: read_checkpoint(half).state for name, half in files.items()}
            return _checked({name: _our_names(state, "") for name, state in halves.items()})
        if class_name(path) != "AutoencoderTiny":
            raise CheckpointError("This folder should hold taesd_encoder and taesd_decoder, or an AutoencoderTiny.")
        file = find_weights(path, "vae")
    state = without_wrappers(read_checkpoint(file).state)
    if any(key.startswith(("encoder.layers.", "decoder.layers.")) for key in state):
        _check_config(file.parent / "config.json")
        return _checked({name: _our_names(state, f"{name}.layers.") for name in NETWORKS})
    if "TAESD" not in (other_file(state) or ""):
        raise CheckpointError("This file has no tiny autoencoder: give taesd_encoder, taesd_decoder, or their folder.")
    name, other = ("decoder", "encoder") if "19.weight" in state else ("encoder", "decoder")
    halves = {name: _our_names(state, "")}
    beside = path.with_name(path.name.replace(name, other))
    if beside != path and beside.is_file():
        halves[other] = _our_names(read_checkpoint(beside).state, "")
    return _checked(halves)


def _halves(folder: Path) -> dict[str, Path]:
    """The published files in a folder."""
    found = {}
    for name in NETWORKS:
        files = (folder / f"taesd_{name}{suffix}" for suffix in SUFFIXES)
        if file := next((file for file in files if file.is_file()), None):
            found[name] = file
    return found


def _our_names(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with `prefix`, under our names. diffusers does not count the decoder's first layer,
    which has no weights."""
    counted = prefix.startswith("decoder.")
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return {
        re.sub(r"^(\d{1,3})\.", lambda match: f"layers.{int(match[1]) + counted}.", key): tensor
        for key, tensor in own.items()
    }


def _checked(halves: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The two halves. Raises CheckpointError without a decoder, or for latents of another family."""
    if "decoder" not in halves:
        raise CheckpointError("This is an encoder alone: put taesd_decoder beside it.")
    first = halves["decoder"].get("layers.1.weight")
    if first is not None and first.ndim == 4 and first.shape[1] == LARGE_LATENTS:
        raise CheckpointError(
            f"It should be the tiny autoencoder of Stable Diffusion 1.x and 2.x, for {LATENT_CHANNELS} channels of "
            f"latents, not one of Stable Diffusion 3 or FLUX, for {LARGE_LATENTS}."
        )
    return halves


def _check_config(path: Path) -> None:
    """Raises CheckpointError if a config.json of this autoencoder says that it computes something else."""
    values = read_json(path) if path.is_file() and class_name(path.parent) == "AutoencoderTiny" else {}
    for name, value in FIXED.items():
        if values.get(name, value) != value:
            raise foreign(path, name, repr(value), values[name])
