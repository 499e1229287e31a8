"""A path -> networks ready to run."""

from dataclasses import replace

import pytest
import torch

from sd import model_loader
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.files import write_checkpoint
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
    models = load_models(tmp_path / "inpainting.ckpt", "cpu", torch.float32)
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
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none.ckpt: `python scripts/download.py`"):
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
