"""The dataclasses and the plain dicts that checkpoints carry."""

import dataclasses
import json

import pytest

from sd.config import SD15, SD15_INPAINTING, TINY, ModelConfig, TextConfig


@pytest.mark.parametrize("config", [SD15, SD15_INPAINTING, TINY])
def test_dict_round_trip(config):
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configurations_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SD15.image_size = 256
    assert len({SD15, SD15_INPAINTING, TINY, ModelConfig()}) == 3


def test_absent_fields_keep_the_values_of_sd15():
    assert ModelConfig.from_dict({"text": {"width": 64}}).text == TextConfig(width=64)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"clip": {}}, "config has unknown fields"),
        ({"text": {"depth": 3}}, "config.text has unknown fields"),
        ({"text": 3}, "config.text should be a dict of TextConfig fields, not 3"),
        ({"image_size": "512"}, "config.image_size should be like 512, not '512'"),
        ({"image_size": True}, "config.image_size should be like 512, not True"),
        ({"vae": {"channels": []}}, "config.vae.channels should be like"),
        ({"vae": {"channels": [32, "64"]}}, "config.vae.channels should be like"),
        ({"sampling": {"sampler": 3}}, "config.sampling.sampler should be like 'dpm"),
        ({"text": {"heads": 0}}, "config.text.heads should be like 12, not 0"),
        ({"image_size": -512}, "config.image_size should be like 512, not -512"),
        ({"vae": {"scaling_factor": float("nan")}}, "config.vae.scaling_factor should be like 0.18215, not nan"),
        ({"unet": {"channels": [320, 0]}}, "config.unet.channels should be like 320, not 0"),
        ([], "config should be a dict"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ModelConfig.from_dict(values)


def test_downscale():
    assert SD15.vae.downscale == 8
    assert TINY.vae.downscale == 8
