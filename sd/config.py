"""The sizes of every network, as frozen dataclasses. SD 1.5, SD 2 and the tiny model differ here and nowhere else.

Our checkpoints contain their `ModelConfig` as a plain dict (`to_dict`, `from_dict`). Published ones do not:
`checkpoints/variants.py` recognises them by their keys and shapes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, is_dataclass, replace


@dataclass(frozen=True)
class TextConfig:
    """The text encoder; the defaults are CLIP ViT-L/14's (2103.00020). SD 2.x has OpenCLIP's ViT-H/14 (2212.07143)."""

    vocab_size: int = 49408
    context_length: int = 77  # tokens of a prompt, start and end included
    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"  # or "gelu", as in OpenCLIP
    zero_padding: bool = False  # a prompt's 77 ids end with zeros, not with more end tokens

    @property
    def is_openclip(self) -> bool:
        """Whether this is OpenCLIP's encoder, whose tensors have other names in files."""
        return self.activation == "gelu"


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between images and latents; `channels` lists its levels, finest first (2112.10752, app. E)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # gives the latents of the real VAE unit variance

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
    head_width: int | None = None  # if given, heads have this width, and wider levels have more of them
    groups: int = 32
    context_width: int = 768
    guidance_width: int | None = None  # if given, it also reads the guidance scale, in an embedding of this width

    def heads_of(self, channels: int) -> int:
        """The number of attention heads at a level of so many channels."""
        return self.heads if self.head_width is None else channels // self.head_width

    @property
    def inpaints(self) -> bool:
        """Whether its input also has a mask and a masked image, in channels after the latents."""
        return self.in_channels > self.out_channels


PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")  # see `noise.space_timesteps`


@dataclass(frozen=True)
class ScheduleConfig:
    """How noise grows over the training steps, and what the U-Net was trained to predict (2006.11239; 2202.00512)."""

    num_training_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction_type: str = "epsilon"  # one of PREDICTION_TYPES
    rescale_betas_zero_snr: bool = False  # whether the last timestep is noise alone (2305.08891)
    timestep_spacing: str = ""  # one of SPACINGS, instead of each sampler's own


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled by default."""

    sampler: str = "dpm++2m"  # a key of samplers.SAMPLERS
    steps: int = 20
    cfg_scale: float = 7.5


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model: what `load_models` builds."""

    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    image_size: int = 512  # pixels along one side of the training images

    def to_dict(self) -> dict:
        """Plain dicts, tuples and numbers, as a checkpoint stores them under `sd_config`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The inverse of `to_dict`; absent fields keep SD 1.5's values. Raises ValueError for invalid ones."""
        return _convert(cls(), values, "config")


def _convert(default: object, value: object, where: str):
    """`value` with the type of `default`. JSON turns tuples into lists, and a file can hold anything."""
    if is_dataclass(default):
        name, defaults = type(default).__name__, vars(default)
        if not isinstance(value, dict):
            raise ValueError(f"{where} should be a dict of {name} fields, not {value!r:.80}.")
        if unknown := [key for key in value if key not in defaults]:
            raise ValueError(f"{where} has unknown fields {unknown!s:.200}; {name} has {list(defaults)}.")
        return replace(default, **{key: _convert(defaults[key], v, f"{where}.{key}") for key, v in value.items()})
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and value:
            return tuple(_convert(default[0], v, where) for v in value)
    elif isinstance(default, (str, bool)):
        if type(value) is type(default):
            return value
    elif value is None and default is None:
        return None
    elif type(value) in (int, type(default)) and 0 < value < math.inf:
        return value
    raise ValueError(f"{where} should be like {default!r}, not {value!r:.80}.")


SD15 = ModelConfig()

# Latent consistency models (2310.04378): any of these, with a `guidance_width`.
LCM_SAMPLING = SamplingConfig(sampler="lcm", steps=4, cfg_scale=8.0)

# The U-Net of the inpainting checkpoint also takes the mask (1 channel) and the latents of the masked image (4).
SD15_INPAINTING = replace(SD15, unet=replace(SD15.unet, in_channels=9))

# SD 2.x: its base models predict noise and make images of 512 pixels; the others predict v, at 768.
SD2_BASE = ModelConfig(
    text=TextConfig(width=1024, layers=23, heads=16, activation="gelu", zero_padding=True),
    unet=UNetConfig(head_width=64, context_width=1024),
)
SD2 = replace(SD2_BASE, schedule=ScheduleConfig(prediction_type="v_prediction"), image_size=768)
# SD-Turbo (2311.17042) draws in 1 to 4 steps, from the last timestep on and without guidance.
SD_TURBO = replace(
    SD2_BASE,
    schedule=ScheduleConfig(timestep_spacing="trailing"),
    sampling=SamplingConfig(sampler="euler", steps=1, cfg_scale=1.0),
)
SD2_INPAINTING = replace(SD2_BASE, unet=replace(SD2_BASE.unet, in_channels=9))

# 8 groups: with 32, the norms of 32 channels would be instance norms.
TINY = ModelConfig(
    text=TextConfig(width=64, layers=3, heads=4),
    vae=VAEConfig(channels=(32, 32, 64, 64), groups=8, scaling_factor=1.0),
    unet=UNetConfig(channels=(64, 64, 96, 96), heads=4, groups=8, context_width=64),
    sampling=SamplingConfig(cfg_scale=5.0),
    image_size=128,
)
