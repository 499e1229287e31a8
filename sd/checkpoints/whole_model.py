"""A file or a folder -> the tensors and the configuration of a whole model, if needed with another file's VAE."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sd.checkpoints import variants
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.config_rules import check_config
from sd.checkpoints.diffusers_folder import read_folder
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.key_rules import VAE_PREFIX, without_wrappers
from sd.checkpoints.self_description import yaml_beside
from sd.checkpoints.shards import INDEX, read_shards
from sd.config import PREDICTION_TYPES, ModelConfig
from sd.runtime import warn

XL_SCALING_FACTOR = 0.13025  # of the VAE of Stable Diffusion XL, whose tensors have the same names and shapes


def read_model(
    path: str | Path, vae: str | Path | None = None, prediction_type: str | None = None
) -> tuple[Checkpoint, ModelConfig]:
    """The tensors of a checkpoint file or a folder in the layout of diffusers, and a configuration that was checked.

    `vae` is a second file or folder, whose VAE replaces the model's own; `prediction_type` replaces what the
    configuration says. Raises FileNotFoundError, CheckpointError, TypeError for a path of another type, and ValueError
    for an unknown `prediction_type`.
    """
    for name, value in {"path": path, "vae": path if vae is None else vae}.items():
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} should be the path of a file or a folder, not {value!r:.80}.")
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type should be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")
    with name_in_errors(path):
        checkpoint = _read(Path(path))
        checkpoint, config = _configured(checkpoint, Path(path), prediction_type)
    if prediction_type is not None:
        config = variants.with_prediction(config, prediction_type)
        checkpoint = replace(checkpoint, prediction_guessed=False)
    if vae is not None:
        with name_in_errors(vae, argument="vae: "):
            checkpoint, config = _with_vae(checkpoint, config, _read(Path(vae)))
    with name_in_errors(path, vae):
        check_config(config)
    if config.schedule.rescale_betas_zero_snr and config.schedule.prediction_type == "epsilon":
        warn(
            "This model starts from noise alone (zero-terminal SNR), where a U-Net that predicts noise shows nothing: "
            "prediction_type should be v_prediction."
        )
    return checkpoint, config


@contextmanager
def name_in_errors(path: str | Path, vae: str | Path | None = None, argument: str = "") -> Iterator[None]:
    """Puts the file's name, and the argument's, in front of errors in the block; says where to get a missing model."""
    name = str(Path(path)) if vae is None else f"{Path(path)} with the VAE of {Path(vae)}"
    try:
        yield
    except FileNotFoundError:
        if argument:
            raise FileNotFoundError(f"{argument}There is no file or folder at {name}.") from None
        raise FileNotFoundError(
            f"There is no checkpoint {name}: `sh scripts/download.sh` fetches the Stable Diffusion 1.5 weights."
        ) from None
    except ValueError as error:
        raise CheckpointError(argument + (str(error) if name in str(error) else f"{name}: {error}")) from error


def _read(path: Path) -> Checkpoint:
    """A folder, a file, or the index of several files, with the keys that an unwrapped model has."""
    if path.is_dir():
        return read_folder(path)
    if path.name.endswith(INDEX):
        checkpoint = read_shards(path)
    else:
        index = path.with_name(re.sub(r"-\d+-of-\d+(?=\.)", "", path.name) + INDEX)
        if index.name != path.name + INDEX and index.is_file():
            raise CheckpointError(f"{path} is one of several files of a model: give {index}.")
        checkpoint = read_checkpoint(path)
    state, unreadable = without_wrappers(checkpoint.state), without_wrappers(checkpoint.unreadable)
    return replace(checkpoint, state=state, unreadable=unreadable)


def _configured(
    checkpoint: Checkpoint, path: Path, prediction_type: str | None = None
) -> tuple[Checkpoint, ModelConfig]:
    """The checkpoint with the configuration that it carries, or else with the one that its tensors and its description
    show.

    Of Stable Diffusion 2, the image size follows from the prediction type. So what the caller says comes in as if the
    file said it.
    """
    if checkpoint.config is not None:
        variants.identify(checkpoint.state)  # the folder of a lone VAE carries a configuration too
        config = ModelConfig.from_dict(checkpoint.config)
        if checkpoint.prediction_guessed:
            config = variants.with_prediction(config, variants.prediction_by_bias(checkpoint.state))
            checkpoint = replace(checkpoint, prediction_guessed=variants.is_doubtful(checkpoint.state))
        return checkpoint, config
    said = {"modelspec.prediction_type": prediction_type} if prediction_type else {}
    description = checkpoint.metadata | said, yaml_beside(path)
    config = variants.recognise(checkpoint.state, *description, path.name)
    return replace(checkpoint, prediction_guessed=variants.is_guess(config, checkpoint.state, *description)), config


def _with_vae(checkpoint: Checkpoint, config: ModelConfig, other: Checkpoint) -> tuple[Checkpoint, ModelConfig]:
    """The checkpoint and its configuration, with the VAE of `other` in place of its own."""
    vae = variants.vae_layout(other.state)
    settings = ModelConfig.from_dict(other.config or {}).vae
    if settings.scaling_factor == XL_SCALING_FACTOR:
        raise CheckpointError("This is the VAE of Stable Diffusion XL, which makes other latents.")
    rest = {key: tensor for key, tensor in checkpoint.state.items() if not key.startswith(VAE_PREFIX)}
    mappings = checkpoint.mappings + other.mappings
    config = replace(config, vae=settings)
    return replace(checkpoint, state=rest | vae, mappings=mappings), config
