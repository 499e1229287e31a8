"""A path -> networks ready to run.

The networks are built without memory and then use the file's own memory-mapped tensors. So loading reads hardly
anything: weights are read from the disk when they are first used, and there is no second copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from sd.adapters.textual_inversion import GivenEmbedding, read_embeddings, with_embeddings
from sd.checkpoints import hub
from sd.checkpoints.checkpoint import Checkpoint
from sd.checkpoints.probe import settle_prediction
from sd.checkpoints.whole_model import name_in_errors, read_model
from sd.config import ModelConfig
from sd.files import DATA
from sd.model_converter import from_compvis
from sd.models import Models, empty_networks
from sd.runtime import speed
from sd.runtime.devices import Device, best_device, best_dtype
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer

TINY_CHECKPOINT = DATA / "tiny.ckpt"
RELEASE_AFTER = 256 << 20  # bytes of the file, once copied


def load_models(
    path: str | Path | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    tuned: bool = True,
    compiled: bool = False,
    prediction_type: str | None = None,
    embeddings: Iterable[GivenEmbedding] = (),
) -> Models:
    """The networks of a checkpoint, in evaluation mode and without gradients.

    `path`: a file, a folder in the layout of diffusers, or a name on the hub, "owner/name" (`sd.checkpoints.hub`). The
        default is the tiny model in `data/`.
    `device`, `dtype`: by default CUDA, MPS or the CPU, and the dtype that is fastest there without a visible loss.
    `ema`: take the averaged U-Net weights that training checkpoints carry.
    `vae`: a second file, folder or name, whose VAE replaces the checkpoint's own.
    `tuned`, `compiled`: faster, see `sd.runtime.speed`. Compiled, the first image takes minutes, and rounding differs.
    `prediction_type`: "v_prediction" if the U-Net predicts v and the file does not say so (`sd.checkpoints` reads what
    it says: its configuration, marks, metadata, or a yaml beside it).
    `embeddings`: files of textual inversion, whose words prompts can then use (`sd.adapters.textual_inversion`). Each
        is a path or (path, word).

    Raises FileNotFoundError, CheckpointError for a file that is not a Stable Diffusion 1.x or 2.x checkpoint, TypeError
    for a path of another type, ValueError for an invalid device, dtype or prediction type, and what `hub.fetch` raises.
    The files must not change while the models are in use.
    """
    device = best_device(device)
    dtype = best_dtype(device, dtype)
    path = TINY_CHECKPOINT if path is None else path
    if path == TINY_CHECKPOINT and not TINY_CHECKPOINT.exists():
        raise FileNotFoundError(
            f"The tiny model, {path}, is missing: `git checkout data/tiny.ckpt` brings it back, and so does cloning or "
            "installing again; `python scripts/train_tiny.py` trains another, and `sh scripts/download.sh` fetches "
            "Stable Diffusion 1.5 (4.3 GB)."
        )
    embeddings = read_embeddings(embeddings)
    half = dtype.itemsize == 2
    path, vae = (hub.fetch(given, half) if hub.is_name(given) else given for given in (path, vae))
    checkpoint, config = read_model(path, vae, prediction_type)
    with name_in_errors(path, vae):
        if config.sampling.sampler not in SAMPLERS:
            raise ValueError(f"config.sampling.sampler should be one of {', '.join(SAMPLERS)}.")
        networks = empty_networks(config)
        weights = from_compvis(checkpoint.state, config, ema, networks, checkpoint.unreadable)
    if tuned and device.type == "cpu":
        speed.keep_freed_memory()
    for name, network in networks.items():
        network.load_state_dict(weights.pop(name), assign=True)  # the file's own memory
        network.eval().requires_grad_(False)
        # torch.compile packs weights itself, and packing chooses its own memory order.
        pack = name == "diffusion" and tuned and not compiled and speed.can_pack(device, dtype)
        speed.place_weights(network, _placer(checkpoint, device, dtype, reorder=tuned and not pack), pack)
    checkpoint.release()  # tensors that were joined or converted are not read again
    tokenizer = _tokenizer(config, checkpoint.added_words)
    models = Models(**networks, tokenizer=tokenizer, config=config, device=device)
    if checkpoint.prediction_guessed:
        models.config = settle_prediction(models)
    if compiled:
        speed.compile_networks([models.diffusion, models.decoder], device, dtype)
    return with_embeddings(models, embeddings) if embeddings else models


def _tokenizer(config: ModelConfig, added_words: dict[str, int]) -> Tokenizer:
    pad_token_id = 0 if config.text.zero_padding else None
    if not added_words:
        return Tokenizer(pad_token_id=pad_token_id)
    from sd.prompts.added_words import TokenizerWithWords, grouped  # only here: hardly any model has such words

    return TokenizerWithWords(grouped(added_words), pad_token_id)


def preload_models_from_standard_weights(ckpt_path: str | Path, device: Device = None) -> Models:
    """The video's name for `load_models`."""
    return load_models(ckpt_path, device)


def _placer(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, reorder: bool
) -> Callable[[Tensor], Tensor]:
    """A function that moves one weight to `device` in `dtype`; `reorder` also picks the memory order that is fastest.

    This releases the file's memory after every RELEASE_AFTER copied bytes: memory never holds the file and its copy.
    """
    copied = 0

    def place(weight: Tensor) -> Tensor:
        nonlocal copied
        order = speed.memory_format(weight, device, dtype) if reorder else torch.preserve_format
        placed = weight.to(device, dtype, memory_format=order)
        if placed is not weight:
            copied += weight.nbytes
        if copied > RELEASE_AFTER:
            checkpoint.release()
            copied = 0
        return placed

    return place
