"""What a run is on, kept in every state that it writes: so no other run goes on from there unnoticed.

In: the arguments of a run. Out: a record of them, or an error if the run's folder holds another run already.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sd.models import Models
from sd.training.data import fingerprint, read_captions
from sd.training.loop import TrainingError, load_state

STATES = ("vae", "text", "diffusion", "decoder")


def make_record(
    scenes: int, folder: Path | None = None, seed: int = 0, start: Path | None = None, models: Models | None = None
) -> dict:
    """What is trained on: `folder`, or else so many `scenes`; `models` are those of the checkpoint `start`.

    "about" is for people, "pictures" their number, and "sha256" tells runs apart: it is of everything but names of
    folders and of `start`, which may be moved. Raises DataError for a folder that cannot be used.
    """
    parts = [f"seed {seed}"]
    if folder:
        captions = read_captions(folder)
        count, about = len(captions), f"the {len(captions):,} pictures of {folder}"
        parts.append(fingerprint(folder, captions))
    else:
        count, about = scenes, f"{scenes:,} scenes"
        parts.append(about)
    about += f" with seed {seed}"
    if models:
        about += f", from {start}"
        parts.append(weights_fingerprint(models))
    return {"about": about, "pictures": count, "sha256": hashlib.sha256("\n".join(parts).encode()).hexdigest()}


def weights_fingerprint(models: Models) -> str:
    """Of all weights in float32, in whatever file they were."""
    digest = hashlib.sha256()
    for network in (models.clip, models.encoder, models.decoder, models.diffusion):
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().numpy())
    return digest.hexdigest()


def check_folder(out: Path, record: dict) -> None:
    """Raises TrainingError if `out` holds the states of another run, or a model of no run there.

    States without a record, of an earlier version, are refused too: nobody can tell what they were trained on, and a
    run that goes on from them would replace a model that cannot be made again. They stay as they are.
    """
    for path in (out / f"{name}.state" for name in STATES):
        if not path.exists():
            continue
        known = load_state(path, mapped=True).get("record")
        if known is None:
            raise TrainingError(f"{path} does not say what it was trained on: give another --out.")
        if known["sha256"] != record["sha256"]:
            same = known["about"] == record["about"]
            difference = "and these have changed since" if same else f"not on {record['about']}"
            raise TrainingError(
                f"{out} holds a run on {known['about']}, {difference}: give another --out for another run."
            )
    model = out / "tiny.ckpt"
    if model.exists() and not (out / "diffusion.state").exists():
        raise TrainingError(f"{model} is not of a run in this folder, which would replace it: give another --out.")
