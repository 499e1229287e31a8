"""A fingerprint of a run's data and settings, saved in every state, so that no run is resumed with others."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from sd.models import Models
from sd.training.data import fingerprint, read_captions
from sd.training.loop import TrainingError, has_state, load_state
from sd.training.ranks import check_shared, rank_0_first
from sd.training.world.scenes import WORLD

STATES = ("vae", "text", "diffusion", "decoder", "lcm", "lora", "inversion", "control", "full")


def make_record(
    scenes: int,
    folder: Path | None = None,
    seed: int = 0,
    start: Path | None = None,
    models: Models | None = None,
    captions: dict[str, list[str]] | None = None,
) -> dict:
    """Describe a run that trains on `folder`, or if that is None, on this number of `scenes`. `captions` are those of
    the folder, if they are not what `read_captions` gives.

    `models` are loaded from the checkpoint `start`. The record has three entries: "about", a description for people;
    "pictures", the number of images; "sha256", the fingerprint. The fingerprint does not depend on the names of
    `folder` and `start`, which may be moved. Raises DataError for a folder that cannot be used.
    """
    parts = [f"seed {seed}"]
    if folder:
        captions = captions or read_captions(folder)
        count, about = len(captions), f"the {len(captions):,} pictures of {folder}"
        parts.append(fingerprint(folder, captions))
    else:
        count, about = scenes, f"{scenes:,} scenes"
        parts += [about, f"world {WORLD}"]
    about += f" with seed {seed}"
    if models:
        about += f", from {start}"
        parts.append(weights_fingerprint(models.clip, models.encoder, models.decoder, models.diffusion))
    return {"about": about, "pictures": count, "sha256": hashlib.sha256("\n".join(parts).encode()).hexdigest()}


def weights_fingerprint(*networks: nn.Module) -> str:
    """The SHA-256 of all weights in float32: the same whatever the file format."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def make_folder(out: Path, folder: Path | None, record: dict) -> None:
    """Create the folder `out` of a run, or check that it is that of the same run. Raise TrainingError, before anything
    is written, if it is another's, that of the training images `folder`, or cannot be created; and ValueError if ranks
    do not share it."""
    if folder and out.exists() and folder.exists() and out.samefile(folder):
        raise TrainingError(f"{out} has the training images, and samples would mix with them: choose another --out.")
    with rank_0_first():
        check_folder(out, record)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise TrainingError(f"The folder {out} cannot be created: it or a parent of it is a file.") from None
    check_shared(out)


def check_folder(out: Path, record: dict) -> None:
    """Raise TrainingError if `out` has states of another run.

    States of earlier versions have no record and are refused too: it is unknown what they were trained on, and resuming
    would overwrite a model that cannot be reproduced. Nothing in `out` is changed.
    """
    for path in (out / f"{name}.state" for name in STATES):
        if not has_state(path):
            continue
        known = load_state(path, mapped=True).get("record")
        if known is None:
            raise TrainingError(f"{path} does not say what it was trained on: choose another --out.")
        if known["sha256"] != record["sha256"]:
            same = known["about"] == record["about"]
            difference = "which have changed since" if same else f"not on {record['about']}"
            raise TrainingError(f"{out} has a run on {known['about']}, {difference}: choose another --out.")


def check_result(path: Path, state: Path) -> None:
    """Raise TrainingError if there is a file at `path`, where a run writes its result, but not that run's `state`."""
    if path.exists() and not has_state(state):
        raise TrainingError(f"{path} was not trained in this folder and would be overwritten: choose another --out.")
