"""Thousands of damaged and hostile checkpoints: each loads, or is refused in one clear sentence.

`--slow` reads 20,000 of them, and loads 1,000 damaged models and 5,000 damaged LoRAs. `FUZZ_FIRST=20000` continues with
new ones.
"""

import os
import random
import zipfile
from pathlib import Path

import pytest
import safetensors
import torch

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import read_state_dict
from tests.support import mutations
from tests.support.fuzzing import fuzz

FIRST = int(os.environ.get("FUZZ_FIRST", 0))


@pytest.mark.parametrize("files, models, loras", [(60, 2, 4), pytest.param(20_000, 1000, 5000, marks=pytest.mark.slow)])
def test_hostile_files_load_or_are_refused(tmp_path, files, models, loras):
    report = fuzz(tmp_path, FIRST, files=files, models=models, loras=loras)
    slim = {"program"} if FIRST == 0 else {"program", "tensors"}  # kinds that hardly ever load
    kinds = {make.__name__ for make in mutations.KINDS} - slim
    expected = {f"{kind} {end}" for kind in (*kinds, "model", "lora") for end in ("loaded", "refused")}
    if files < 1000:  # too few for each kind to have both ends
        expected = {f"{kind} refused" for kind in ("model", "lora")}
        assert sum(end.endswith("loaded") for end in report["outcomes"]) >= 5
    assert expected <= set(report["outcomes"])


def ours(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        return read_state_dict(path)
    except CheckpointError:
        return None


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit: damaged numbers can be NaN."""

    def content(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    kind = [{name: (t.dtype, t.shape, content(t)) for name, t in state.items()} for state in (a, b)]
    return kind[0] == kind[1]


def safetensors_cases(count: int):
    rng = random.Random(FIRST)
    honest = mutations.seeds()["safetensors"]
    for _ in range(count):
        yield rng.choice([mutations.mutate(honest, rng), mutations.header(rng)])


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_what_is_read_safetensors_reads_the_same(tmp_path, count):
    path, agreed = tmp_path / "a.safetensors", 0
    for content in safetensors_cases(count):
        path.write_bytes(content)
        state = ours(path)
        if state is not None:
            assert same(state, safetensors.torch.load(content))
            agreed += 1
    assert agreed > count / 100


def has_folders(path: Path) -> bool:
    """Whether a record of an archive is marked as a folder. torch 2.13 skips the content of such a record, and the
    tensor holds whatever was in memory before."""
    with zipfile.ZipFile(path) as archive:
        return any(record.external_attr & 0x10 for record in archive.infolist())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch on a mutated one
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_what_both_read_is_the_same_as_in_torch(tmp_path, kind, count):
    rng, path, agreed = random.Random(FIRST), tmp_path / "a.ckpt", 0
    for _ in range(count):
        path.write_bytes(mutations.mutate(mutations.seeds()[kind], rng))
        state = ours(path)
        if state is None or (kind == "zip" and has_folders(path)):
            continue
        try:
            theirs = torch.load(path, weights_only=True)
        except Exception:  # for example, of the checksums in an archive we check only the pickle's
            continue
        theirs = theirs["state_dict"] if isinstance(theirs.get("state_dict"), dict) else theirs
        assert same(state, {name: t for name, t in theirs.items() if isinstance(t, torch.Tensor)})
        agreed += 1
    assert agreed > count / 100
