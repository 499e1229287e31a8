"""Configurations from damaged or hostile files are refused, and every broken rule is named."""

import pytest

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.config_rules import check_config
from sd.config import SD15, SD15_INPAINTING, TINY, ModelConfig


@pytest.mark.parametrize(
    "values, message",
    [
        ({"text": {"width": 10**9, "heads": 1}}, "widths of at most a million"),
        ({"text": {"layers": 10**9}}, "at most 50 layers in the text encoder"),
        ({"vae": {"channels": [32] * 10_000}}, "at most 6 levels of 4 blocks"),
        ({"unet": {"blocks_per_level": 10**6}}, "at most 6 levels of 4 blocks"),
        ({"unet": {"attention": [True]}}, "unet.attention as long as unet.channels"),
        ({"text": {"heads": 5}}, "a text.width divisible by text.heads"),
        ({"unet": {"heads": 7}}, "unet.channels divisible by unet.heads"),
        ({"unet": {"groups": 7}}, "unet.channels divisible by unet.groups"),
        ({"vae": {"groups": 7}}, "vae.channels divisible by vae.groups"),
        ({"unet": {"context_width": 64}}, "unet.context_width equal to text.width"),
        ({"vae": {"latent_channels": 8}}, "unet.out_channels equal to vae.latent_channels"),
        ({"unet": {"in_channels": 3}}, "unet.in_channels equal to unet.out_channels, or for inpainting"),
        ({"unet": {"guidance_width": 2}}, "a unet.guidance_width from 4 to 4096 that is even"),
        ({"unet": {"guidance_width": 10**9}}, "a unet.guidance_width from 4 to 4096 that is even"),
        ({"unet": {"guidance_width": 255}}, "a unet.guidance_width from 4 to 4096 that is even"),
        ({"image_size": 10**9}, "an image_size of at most 8192"),
        ({"schedule": {"num_training_steps": 10**9}}, "at most 100,000 training steps"),
        ({"schedule": {"beta_end": 2}}, "betas that rise and stay below 1"),
        ({"schedule": {"beta_schedule": "cosine"}}, "a known schedule"),
    ],
)
def test_broken_rules_are_named(values, message):
    with pytest.raises(CheckpointError, match=f"The configuration of a model should have .*{message}"):
        check_config(ModelConfig.from_dict(values))


@pytest.mark.parametrize("config", [SD15, SD15_INPAINTING, TINY])
def test_our_configurations_obey_every_rule(config):
    check_config(config)


def test_all_broken_rules_are_named_at_once():
    values = {"image_size": 10**9, "unet": {"heads": 7, "context_width": 64}}
    message = "divisible by unet.heads, and unet.context_width equal to text.width, and an image_size of at most 8192"
    with pytest.raises(CheckpointError, match=message):
        check_config(ModelConfig.from_dict(values))
