"""Files of Stable Diffusion 2.x: which model they are, and the layouts that their text encoders come in."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.key_rules import CLIP_PREFIX, OPENCLIP_PREFIX, SGM_PREFIX
from sd.checkpoints.probe import settle_prediction, slope
from sd.checkpoints.variants import V_BIAS, averaged_name, is_guess, recognise, vae_layout
from sd.checkpoints.whole_model import _configured
from sd.config import SD2, SD2_BASE, SD2_INPAINTING, SD_TURBO, TINY
from sd.model_converter import compvis_shapes, from_compvis, split_qkv, to_compvis, to_our_name, to_their_name
from sd.model_loader import load_models
from sd.noise import make_betas
from tests.support.synthetic import SD2_MICRO, random_networks

ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def full_size(spread=1.0, channels=4):
    """The keys and shapes of a published file, without memory, and the bias that tells v from noise."""
    state = {key: torch.empty(shape, device="meta") for key, shape in compvis_shapes(SD2).items()}
    state[FIRST] = torch.empty(320, channels, 3, 3, device="meta")
    state[V_BIAS] = torch.linspace(-1, 1, 320) * spread
    return state


@pytest.mark.parametrize(
    "state, metadata, yaml, config",
    [
        (full_size(0.5), {}, "", SD2),
        (full_size(0.05), {}, "", SD2_BASE),
        (full_size(0.05), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "", SD2),
        (full_size(0.5), {"modelspec.prediction_type": "epsilon"}, "", SD2_BASE),
        (full_size(0.05), {}, "    parameterization: v\n", SD2),
        (full_size(0.05) | {"v_pred": torch.empty(0)}, {}, "", SD2),
        (full_size(0.5, channels=9), {}, "", SD2_INPAINTING),
    ],
)
def test_the_model_is_recognised(state, metadata, yaml, config):
    assert recognise(state, metadata, yaml) == config


def test_what_is_a_guess():
    for state, metadata, guess in [
        (full_size(0.2), {}, True),  # a standard deviation of 0.116
        (full_size(0.12), {}, True),
        (full_size(0.2), {"modelspec.prediction_type": "v"}, False),
        (full_size(0.5), {}, False),
        (full_size(0.05), {}, False),
        (full_size(0.5, channels=9), {}, False),
        ({ATTENTION: torch.empty(320, 768)}, {}, False),  # of SD 1.x
    ]:
        assert is_guess(recognise(state, metadata), state, metadata, "") == guess


@pytest.fixture(scope="module")
def tiny():
    return load_models(device="cpu", dtype=torch.float32)


class Predicts(torch.nn.Module):
    """The tiny model's U-Net, and the v that its noise stands for."""

    def __init__(self, models, prediction_type):
        super().__init__()
        self.unet, self.prediction_type = models.diffusion, prediction_type

    def forward(self, x, context, timesteps):
        noise = self.unet(x, context, timesteps)
        a = (1 - make_betas(TINY.schedule)).prod()
        x_0 = (x - (1 - a).sqrt() * noise) / a.sqrt()
        return noise if self.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x_0


