"""The rules that a configuration from a file must obey before networks are built from it."""

from __future__ import annotations

from sd.checkpoints.checkpoint import CheckpointError
from sd.clip import ACTIVATIONS
from sd.config import PREDICTION_TYPES, SPACINGS, ModelConfig


def check_config(config: ModelConfig) -> None:
    """Raises CheckpointError, which lists every broken rule. The limits keep a hostile file from filling the memory."""
    text, vae, unet, schedule = config.text, config.vae, config.unet, config.schedule
    largest = max(text.width, text.vocab_size, text.context_length, *vae.channels, *unet.channels)
    rules = {
        "widths of at most a million": max(largest, unet.in_channels, vae.latent_channels) <= 1 << 20,
        "at most 50 layers in the text encoder": text.layers <= 50,
        "at most 6 levels of 4 blocks": max(len(vae.channels), len(unet.channels)) <= 6
        and max(vae.blocks_per_level, unet.blocks_per_level) <= 4,
        "unet.attention as long as unet.channels": len(unet.attention) == len(unet.channels),
        "a text.width divisible by text.heads": text.width % text.heads == 0,
        "unet.channels divisible by unet.heads": not any(
            width % (unet.head_width or unet.heads) for width in unet.channels
        ),
        "a known text.activation": text.activation in ACTIVATIONS,
        "unet.channels divisible by unet.groups": not any(width % unet.groups for width in unet.channels),
        "vae.channels divisible by vae.groups": not any(width % vae.groups for width in vae.channels),
        "unet.context_width equal to text.width": unet.context_width == text.width,
        "unet.out_channels equal to vae.latent_channels": unet.out_channels == vae.latent_channels,
        "a unet.guidance_width from 4 to 4096 that is even": unet.guidance_width is None
        or (4 <= unet.guidance_width <= 4096 and unet.guidance_width % 2 == 0),
        "unet.in_channels equal to unet.out_channels, or for inpainting with those of an image and a mask added": (
            unet.in_channels in (unet.out_channels, unet.out_channels + vae.latent_channels + 1)
        ),
        "an image_size of at most 8192": config.image_size <= 8192,
        "at most 100,000 training steps": schedule.num_training_steps <= 100_000,
        "fewer sampling.steps than training steps": config.sampling.steps < schedule.num_training_steps,
        "betas that rise and stay below 1": schedule.beta_start <= schedule.beta_end < 1,
        "a known schedule": schedule.beta_schedule in ("scaled_linear", "linear")
        and schedule.prediction_type in PREDICTION_TYPES
        and schedule.timestep_spacing in ("", *SPACINGS),
    }
    if broken := [rule for rule, kept in rules.items() if not kept]:
        raise CheckpointError(f"The configuration of a model should have {', and '.join(broken)}.")
