"""Files of every format are read as the reference libraries read them, mapped and not run; writing is atomic."""

import functools
import json
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import read_checkpoint, read_state_dict, write_checkpoint
from tests.support.malicious_pickles import in_legacy, in_zip, state_dict

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
CONFIG = {"channels": [1, 2], "nested": {"factor": 0.5, "name": "größer"}, "flag": True, "nothing": None}

SAVERS = {
    "zip": torch.save,
    "zip, protocol 3": functools.partial(torch.save, pickle_protocol=3),
    "zip, protocol 4": functools.partial(torch.save, pickle_protocol=4),
    "zip, protocol 5": functools.partial(torch.save, pickle_protocol=5),
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "legacy, protocol 4": functools.partial(torch.save, _use_new_zipfile_serialization=False, pickle_protocol=4),
}


def torch_reads(path: Path) -> dict:
    """weights_only=True reads only pickle protocols 2 and 3."""
    try:
        return torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        return torch.load(path, weights_only=False)


def make_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {str(dtype): torch.randn(3, 5, generator=generator).to(dtype) for dtype in FLOATS}
    state |= {str(dtype): torch.randint(0, 2, (7,), generator=generator).to(dtype) for dtype in INTEGERS}
    return state | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "größe": torch.arange(3)}


def assert_same(state: dict, expected: dict) -> None:
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype
        assert state[key].stride() == tensor.stride()
        assert torch.equal(state[key], tensor)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("saver", SAVERS)
def test_torch_files_are_read_as_torch_reads_them(tmp_path, saver, wrapped):
    path = tmp_path / "a.bin"  # the suffix does not matter
    SAVERS[saver]({"state_dict": make_state()} if wrapped else make_state(), path)
    expected = torch_reads(path)
    assert_same(read_state_dict(path), expected["state_dict"] if wrapped else expected)


def test_safetensors_are_read_as_safetensors_reads_them(tmp_path):
    save_file(make_state(), tmp_path / "a.ckpt")
    state = read_state_dict(tmp_path / "a.ckpt")
    expected = load_file(tmp_path / "a.ckpt")
    assert_same({key: state[key] for key in expected}, expected)


@pytest.mark.parametrize("saver", SAVERS)
def test_views_keep_their_strides_and_ties(tmp_path, saver):
    base = torch.arange(24.0).reshape(4, 6)
    views = {"base": base, "transposed": base.T, "slice": base[1:3, 2:5], "step": base[:, ::2], "row": base[0]}
    views |= {"repeated": base[:1].expand(5, 6), "tied": base, "alone": torch.ones(2)}
    SAVERS[saver](views, tmp_path / "a.ckpt")
    state = read_state_dict(tmp_path / "a.ckpt")
    assert_same(state, torch_reads(tmp_path / "a.ckpt"))
    state["base"][0, 0] = 100
    assert state["tied"][0, 0] == state["transposed"][0, 0] == state["row"][0] == state["repeated"][4, 0] == 100
    assert state["alone"].untyped_storage().nbytes() == 8


@pytest.mark.parametrize("saver", SAVERS)
def test_modules_parameters_and_metadata(tmp_path, saver):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    expected = module.state_dict()  # an OrderedDict with an attribute, _metadata
    SAVERS[saver](expected, tmp_path / "plain.ckpt")
    assert_same(read_state_dict(tmp_path / "plain.ckpt"), expected)
    SAVERS[saver](OrderedDict(module.named_parameters()), tmp_path / "parameters.ckpt")
    parameters = read_state_dict(tmp_path / "parameters.ckpt")
    assert_same(parameters, dict(module.named_parameters()))
    assert not any(tensor.requires_grad for tensor in parameters.values())


