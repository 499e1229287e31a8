"""A path -> networks ready to run.

The networks are built without memory and then use the file's own memory-mapped tensors. So loading reads hardly
anything: weights are read from the disk when they are first used, and there is no second copy of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.adapters.lora import Change
from sd.adapters.lora_files import Changes, Given, Lora, as_lora, read_loras
from sd.adapters.lora_modules import replace_modules, sharing_weights
from sd.adapters.textual_inversion import (
    Embedding,
    GivenEmbedding,
    read_embeddings,
    with_embeddings,
    without_words,
)
from sd.adapters.tiny_autoencoder import is_tiny_autoencoder, load_tiny_autoencoder
from sd.checkpoints import hub
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.key_rules import VAE_PREFIX
from sd.checkpoints.probe import settle_prediction
from sd.checkpoints.whole_model import name_in_errors, read_model
from sd.config import ModelConfig
from sd.files import DATA
from sd.model_converter import from_compvis
from sd.models import Models, empty_networks
from sd.runtime import speed
from sd.runtime.devices import Device, best_device, best_dtype, device_and_dtype
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
    loras: Iterable[Given] = (),
    embeddings: Iterable[GivenEmbedding] = (),
) -> Models:
    """The networks of a checkpoint, in evaluation mode and without gradients.

    `path`: a file, a folder in the layout of diffusers, or a name on the hub, "owner/name" (`sd.checkpoints.hub`). The
        default is the tiny model in `data/`.
    `device`, `dtype`: by default CUDA, MPS or the CPU, and the dtype that is fastest there without a visible loss.
    `ema`: take the averaged U-Net weights that training checkpoints carry.
    `vae`: a second file, folder or name, whose VAE, or tiny autoencoder (`sd.adapters`), replaces the checkpoint's own.
    `tuned`, `compiled`: faster, see `sd.runtime.speed`. Compiled, the first image takes minutes, and rounding differs.
    `prediction_type`: "v_prediction" if the U-Net predicts v and the file does not say so (`sd.checkpoints` reads what
    it says: its configuration, marks, metadata, or a yaml beside it).
    `loras`: LoRA files that change the weights (`sd.adapters`). Each is a path, (path, strength), or (path, strength in
        the U-Net, strength in the text encoder). `models.with_loras` gives the same models with others.
    `embeddings`: files of textual inversion, whose words prompts can then use (`sd.adapters.textual_inversion`). Each
        is a path or (path, word).

    Raises FileNotFoundError, CheckpointError for a file that is not a Stable Diffusion 1.x or 2.x checkpoint and for a
    LoRA that does not fit it, TypeError for a path of another type, ValueError for an invalid device, dtype, prediction
    type or strength, and what `hub.fetch` raises.
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
    tiny = load_tiny_autoencoder(vae, device, dtype) if vae is not None and is_tiny_autoencoder(vae) else {}
    if tiny.keys() == {"decoder"}:
        raise CheckpointError(f"vae: {vae} is a tiny decoder alone: put its encoder beside it.")
    used = _as_loras(loras)
    checkpoint, config, networks, weights = _read(path, vae, prediction_type, ema, tiny)
    changes, bundled = read_loras(used, config, networks)
    path, vae = (given and Path(given).absolute() for given in (path, vae))  # the current folder may change
    stamp, changed, words = _stamp(path, vae), frozenset(changes), _words(bundled)
    source = _Source(config, path, vae, prediction_type, ema, tuple(tiny), tuned, compiled, stamp, changed, words)
    blank = empty_networks(config) if changes else {}
    if tuned and device.type == "cpu":
        speed.keep_freed_memory()
    for name, network in networks.items():
        network.load_state_dict(weights[name], assign=True)  # the file's own memory
        network.eval().requires_grad_(False)
        place, pack = source.placing(name, checkpoint, device, dtype, device)
        speed.place_weights(network, place, pack)
        if of_network := _of(name, changes, changes):
            replace_modules(network, weights[name], of_network, blank[name], place, pack)
        del weights[name]
    networks |= tiny
    checkpoint.release()  # tensors that were joined or converted are not read again
    tokenizer = _tokenizer(config, checkpoint.added_words)
    models = Models(**networks, tokenizer=tokenizer, config=config, device=device, loras=used, change=source.change)
    if checkpoint.prediction_guessed:
        models.config = settle_prediction(models)
    if compiled:
        speed.compile_networks([models.diffusion, models.decoder], device, dtype)
    return with_embeddings(models, [*embeddings, *bundled]) if embeddings or bundled else models


def _tokenizer(config: ModelConfig, added_words: dict[str, int]) -> Tokenizer:
    pad_token_id = 0 if config.text.zero_padding else None
    if not added_words:
        return Tokenizer(pad_token_id=pad_token_id)
    from sd.prompts.added_words import TokenizerWithWords, grouped  # only here: hardly any model has such words

    return TokenizerWithWords(grouped(added_words), pad_token_id)


def preload_models_from_standard_weights(ckpt_path: str | Path, device: Device = None) -> Models:
    """The video's name for `load_models`."""
    return load_models(ckpt_path, device)