@pytest.mark.parametrize("true, returned", [("epsilon", (0.99, 1)), ("v_prediction", (-0.1, 0.15))])
@pytest.mark.parametrize("guess", [SD2_BASE, SD2])
def test_the_unet_is_run_to_check_the_guess(tiny, true, returned, guess):
    """A right guess causes no warning. A wrong one gives way where the U-Net returns noise."""
    models = replace(tiny, diffusion=Predicts(tiny, true))
    low, high = returned
    assert low < slope(models) < high
    models.config = replace(guess, unet=TINY.unet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = settle_prediction(models)
    right = guess.schedule.prediction_type == true
    assert ["give the other one as prediction_type: epsilon or v_" in str(w.message) for w in caught] == [True][right:]
    expected = SD2_BASE if true == "epsilon" else guess
    assert (config.schedule, config.image_size) == (expected.schedule, expected.image_size)


def test_sd_turbo_is_told_by_the_names_of_its_text_encoder_or_of_the_file():
    state = {key.replace(OPENCLIP_PREFIX, SGM_PREFIX): tensor for key, tensor in full_size().items()}
    assert recognise(state) == SD_TURBO
    assert recognise(full_size(0.05), name="sd_Turbo.fp16.safetensors") == SD_TURBO  # a copy under other names
    assert recognise(full_size(channels=9), name="turbo-inpainting.safetensors") == SD2_INPAINTING


def test_what_the_user_says_decides_the_image_size_too():
    for spread, said, config in ((0.05, "v_prediction", SD2), (0.5, "epsilon", SD2_BASE)):
        checkpoint, found = _configured(Checkpoint(full_size(spread), None), Path("a.safetensors"), said)
        assert (found, checkpoint.prediction_guessed) == (config, False)


def test_averaged_weights_alone_are_recognised_too():
    state = full_size(channels=9)
    assert recognise({averaged_name(k) if k.startswith("model.") else k: t for k, t in state.items()}) == SD2_INPAINTING


def test_a_text_encoder_without_all_its_matrices_is_one_sentence():
    state = as_transformers(to_compvis(random_networks(SD2_MICRO)))
    key = f"{CLIP_PREFIX}text_model.encoder.layers.1.self_attn.k_proj.weight"
    del state[key]
    with pytest.raises(CheckpointError, match=f"^The text encoder has no {key}.$"):
        from_compvis(state, SD2_MICRO)


def test_the_vae_of_sd_turbo_may_replace_another():
    state = as_sgm(to_compvis(random_networks(SD2_MICRO)))
    assert vae_layout(state).keys() == {key for key in state if key.startswith("first_stage_model.")}
    for other in ({"conditioner.embedders.1.model.ln_final.bias": torch.ones(1)}, {ATTENTION: torch.ones(4, 1280)}):
        with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
            vae_layout(state | other)


def test_the_keys_are_those_of_the_published_file():
    """Without what no image depends on: the text encoder's last layer, its projection, and what trainers store."""
    keys = compvis_shapes(SD2).keys()
    counts = {part: sum(key.startswith(part) for key in keys) for part in ("model.", "first_stage_", "cond_stage_")}
    assert counts == {"model.": 686, "first_stage_": 248, "cond_stage_": 294 - 12 - 2}
    assert len(keys) == sum(counts.values())


def test_another_width_is_named():
    with pytest.raises(CheckpointError, match="should be 1024 wide, not 64 as in this file"):
        recognise({ATTENTION: torch.empty(32, 64), f"{OPENCLIP_PREFIX}ln_final.bias": torch.empty(64)})


@pytest.mark.parametrize("channels, kind", [(5, "depth model"), (7, "upscaler"), (8, "InstructPix2Pix")])
def test_models_with_other_inputs_are_named(channels, kind):
    with pytest.raises(CheckpointError, match=kind):
        recognise(full_size(channels=channels))


def test_stable_unclip_is_named():
    with pytest.raises(CheckpointError, match="Stable unCLIP, whose U-Net takes the embedding of an image"):
        recognise(full_size() | {"model.diffusion_model.label_emb.0.0.weight": torch.empty(1280, 2048)})


@pytest.mark.parametrize("spread, config", [(0.5, SD2), (0.05, SD2_BASE)])
def test_a_file_of_averages_alone_is_recognised(spread, config):
    state = {averaged_name(key) if key.startswith("model.") else key: t for key, t in full_size(spread).items()}
    assert recognise(state) == config


def as_transformers(state):
    """The text encoder under transformers' names, with queries, keys and values apart."""
    ours = {to_our_name(key).removeprefix("open"): t for key, t in state.items() if key.startswith(OPENCLIP_PREFIX)}
    renamed = {to_their_name(key): tensor for key, tensor in split_qkv(ours).items()}
    assert all(key.startswith(CLIP_PREFIX) for key in renamed)
    return {key: tensor for key, tensor in state.items() if not key.startswith(OPENCLIP_PREFIX)} | renamed


def as_sgm(state):
    return {key.replace(OPENCLIP_PREFIX, SGM_PREFIX): tensor for key, tensor in state.items()}


def as_published(state):
    """With the parts of OpenCLIP that no image depends on, and what the trainer left."""
    extras = ["logit_scale", "text_projection", "transformer.resblocks.23.ln_1.weight"]
    names = [*(f"{OPENCLIP_PREFIX}{name}" for name in extras), "model_ema.decay", "betas"]
    return state | {name: torch.ones(1) for name in names}


@pytest.mark.parametrize("layout", [dict, as_transformers, as_sgm, as_published])
def test_every_layout_gives_the_same_weights(layout, recwarn):
    networks = random_networks(SD2_MICRO)
    state = to_compvis(networks)
    assert not any(key.startswith(CLIP_PREFIX) for key in state)
    back = from_compvis(layout(state), SD2_MICRO)
    for name, weights in back.items():
        expected = getattr(networks, name).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not recwarn.list
