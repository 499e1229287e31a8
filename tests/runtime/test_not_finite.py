"""NaN and infinity are found and named, and avoided for the VAE in float16."""

import copy
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import demo
from scripts.benchmarks.synthetic_checkpoint import random_state
from sd import generate, pipeline
from sd.checkpoints.files import write_checkpoint
from sd.runtime.not_finite import NotFiniteError
from tests.support.synthetic import MICRO, random_models

QUICK = {"seed": 1, "n_inference_steps": 3, "height": 32, "width": 32}
NETWORKS = {"clip": "text encoder", "diffusion": "U-Net", "encoder": "VAE encoder", "decoder": "VAE decoder"}


@pytest.fixture(scope="module")
def sound_models():
    return random_models(MICRO)


@pytest.fixture
def models(sound_models):
    return replace(sound_models, **{name: copy.deepcopy(getattr(sound_models, name)) for name in NETWORKS})


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def in_float16(models):
    for name in NETWORKS:
        getattr(models, name).half()
    return models


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("network, name", NETWORKS.items())
def test_a_damaged_weight_is_named(models, picture, network, name, value):
    key, weight = list(getattr(models, network).named_parameters())[-1]
    weight.flatten()[0] = value
    with pytest.raises(NotFiniteError, match=f"^The {name} cannot be used: {key} holds NaN or infinity; get its file"):
        generate("a cat", input_image=picture, models=models, **QUICK)


def test_many_damaged_weights_are_counted(models):
    for weight in models.diffusion.parameters():
        weight.fill_(float("nan"))
    count = len(list(models.diffusion.parameters()))
    with pytest.raises(NotFiniteError, match=f"0.weight and {count - 1} more of its weights hold NaN or infinity"):
        generate("a cat", models=models, **QUICK)


def test_the_step_at_which_the_unet_overflows_is_named(models, monkeypatch):
    forward, calls = models.diffusion.forward, []

    def overflow(*inputs):
        calls.append(1)
        return forward(*inputs) * (float("inf") if len(calls) == 2 else 1)

    monkeypatch.setattr(models.diffusion, "forward", overflow)
    with pytest.raises(
        NotFiniteError, match=r"^The U-Net gave NaN or infinity at step 2 of 3, in float32: its weights"
    ):
        generate("a cat", models=models, **QUICK)
    assert len(calls) == 2


def test_the_advice_for_a_unet_that_overflows_in_float16_is_float32(models):
    in_float16(models).diffusion.conv_out.weight.mul_(6e4)
    with pytest.raises(NotFiniteError, match="at step 1 of 3, in float16: load the model with dtype=torch.float32"):
        generate("a cat", models=models, **QUICK)


def test_nan_in_the_latents_is_not_blamed_on_the_unet(models):
    latents, context = torch.full((1, 4, 4, 4), float("nan")), pipeline.encode_prompt(models, "a cat")
    with pytest.raises(
        NotFiniteError, match="^The U-Net was given NaN or infinity at step 1 of 50: a smaller cfg_scale"
    ):
        next(pipeline.denoise(models, latents, context, pipeline.SAMPLERS["ddpm"]()))


def test_a_decoder_that_overflows_in_float16_decodes_in_float32(models):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    in_float16(models).decoder.conv_in.weight.mul_(6e4)
    assert not models.decoder(latents.half()).isfinite().all()
    with pytest.warns(UserWarning, match="^The VAE decoder overflowed in float16 and ran again in float32") as caught:
        images = pipeline.decode_latents(models, latents)
    assert len(caught) == 2
    assert {weight.dtype for weight in models.decoder.parameters()} == {torch.float16}
    models.decoder.float()
    assert np.array_equal(images, pipeline.decode_latents(models, latents))
    assert images.std() > 10


def test_an_encoder_that_overflows_in_float16_encodes_in_float32(models, picture):
    in_float16(models).encoder.conv_in.weight.mul_(6e4)
    with pytest.warns(UserWarning, match="^The VAE encoder overflowed in float16"):
        assert generate("a cat", input_image=picture, models=models, **QUICK).std() > 10


@pytest.mark.parametrize("dtype, remedy", [(torch.float32, "its weights are"), (torch.bfloat16, "load the model with")])
def test_a_decoder_that_overflows_makes_no_image_in_any_dtype(models, dtype, remedy):
    models.decoder.to(dtype).conv_in.weight.fill_(1e38)
    with pytest.raises(NotFiniteError, match=f"^The VAE decoder gave NaN or infinity, in {str(dtype)[6:]}: {remedy}"):
        generate("a cat", models=models, **QUICK)


def test_a_decoder_that_overflows_in_bfloat16_does_not_run_again(models, monkeypatch):
    """bfloat16 has the range of float32, so a second run would not help. Here it would: so there was none."""
    forward, dtypes = models.decoder.forward, []

    def overflow(latents):
        dtypes.append(latents.dtype)
        return forward(latents) * (1 if latents.dtype == torch.float32 else float("inf"))

    monkeypatch.setattr(models.decoder.bfloat16(), "forward", overflow)
    with pytest.raises(NotFiniteError, match="^The VAE decoder gave NaN or infinity, in bfloat16: load the model with"):
        pipeline.decode_latents(models, torch.zeros(1, 4, 4, 4))
    assert dtypes == [torch.bfloat16]


def test_the_advice_is_not_float32_if_float32_overflows_too(models, monkeypatch):
    monkeypatch.setattr(in_float16(models).decoder, "forward", lambda x: x.new_full((1, 3, 32, 32), torch.inf))
    with pytest.raises(NotFiniteError, match="^The VAE decoder gave NaN or infinity, in float32: its weights are"):
        generate("a cat", models=models, **QUICK)


def test_a_compiled_decoder_that_overflows_is_not_compiled_again(models):
    calls, decoder = [], in_float16(models).decoder
    decoder.conv_in.weight.mul_(6e4)
    decoder._compiled_call_impl = lambda x: calls.append(x.dtype) or decoder.forward(x)  # what Module.compile sets
    with pytest.warns(UserWarning, match="^The VAE decoder overflowed in float16"):
        pipeline.decode_latents(models, torch.ones(1, 4, 4, 4))
    assert calls == [torch.float16]


def test_networks_without_nan_cause_no_search_and_no_warning(models, monkeypatch):
    for name in NETWORKS:
        monkeypatch.setattr(getattr(models, name), "state_dict", lambda: pytest.fail("searched"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate("a cat", models=models, **QUICK)


def test_the_demo_says_it_in_one_sentence_and_saves_nothing(tmp_path, monkeypatch, capsys):
    state = random_state(MICRO)
    state["first_stage_model.decoder.conv_out.bias"][0] = float("nan")
    write_checkpoint(tmp_path / "nan.ckpt", state, MICRO.to_dict())
    monkeypatch.chdir(tmp_path)
    options = ["--checkpoint", "nan.ckpt", "--steps", "1", "--width", "32", "--height", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["demo.py", "a cat", *options])
    assert demo.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "demo.py: The VAE decoder cannot be used: conv_out.bias holds NaN or infinity" in err
    assert [path.name for path in tmp_path.iterdir()] == ["nan.ckpt"]