@pytest.mark.parametrize("saver", SAVERS)
def test_what_trainers_store_beside_the_tensors_is_ignored(tmp_path, saver, monkeypatch):
    package = types.ModuleType("absent_trainer")
    package.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "absent_trainer"})
    callback = package.ModelCheckpoint()
    callback.best, callback.path = np.float64(0.1), Path("best.ckpt")
    optimizer = {"state": {0: {"step": 5, "exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.999)}]}
    extras = {"epoch": 12, "callbacks": {package.ModelCheckpoint: callback, "list": [callback]}, "seen": {1, 2}}
    extras |= {"optimizer_states": [optimizer], "rng": np.arange(3), "order": OrderedDict(a=1), "scale": np.float32(2)}
    state = make_state() | {"note": "text", "step": 5, "callback": callback, "array": np.ones(2)}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "absent_trainer", package)
        SAVERS[saver](extras | {"state_dict": state, "sd_config": CONFIG}, tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert_same(checkpoint.state, make_state())
    assert checkpoint.config == CONFIG
    assert "absent_trainer" not in sys.modules


@pytest.mark.parametrize("name", ["sd_config", "config"])
@pytest.mark.parametrize(
    "config", [None, "text", [1], 5, {"set": {1}}, {"tensor": torch.ones(1)}, {"x": "x" * 100_000}]
)
def test_a_config_that_is_not_plain_is_none(tmp_path, config, name):
    torch.save({"state_dict": make_state(), name: config}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt").config is None


@pytest.mark.parametrize("text", ["null", "[1]", "no JSON", "[" * 100_000, '"text"'])
def test_a_safetensors_config_that_is_not_a_dict_is_none(tmp_path, text):
    save_file(make_state(), tmp_path / "a.safetensors", metadata={"sd_config": text})
    assert read_checkpoint(tmp_path / "a.safetensors").config is None


SECTIONS = {"text": {}, "vae": {}, "unet": {"heads": 4}, "schedule": {}}


def test_our_older_files_have_their_config_under_another_name(tmp_path):
    torch.save({"state_dict": make_state(), "config": SECTIONS}, tmp_path / "a.ckpt")
    save_file(make_state(), tmp_path / "a.safetensors", metadata={"config": json.dumps(SECTIONS)})
    assert read_checkpoint(tmp_path / "a.ckpt").config == SECTIONS
    assert read_checkpoint(tmp_path / "a.safetensors").config == SECTIONS


@pytest.mark.parametrize(
    "config",
    [
        {"lr": 1e-5, "resolution": 512},
        {"unet": {"lr": 1e-5}, "vae": {"path": "a"}, "text": {}},
        {"unet": "a", "vae": "b", "text": "c", "schedule": "cosine"},
        {"model": SECTIONS},
    ],
)
def test_a_trainers_config_is_not_ours(tmp_path, config):
    torch.save({"state_dict": make_state(), "config": config, "epoch": 3}, tmp_path / "a.ckpt")
    save_file(make_state(), tmp_path / "a.safetensors", metadata={"format": "pt", "config": json.dumps(config)})
    assert read_checkpoint(tmp_path / "a.ckpt").config is None
    assert read_checkpoint(tmp_path / "a.safetensors").config is None
    torch.save({"state_dict": make_state(), "config": config, "sd_config": CONFIG}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt").config == CONFIG


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"a": torch.ones(2)}},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "DeepSpeed": lambda state: {"module": state, "lr": torch.tensor(1.0), "ds_version": "0.9"},
    "twice": lambda state: {"state_dict": {"state_dict": state}},
    "beside a description of the model": lambda state: {"model": {"name": "sd", "layers": {"a": 1}}, "module": state},
    "beside an empty one": lambda state: {"state_dict": {}, "model": state},
    "top level": lambda state: state | {"model": {"name": "sd"}},
}


@pytest.mark.parametrize("saver", ["zip", "legacy"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_under_which_trainers_put_the_weights(tmp_path, wrapper, saver):
    SAVERS[saver](WRAPPED[wrapper](make_state()), tmp_path / "a.ckpt")
    assert_same(read_state_dict(tmp_path / "a.ckpt"), make_state())


NEWER = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
NEWER += [torch.uint16, torch.uint32, torch.uint64]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("dtype", NEWER, ids=str)
def test_newer_dtypes(tmp_path, saver, dtype):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4).to(dtype)
    SAVERS[saver]({"a": base, "row": base[1], "transposed": base.T}, tmp_path / "a.ckpt")
    state = read_state_dict(tmp_path / "a.ckpt")
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert state["transposed"].stride() == base.T.stride()
    assert [bits(state[key]) for key in state] == [bits(base), bits(base[1]), bits(base.T)]


def test_all_dtypes_of_safetensors(tmp_path):
    state = {str(dtype): torch.arange(4, dtype=torch.float32).to(dtype) for dtype in [*NEWER, torch.complex64]}
    save_file(state, tmp_path / "a.safetensors")
    read = read_state_dict(tmp_path / "a.safetensors")
    assert {key: (tensor.dtype, bits(tensor)) for key, tensor in read.items()} == {
        key: (tensor.dtype, bits(tensor)) for key, tensor in state.items()
    }


def test_dtypes_that_torch_lacks_are_left_out(tmp_path):
    """The safetensors library reads this header too."""
    shapes = {"a": ("F32", [2], 8), "b": ("F4", [4], 2), "c": ("F8_E8M0", [3], 3), "d": ("F6_E2M3", [4], 3)}
    header, end = {}, 0
    for name, (dtype, shape, size) in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len(file.keys()) == 4
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    assert list(checkpoint.state) == ["a"]
    assert checkpoint.unreadable == {"b": "dtype F4", "c": "dtype F8_E8M0", "d": "dtype F6_E2M3"}


def test_a_long_header_and_empty_metadata(tmp_path):
    """A preview picture in the metadata takes megabytes; the limit of the safetensors library is 100 MB."""
    picture = {"modelspec.thumbnail": "data:image/jpeg;base64," + "A" * (9 << 20)}
    save_file(make_state(), tmp_path / "a.safetensors", metadata=picture)
    assert read_checkpoint(tmp_path / "a.safetensors").metadata == picture
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert read_checkpoint(tmp_path / "a.safetensors").metadata == {}
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(100_000_001)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="100,000,001 bytes; the limit of the format is 100,000,000"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("saver", ["zip", "legacy"])
def test_tensors_of_other_kinds_are_left_out(tmp_path, saver):
    other = {
        "sparse": torch.zeros(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8),
    }
    state = make_state() | {"complex": torch.zeros(2, dtype=torch.complex64)}
    SAVERS[saver]({"state_dict": state | other}, tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert_same(checkpoint.state, state)
    assert checkpoint.unreadable.keys() == other.keys()


def test_tensors_with_attributes(tmp_path):
    tensor, parameter = torch.arange(3.0), torch.nn.Parameter(torch.arange(4.0))
    tensor.note, parameter.note = "a", "b"
    torch.save({"tensor": tensor, "parameter": parameter}, tmp_path / "a.ckpt")
    assert_same(read_state_dict(tmp_path / "a.ckpt"), {"tensor": torch.arange(3.0), "parameter": torch.arange(4.0)})


def test_a_long_log_beside_the_weights(tmp_path):
    log = {"losses": [0.5] * 700_000, "text": "step\n" * 2_000_000}
    torch.save({"state_dict": make_state(), "log": log}, tmp_path / "a.ckpt")
    assert_same(read_state_dict(tmp_path / "a.ckpt"), make_state())


def test_old_rebuild_function_is_known(tmp_path):
    pickled = state_dict().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
    for file in (in_zip(pickled), in_legacy(pickled)):
        (tmp_path / "a.ckpt").write_bytes(file)
        assert torch.equal(read_state_dict(tmp_path / "a.ckpt")["honest"], torch.ones(4))


def test_a_compressed_copy_is_read(tmp_path):
    torch.save(make_state(), tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    assert_same(read_state_dict(tmp_path / "b"), make_state())


def resident_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_are_mapped_privately(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_checkpoint(path, {"a": torch.zeros(3), "b": torch.ones(16 << 20)})
    before, content = resident_memory(), path.read_bytes()[-4096:]
    state = read_state_dict(path)
    assert state["b"].sum() == 16 << 20
    assert resident_memory() - before < 32 << 20  # of 64 MB
    state["b"].zero_()
    assert path.read_bytes()[-4096:] == content
    assert read_state_dict(path)["b"].sum() == 16 << 20


def test_misaligned_tensors_are_copied(tmp_path):
    header = b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + np.float64(1.5).tobytes())
    tensor = read_state_dict(tmp_path / "a")["a"]
    assert len(header) % 8
    assert tensor.data_ptr() % 8 == 0
    assert tensor == 1.5


# ---- writing

SUFFIXES = [".safetensors", ".ckpt", ".pt", ".pth"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("config", [CONFIG, None])
def test_what_is_written_is_read(tmp_path, suffix, config):
    path = tmp_path / f"model{suffix}"
    state = make_state()
    state |= {"parameter": torch.nn.Parameter(torch.ones(2)), "strided": torch.arange(6.0).reshape(2, 3).T}
    write_checkpoint(str(path), state, config)
    checkpoint = read_checkpoint(path)
    expected = {key: tensor.detach() for key, tensor in state.items()}
    if suffix == ".safetensors":
        expected["strided"] = expected["strided"].contiguous()
        assert_same({key: load_file(path)[key] for key in expected}, expected)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"} | ({} if config is None else {"sd_config": json.dumps(config)})
    else:
        assert torch.load(path, weights_only=True)["sd_config"] == config
    assert_same(checkpoint.state, expected)
    assert checkpoint.config == config
    assert os.listdir(tmp_path) == [path.name]


def test_safetensors_are_written_aligned(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", {"x": torch.ones(3, dtype=torch.bool)} | make_state())
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    assert all(header[key]["data_offsets"][0] % widths.get(header[key]["dtype"], 1) == 0 for key in make_state())


def test_a_tuple_in_a_config_comes_back_as_a_list(tmp_path):
    for suffix in SUFFIXES:
        write_checkpoint(tmp_path / f"a{suffix}", make_state(), {"channels": (1, 2)})
        assert read_checkpoint(tmp_path / f"a{suffix}").config == {"channels": [1, 2]}


def test_a_file_can_be_replaced_while_its_tensors_are_in_use(tmp_path):
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        write_checkpoint(path, {"a": torch.ones(5000)})
        state = read_state_dict(path)
        write_checkpoint(path, {"a": state["a"] * 2})
        assert state["a"].sum() == 5000
        assert read_state_dict(path)["a"].sum() == 10_000


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, step, error):
    path = tmp_path / f"a{suffix}"
    write_checkpoint(path, make_state())
    before = path.read_bytes()

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(error):
            write_checkpoint(path, {"a": torch.ones(3)})
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


UNWRITABLE = {
    "no tensors": ({}, None),
    "maps names to tensors, not 'a' to int": ({"a": 1}, None),
    "maps names to tensors, not 1 to Tensor": ({1: torch.ones(1)}, None),
    "not '__metadata__' to": ({"__metadata__": torch.ones(1)}, None),
    "on meta": ({"a": torch.ones(1, device="meta")}, None),
    "sparse_coo": ({"a": torch.ones(1).to_sparse()}, None),
    "complex64": ({"a": torch.ones(1, dtype=torch.complex64)}, None),
    "only what JSON can express": ({"a": torch.ones(1)}, {"a": {1}}),
    "The config should be a dict": ({"a": torch.ones(1)}, [1]),
    "at most 65,536 characters": ({"a": torch.ones(1)}, {"a": "x" * 70_000}),
}


@pytest.mark.parametrize("message", UNWRITABLE)
def test_what_cannot_be_written_is_refused(tmp_path, message):
    for suffix in SUFFIXES:
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path / f"a{suffix}", *UNWRITABLE[message])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model", "model.bin", "model.ckpt.txt"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"should end in .safetensors, .ckpt, .pt, .pth"):
        write_checkpoint(tmp_path / name, make_state())
    assert os.listdir(tmp_path) == []
