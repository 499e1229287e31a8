"""The shape of every network, as frozen dataclasses.

One set of classes builds every size of Stable Diffusion: what differs between the real SD 1.5 and the tiny model of
this repository is written here and nowhere else. A checkpoint of ours carries its `ModelConfig` as a plain dict
(`to_dict`, `from_dict`); the published ones do not, and are recognised by their keys and shapes (`dialects`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace


@dataclass(frozen=True)
class TextConfig:
    """The text encoder: CLIP ViT-L/14's, unless told otherwise (2103.00020)."""

    vocab_size: int = 49408
    context_length: int = 77  # tokens of a prompt, start and end included
    width: int = 768
    layers: int = 12
    heads: int = 12


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between images and latents; `channels` lists its levels, finest first (2112.10752, app. E)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # brings the latents of the real VAE to unit variance

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent: 8 for four levels."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """The noise predictor; `channels` and `attention` list its levels, finest first (2112.10752, app. E)."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels read the prompt; the middle always does
    blocks_per_level: int = 2
    heads: int = 8
    groups: int = 32
    context_width: int = 768

    @property
    def inpaints(self) -> bool:
        """Whether it sees, beside the latents, a mask and a masked picture."""
        return self.in_channels > self.out_channels


PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class ScheduleConfig:
    """How noise grows over the training steps, and what the U-Net was trained to predict (2006.11239; 2202.00512)."""

    num_training_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction_type: str = "epsilon"  # one of PREDICTION_TYPES


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are made of noise, unless somebody says otherwise."""

    sampler: str = "dpm++2m"  # a key of samplers.SAMPLERS
    steps: int = 20
    cfg_scale: float = 7.5


@dataclass(frozen=True)
class ModelConfig:
    """All of a model: what `load_models` builds."""

    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    image_size: int = 512  # pixels along one side of the pictures it was trained on

    def to_dict(self) -> dict:
        """Plain dicts, tuples and numbers: what a checkpoint carries under `config`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The inverse of `to_dict`. Fields that are absent keep SD 1.5's values.

        Raises ValueError for a field that no dataclass here has, or for values that are not what it holds.
        """
        return _build(cls, values, "config")

    def check(self) -> None:
        """Raises ValueError for a configuration of which nothing can be built: one out of a damaged or hostile file."""
        text, vae, unet, schedule = self.text, self.vae, self.unet, self.schedule
        largest = max(text.width, text.vocab_size, text.context_length, *vae.channels, *unet.channels)
        rules = {
            "widths of at most a million": max(largest, unet.in_channels, vae.latent_channels) <= 1 << 20,
            "at most 50 layers of text encoder": text.layers <= 50,
            "at most 6 levels of 4 blocks": max(len(vae.channels), len(unet.channels)) <= 6
            and max(vae.blocks_per_level, unet.blocks_per_level) <= 4,
            "as many of unet.attention as of unet.channels": len(unet.attention) == len(unet.channels),
            "a text.width that text.heads divides": text.width % text.heads == 0,
            "unet.channels that unet.heads divides": not any(width % unet.heads for width in unet.channels),
            "unet.channels that unet.groups divides": not any(width % unet.groups for width in unet.channels),
            "vae.channels that vae.groups divides": not any(width % vae.groups for width in vae.channels),
            "unet.context_width equal to text.width": unet.context_width == text.width,
            "unet.out_channels equal to vae.latent_channels": unet.out_channels == vae.latent_channels,
            "no fewer unet.in_channels than unet.out_channels": unet.in_channels >= unet.out_channels,
            "an image_size of at most 8192": self.image_size <= 8192,
            "at most 100,000 training steps": schedule.num_training_steps <= 100_000,
            "fewer sampling.steps than training steps": self.sampling.steps < schedule.num_training_steps,
            "betas that rise, below 1": schedule.beta_start <= schedule.beta_end < 1,
            "a schedule that is known": schedule.beta_schedule in ("scaled_linear", "linear")
            and schedule.prediction_type in PREDICTION_TYPES,
        }
        if broken := [rule for rule, kept in rules.items() if not kept]:
            raise ValueError(f"The configuration of a model should have {', and '.join(broken)}.")


def _build(cls, values: object, where: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where} should be a dict of {cls.__name__} fields, not {values!r:.80}.")
    known = {f.name: f for f in fields(cls)}
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{where} has unknown fields {unknown!s:.200}; {cls.__name__} has {list(known)}.")
    default = cls()
    return cls(**{name: _convert(getattr(default, name), value, f"{where}.{name}") for name, value in values.items()})


def _convert(default: object, value: object, where: str):
    """`value` as the type of `default`: JSON has no tuples, and a file is not to be trusted with anything else."""
    if hasattr(default, "__dataclass_fields__"):
        return _build(type(default), value, where)
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and value:
            return tuple(_convert(default[0], v, where) for v in value)
    elif isinstance(default, (str, bool)):
        if type(value) is type(default):
            return value
    elif type(value) in (int, type(default)) and 0 < value < math.inf:
        return value
    raise ValueError(f"{where} should be like {default!r}, not {value!r:.80}.")


SD15 = ModelConfig()

# The inpainting checkpoint's U-Net also sees the mask (1 channel) and the latents of the masked image (4).
SD15_INPAINTING = replace(SD15, unet=replace(SD15.unet, in_channels=9))

# 8 groups: with 32, the norms of 32 channels would be instance norms.
TINY = ModelConfig(
    text=TextConfig(width=64, layers=3, heads=4),
    vae=VAEConfig(channels=(32, 32, 64, 64), groups=8, scaling_factor=1.0),
    unet=UNetConfig(channels=(64, 64, 96, 96), heads=4, groups=8, context_width=64),
    sampling=SamplingConfig(cfg_scale=5.0),
    image_size=128,
)
