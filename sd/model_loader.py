"""A path -> networks ready to run.

In: a checkpoint file that `checkpoint` reads, or a folder that `folders` reads. Out: `Models`, the four networks with
its weights.

The networks are built without memory and take the file's own memory-mapped tensors, so loading reads hardly anything:
the weights come in from the disk when they are first used, and there is no second copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoints import variants
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.diffusers_folder import read_folder
from sd.checkpoints.files import read_checkpoint
from sd.config import PREDICTION_TYPES, ModelConfig
from sd.files import DATA
from sd.model_converter import from_compvis
from sd.models import Models, empty_networks
from sd.runtime import speed
from sd.runtime.devices import Device, best_device, best_dtype
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer

TINY_CHECKPOINT = DATA / "tiny.ckpt"

RELEASE_AFTER = 256 << 20  # bytes of the file, copied


def load_models(
    path: str | Path | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    tuned: bool = True,
    compiled: bool = False,
    prediction_type: str | None = None,
) -> Models:
    """The networks of a checkpoint, in evaluation mode and without gradients.

    `path` is a file or a folder in diffusers' layout; the default is the tiny model in `data/`.
    `device` defaults to CUDA, MPS or the CPU, the first that there is; `dtype` to what is fastest there without a
    visible loss. `ema` takes the averaged U-Net weights that training checkpoints carry. `vae` is a second file or
    folder, whose VAE replaces the checkpoint's own. `tuned` and `compiled` are about speed, see `sd.runtime.speed`;
    compilation makes the first picture wait for minutes, and changes pixels by rounding. `prediction_type` is for
    fine-tuned models whose U-Net predicts v ("v_prediction"): a folder or a checkpoint of ours says so itself, other
    files seldom do.

    Raises FileNotFoundError, CheckpointError for what is not a Stable Diffusion 1.x checkpoint, and ValueError for a
    device, dtype or prediction type that cannot be. The files must stay unchanged while the models are in use.
    """
    device = best_device(device)
    dtype = best_dtype(device, dtype)
    path = Path(TINY_CHECKPOINT if path is None else path)
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type should be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")
    with _naming(path):
        checkpoint = _read(path)
        state, config = checkpoint.state, _config(checkpoint)
    if prediction_type is not None:
        config = variants.with_prediction(config, prediction_type)
    if vae is not None:
        state, config = _with_vae(state, config, Path(vae))
    with _naming(path if vae is None else f"{path} with the VAE of {vae}"):
        config.check()
        if config.sampling.sampler not in SAMPLERS:
            raise ValueError(f"config.sampling.sampler should be one of {', '.join(SAMPLERS)}.")
        networks = empty_networks(config)
        weights = from_compvis(state, config, ema, networks)
    if tuned and device.type == "cpu":
        speed.keep_freed_memory()
    for name, network in networks.items():
        network.load_state_dict(weights.pop(name), assign=True)  # the file's own memory
        network.eval().requires_grad_(False)
        # The compiler packs weights itself.
        packs = name == "diffusion" and tuned and not compiled and speed.can_pack(device, dtype)
        speed.place_weights(network, _Placing(checkpoint, device, dtype, ordered=tuned and not packs), packs)
    checkpoint.release()  # what was joined or converted is read no more
    if compiled:
        speed.compile_networks([networks["diffusion"], networks["decoder"]], device, dtype)
    return Models(**networks, tokenizer=Tokenizer(), config=config, device=device)


class _Placing:
    """Brings weights to `device` in `dtype`. Where that takes copies, the file leaves memory as they grow."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, ordered: bool):
        self.checkpoint, self.device, self.dtype, self.ordered = checkpoint, device, dtype, ordered
        self.copied = 0

    def __call__(self, weight: Tensor) -> Tensor:
        order = speed.memory_format(weight, self.device, self.dtype) if self.ordered else torch.preserve_format
        placed = weight.to(self.device, self.dtype, memory_format=order)
        self.copied += weight.nbytes if placed is not weight else 0
        if self.copied > RELEASE_AFTER:
            self.checkpoint.release()
            self.copied = 0
        return placed


def preload_models_from_standard_weights(ckpt_path: str | Path, device: Device = None) -> Models:
    """The video's name for `load_models`."""
    return load_models(ckpt_path, device)


def _read(path: Path) -> Checkpoint:
    return read_folder(path) if path.is_dir() else read_checkpoint(path)


def _config(checkpoint: Checkpoint) -> ModelConfig:
    """What the checkpoint says that it is, or what it looks like."""
    if checkpoint.config is None:
        return variants.recognise(checkpoint.state)
    variants.identify(checkpoint.state)  # a VAE's folder says what it is, too
    return ModelConfig.from_dict(checkpoint.config)


def _with_vae(state: dict[str, Tensor], config: ModelConfig, path: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """The state and configuration with the VAE of the file at `path` in the place of their own."""
    with _naming(path):
        checkpoint = _read(path)
        vae = variants.vae_layout(checkpoint.state)
        vae_config = ModelConfig.from_dict(checkpoint.config or {}).vae
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(variants.VAE_PREFIX)}
    return rest | vae, replace(config, vae=vae_config)


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Errors about a checkpoint name its file, and a missing one says where to get it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no checkpoint {path}: `python scripts/download.py` fetches the Stable Diffusion 1.5 weights."
        ) from None
    except ValueError as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise CheckpointError(named) from error