def _read(
    path: str | Path,
    vae: str | Path | None,
    prediction_type: str | None,
    ema: bool,
    tiny: Collection[str] = (),
    networks: dict[str, nn.Module] | None = None,
) -> tuple[Checkpoint, ModelConfig, dict[str, nn.Module], dict[str, dict[str, Tensor]]]:
    """The checkpoint, its configuration, empty `networks` (made here, or given), and the state dict of each.

    `tiny` are the networks that the tiny autoencoder `vae` replaces. Their weights in the checkpoint are not read.
    """
    checkpoint, config = read_model(path, None if tiny else vae, prediction_type)
    with name_in_errors(path, vae):
        if config.sampling.sampler not in SAMPLERS:
            raise ValueError(f"config.sampling.sampler should be one of {', '.join(SAMPLERS)}.")
        networks = networks or empty_networks(config)
        if tiny:
            networks |= dict.fromkeys(tiny, nn.Module())
            rest = {key: tensor for key, tensor in checkpoint.state.items() if not key.startswith(VAE_PREFIX)}
            checkpoint = replace(checkpoint, state=rest)
        weights = from_compvis(checkpoint.state, config, ema, networks, checkpoint.unreadable)
    return checkpoint, config, networks, weights


@dataclass(frozen=True)
class _Source:
    """Where the weights of models come from, and how they were placed: what `Models.with_loras` needs."""

    config: ModelConfig  # as in the file: that of the models may have more words
    path: Path
    vae: Path | None
    prediction_type: str | None
    ema: bool
    tiny: tuple[str, ...]  # the networks that a tiny autoencoder replaces
    tuned: bool
    compiled: bool
    stamp: tuple  # of the files when they were read
    changed: frozenset[tuple[str, str]]  # the modules with LoRAs
    words: tuple[str, ...]  # bundled with LoRAs

    def change(self, models: Models, loras: Iterable[Given]) -> Models:
        """What `Models.with_loras` returns."""
        used = _as_loras(loras)
        blank = empty_networks(self.config)
        changes, bundled = read_loras(used, self.config, blank)
        models = without_words(models, self.words) if self.words else models
        models = with_embeddings(models, bundled) if bundled else models
        modules = self.changed | changes.keys()
        networks = {}
        if modules:
            if _stamp(self.path, self.vae) != self.stamp:
                raise CheckpointError(f"{self.path} has changed since it was loaded, or is gone: load a model again.")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it has warned when it was loaded
                checkpoint, _, _, weights = _read(self.path, self.vae, self.prediction_type, self.ema, self.tiny, blank)
        for name in sorted({name for name, _ in modules}):
            network = getattr(models, name)
            device, dtype = device_and_dtype(network)
            networks[name] = sharing_weights(network)
            place, pack = self.placing(name, checkpoint, device, dtype, models.device)
            replace_modules(networks[name], weights[name], _of(name, modules, changes), blank[name], place, pack)
            if self.compiled and name == "diffusion":
                speed.compile_networks([networks[name]], device, dtype)
        if modules:
            checkpoint.release()
        change = replace(self, changed=frozenset(changes), words=_words(bundled)).change
        return replace(models, **networks, loras=used, change=change)

    def placing(
        self, name: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, computes: torch.device
    ) -> tuple[Callable[[Tensor], Tensor], bool]:
        """How the weights of a network are placed: the arguments `place` and `pack` of `speed.place_weights`.

        `device` is where the network is now, `computes` where it computes: it may be waiting on an idle device.
        """
        # torch.compile packs weights itself, and packing chooses its own memory order.
        pack = name == "diffusion" and self.tuned and not self.compiled and speed.can_pack(computes, dtype)
        return _placer(checkpoint, device, dtype, reorder=self.tuned and not pack), pack


def _as_loras(loras: Iterable[Given]) -> tuple[Lora, ...]:
    if isinstance(loras, (str, Path)):
        raise TypeError(f"loras should be a list, as in loras=[{str(loras)!r:.80}], not one path.")
    if isinstance(loras, Mapping) or not isinstance(loras, Iterable):
        raise TypeError(f"loras should be a list of paths or (path, strength), not {loras!r:.80}.")
    return tuple(as_lora(given) for given in loras)


def _words(embeddings: Iterable[Embedding]) -> tuple[str, ...]:
    return tuple(word for embedding in embeddings for word in embedding.words)


def _of(name: str, modules: Iterable[tuple[str, str]], changes: Changes) -> dict[str, list[Change]]:
    """Those of the modules that are in one network, and the changes of each."""
    return {module: changes.get((network, module), []) for network, module in modules if network == name}


def _stamp(*paths: str | Path | None) -> tuple:
    """The times and sizes of files, and of the weights in folders: equal while nobody changes them. Empty if one is
    gone."""
    files = []
    for path in (Path(path) for path in paths if path is not None):
        inside = sorted(file for file in path.rglob("*") if file.suffix in hub.FILE_SUFFIXES) if path.is_dir() else []
        files += inside or [path]
    try:
        return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except OSError:
        return ()


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
