"""A file or a folder -> the tensors and the configuration of a whole model, if needed with another file's VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sd.checkpoints import variants
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.config_rules import check_config
from sd.checkpoints.diffusers_folder import read_folder
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.key_rules import VAE_PREFIX
from sd.config import PREDICTION_TYPES, ModelConfig


def read_model(
    path: str | Path, vae: str | Path | None = None, prediction_type: str | None = None
) -> tuple[Checkpoint, ModelConfig]:
    """The tensors of a checkpoint file or a folder in the layout of diffusers, and a configuration that was checked.

    `vae` is a second file or folder, whose VAE replaces the model's own; `prediction_type` replaces what the
    configuration says. Raises FileNotFoundError, CheckpointError, and ValueError for an unknown `prediction_type`.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type should be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")
    with name_in_errors(path):
        checkpoint = _read(path)
        config = _config(checkpoint)
    if prediction_type is not None:
        config = variants.with_prediction(config, prediction_type)
    if vae is not None:
        with name_in_errors(vae):
            checkpoint, config = _with_vae(checkpoint, config, _read(vae))
    with name_in_errors(path, vae):
        check_config(config)
    return checkpoint, config


@contextmanager
def name_in_errors(path: str | Path, vae: str | Path | None = None) -> Iterator[None]:
    """Puts the file's name in front of errors in the block; for a missing file, adds where to get one."""
    name = str(Path(path)) if vae is None else f"{Path(path)} with the VAE of {Path(vae)}"
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no checkpoint {name}: `python scripts/download.py` fetches the Stable Diffusion 1.5 weights."
        ) from None
    except ValueError as error:
        raise CheckpointError(str(error) if name in str(error) else f"{name}: {error}") from error


def _read(path: str | Path) -> Checkpoint:
    path = Path(path)
    return read_folder(path) if path.is_dir() else read_checkpoint(path)


def _config(checkpoint: Checkpoint) -> ModelConfig:
    """The configuration that the checkpoint carries, or else the one that its tensors show."""
    if checkpoint.config is None:
        return variants.recognise(checkpoint.state)
    variants.identify(checkpoint.state)  # the folder of a lone VAE carries a configuration too
    return ModelConfig.from_dict(checkpoint.config)


def _with_vae(checkpoint: Checkpoint, config: ModelConfig, other: Checkpoint) -> tuple[Checkpoint, ModelConfig]:
    """The checkpoint and its configuration, with the VAE of `other` in place of its own."""
    vae = variants.vae_layout(other.state)
    rest = {key: tensor for key, tensor in checkpoint.state.items() if not key.startswith(VAE_PREFIX)}
    mappings = checkpoint.mappings + other.mappings
    config = replace(config, vae=ModelConfig.from_dict(other.config or {}).vae)
    return replace(checkpoint, state=rest | vae, mappings=mappings), config
