"""Weights that are split over several files, and their index."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.shards import read_shards

INDEX = "model.safetensors.index.json"


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    return folder / INDEX


def test_all_parts_are_read(tmp_path):
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for key, name in names.items():
        save_file({key: torch.arange(3.0)}, tmp_path / name)
    checkpoint = read_shards(write_index(tmp_path, names))
    assert checkpoint.state.keys() == {"a", "b"}
    assert torch.equal(checkpoint.state["b"], torch.arange(3.0))
    assert len(checkpoint.mappings) == 2


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "absent.safetensors"}, "absent.safetensors is missing, but .*index.json names it"),
        ({"a": "../other.safetensors"}, "should name files in its own folder, not '../other.safetensors'"),
        ({"a": "/etc/passwd"}, "should name files in its own folder"),
        ({"a": ".."}, "is missing"),
        ({"a": 5}, "should name files in its own folder, not 5"),
        ({"a": ["b"]}, "is damaged"),
        ({}, "names 0 files; the limit of this reader is 1 to 100"),
        ({str(i): f"{i}.safetensors" for i in range(101)}, "names 101 files; the limit"),
        ([], "is damaged: it should name the file of each tensor"),
        (None, "is damaged"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, weight_map, message):
    (tmp_path.parent / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        read_shards(write_index(tmp_path, weight_map))


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"weight_map": "x"}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        read_shards(tmp_path / INDEX)
