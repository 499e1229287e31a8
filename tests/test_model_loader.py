"""A path -> networks ready to run."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sd import model_loader
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.files import write_checkpoint
from sd.checkpoints.variants import averaged_name
from sd.config import SD15_INPAINTING
from sd.model_converter import compvis_shapes, to_compvis
from sd.model_loader import load_models, preload_models_from_standard_weights
from tests.support.synthetic import MICRO, random_state

VAE = "first_stage_model."


@pytest.fixture(scope="module")
def state():
    return random_state(MICRO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "micro.ckpt", state, MICRO.to_dict())
    write_checkpoint(folder / "micro.safetensors", state, MICRO.to_dict())
    return folder


def same(models, state):
    actual = to_compvis(models)
    return actual.keys() == state.keys() and all(torch.equal(actual[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["micro.ckpt", "micro.safetensors"])
def test_loads_every_weight(folder, state, name):
    models = load_models(folder / name, "cpu", torch.float32)
    assert models.config == MICRO
    assert models.device == torch.device("cpu")
    assert same(models, state)
    for network in (models.clip, models.encoder, models.decoder, models.diffusion):
        assert not network.training
        assert not any(p.requires_grad or p.is_meta for p in network.parameters())
    assert models.tokenizer(["a cat"]).shape == (1, 77)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype(folder, dtype):
    models = load_models(folder / "micro.ckpt", "cpu", dtype)
    assert {p.dtype for p in models.diffusion.parameters()} == {dtype}
    assert {p.dtype for p in models.clip.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["micro.ckpt", "micro.safetensors"])
def test_the_file_leaves_memory_as_copies_grow(folder, monkeypatch, name):
    limit, released = 100_000, []
    monkeypatch.setattr(model_loader, "RELEASE_AFTER", limit)
    monkeypatch.setattr(Checkpoint, "release", lambda _: released.append(1))
    models = load_models(folder / name, "cpu", torch.float16, tuned=False)
    networks = (models.clip, models.encoder, models.decoder, models.diffusion)
    copied = sum(4 * weight.numel() for network in networks for weight in network.parameters())  # bytes of the file
    assert 10 < len(released) - 1 <= copied / limit  # one more at the end
    released.clear()
    load_models(folder / name, "cpu", torch.float32, tuned=False)
    assert len(released) == 1  # nothing was copied


def test_an_unknown_sampler_is_refused(tmp_path, state):
    config = MICRO.to_dict() | {"sampling": {"sampler": "magic"}}
    write_checkpoint(tmp_path / "micro.ckpt", state, config)
    with pytest.raises(CheckpointError, match="config.sampling.sampler should be one of ddpm"):
        load_models(tmp_path / "micro.ckpt", "cpu")


def test_the_names_of_the_video(folder, state):
    models = preload_models_from_standard_weights(str(folder / "micro.ckpt"), "cpu")
    assert models.config == MICRO


def test_a_config_that_was_recognised(tmp_path):
    """Published files carry no configuration: it is recognised from the shapes."""
    shapes = compvis_shapes(SD15_INPAINTING)
    zeros = torch.zeros(max(shape.numel() for shape in shapes.values()), dtype=torch.float16)
    state = {key: zeros[: shape.numel()].view(shape) for key, shape in shapes.items()}
    torch.save({"state_dict": state}, tmp_path / "inpainting.ckpt")  # the zeros are stored once
    models = load_models(tmp_path / "inpainting.ckpt", "cpu", torch.float16)
    assert models.config == SD15_INPAINTING
    assert models.diffusion.down[0][0].weight.shape == (320, 9, 3, 3)


def test_averaged_weights(tmp_path, state):
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor + 1
        for key, tensor in state.items()
        if key.startswith("model.diffusion_model.")
    }
    write_checkpoint(tmp_path / "ema.ckpt", state | averages, MICRO.to_dict())
    assert same(load_models(tmp_path / "ema.ckpt", "cpu", torch.float32), state)
    averaged = to_compvis(load_models(tmp_path / "ema.ckpt", "cpu", torch.float32, ema=True))
    key = "model.diffusion_model.out.2.bias"
    assert torch.equal(averaged[key], state[key] + 1)


def test_missing_averaged_weights(folder):
    with pytest.raises(CheckpointError, match=r"micro.ckpt: .*load it with ema=False"):
        load_models(folder / "micro.ckpt", "cpu", ema=True)


def test_another_vae(folder, tmp_path, state):
    other = random_state(MICRO, seed=5)
    vae = {key.removeprefix(VAE): tensor for key, tensor in other.items() if key.startswith(VAE)}
    write_checkpoint(tmp_path / "vae.safetensors", vae, {"vae": MICRO.to_dict()["vae"]})
    models = load_models(folder / "micro.ckpt", "cpu", torch.float32, vae=tmp_path / "vae.safetensors")
    assert same(models, {key: (other if key.startswith(VAE) else state)[key] for key in state})


def test_a_vae_of_another_size_is_refused(folder, tmp_path, state):
    wide = random_state(replace(MICRO, vae=replace(MICRO.vae, channels=(32, 32, 64, 64))))
    vae = {key: tensor for key, tensor in wide.items() if key.startswith(VAE)}
    write_checkpoint(tmp_path / "vae.ckpt", vae, {"vae": MICRO.to_dict()["vae"]})
    with pytest.raises(CheckpointError, match=r"decoder.conv_in.weight has shape \(64, 4, 3, 3\)"):
        load_models(folder / "micro.ckpt", "cpu", vae=tmp_path / "vae.ckpt")


def test_errors_name_the_file(tmp_path, state):
    path = tmp_path / "broken.ckpt"
    write_checkpoint(path, {key: t for key, t in state.items() if "conv_out" not in key}, MICRO.to_dict())
    with pytest.raises(CheckpointError, match=r"broken.ckpt: .*4 problems"):
        load_models(path, "cpu")
    write_checkpoint(path, state, {"vae": {"channels": "many"}})
    with pytest.raises(CheckpointError, match=r"broken.ckpt: .*config.vae.channels should be like"):
        load_models(path, "cpu")
    path.write_text("<!DOCTYPE html><html>")
    with pytest.raises(CheckpointError, match=r"broken.ckpt.*HTML"):
        load_models(path, "cpu")
    with pytest.raises(CheckpointError) as error:
        load_models(f"{tmp_path}/./broken.ckpt", "cpu")
    assert str(error.value).count("broken.ckpt") == 1


def test_a_missing_file_says_where_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none.ckpt: `sh scripts/download.sh`"):
        load_models(tmp_path / "none.ckpt")
    monkeypatch.setattr(model_loader, "TINY_CHECKPOINT", tmp_path / "tiny.ckpt")
    with pytest.raises(FileNotFoundError, match=r"tiny\.ckpt"):
        load_models()


def test_the_prediction_type_can_be_given(folder):
    models = load_models(folder / "micro.ckpt", "cpu", prediction_type="v_prediction")
    assert models.config == replace(MICRO, schedule=replace(MICRO.schedule, prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="prediction_type should be one of epsilon, v_prediction, not 'sample'"):
        load_models(folder / "micro.ckpt", "cpu", prediction_type="sample")


def test_a_vae_that_does_not_fit_is_named(folder, tmp_path):
    config = replace(MICRO, vae=replace(MICRO.vae, channels=(16, 16, 32)))
    write_checkpoint(tmp_path / "other.ckpt", random_state(MICRO), config.to_dict())
    with pytest.raises(CheckpointError, match=r"micro.ckpt with the VAE of .*other.ckpt: The checkpoint does not fit"):
        load_models(folder / "micro.ckpt", "cpu", vae=tmp_path / "other.ckpt")


LAYOUTS = {
    "kohya, everydream": lambda state: {"state_dict": state, "epoch": 3, "global_step": 100},
    "DataParallel": lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
    "DeepSpeed": lambda state: {"module": state, "param_shapes": {}, "ds_version": "0.9"},
    "FSDP": lambda state: {"model": {f"_fsdp_wrapped_module.{key}": tensor for key, tensor in state.items()}},
    "torch.compile": lambda state: {"state_dict": {f"_orig_mod.{key}": tensor for key, tensor in state.items()}},
    "compiled U-Net": lambda state: {
        "state_dict": {key.replace("diffusion_model.", "diffusion_model._orig_mod."): t for key, t in state.items()}
    },
    "averages alone": lambda state: {
        "state_dict": {averaged_name(key) if key.startswith("model.") else key: t for key, t in state.items()}
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_trainers(tmp_path, state, layout):
    torch.save(LAYOUTS[layout](state) | {"sd_config": MICRO.to_dict()}, tmp_path / "micro.ckpt")
    assert same(load_models(tmp_path / "micro.ckpt", "cpu", torch.float32), state)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_what_no_network_uses_is_not_judged(tmp_path, state, suffix):
    odd = {
        "a": torch.zeros(2, dtype=torch.complex64),
        "b": torch.zeros(2).to(torch.float8_e5m2),
        "lora_up": torch.ones(1),
    }
    if suffix == ".ckpt":
        odd["sparse"] = torch.zeros(3).to_sparse()
        torch.save({"state_dict": state | odd, "sd_config": MICRO.to_dict()}, tmp_path / "micro.ckpt")
    else:
        save_file(state | odd, tmp_path / "micro.safetensors", metadata={"sd_config": json.dumps(MICRO.to_dict())})
    with pytest.warns(UserWarning, match="Left out"):
        assert same(load_models(tmp_path / f"micro{suffix}", "cpu", torch.float32), state)


def test_our_older_files_load(tmp_path, state):
    torch.save({"state_dict": state, "config": MICRO.to_dict()}, tmp_path / "old.ckpt")
    models = load_models(tmp_path / "old.ckpt", "cpu", torch.float32)
    assert models.config == MICRO
    assert same(models, state)


def test_a_model_in_several_files(tmp_path, state):
    names, half = list(state), len(state) // 2
    parts = {"a-00001-of-00002.safetensors": names[:half], "a-00002-of-00002.safetensors": names[half:]}
    for name, keys in parts.items():
        save_file(
            {key: state[key] for key in keys}, tmp_path / name, metadata={"sd_config": json.dumps(MICRO.to_dict())}
        )
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_models(index, "cpu", torch.float32), state)
    with pytest.raises(
        CheckpointError, match=r"is one of several files of a model: give .*a\.safetensors\.index\.json"
    ):
        load_models(tmp_path / "a-00001-of-00002.safetensors", "cpu")


@pytest.mark.parametrize("path", [5, True, b"a", ["a"], 0.5])
def test_a_path_of_another_type_is_named(folder, path):
    with pytest.raises(TypeError, match="path should be the path of a file or a folder, not "):
        load_models(path, "cpu")
    with pytest.raises(TypeError, match="vae should be the path of a file or a folder, not "):
        load_models(folder / "micro.ckpt", "cpu", vae=path)


def test_errors_of_the_vae_name_it(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vae: There is no file or folder at .*none\.ckpt\."):
        load_models(folder / "micro.ckpt", "cpu", vae=tmp_path / "none.ckpt")
    (tmp_path / "page.ckpt").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"^vae: .*page\.ckpt is a web page"):
        load_models(folder / "micro.ckpt", "cpu", vae=tmp_path / "page.ckpt")
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"^vae: .*other\.ckpt: This file has no VAE"):
        load_models(folder / "micro.ckpt", "cpu", vae=tmp_path / "other.ckpt")


def test_the_missing_tiny_model_says_how_to_get_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(model_loader, "TINY_CHECKPOINT", tmp_path / "tiny.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"tiny\.ckpt, is missing: `git checkout data/tiny\.ckpt` brings it back"
    ):
        load_models()
