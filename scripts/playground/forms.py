"""What the page sends, as FastAPI reads it. Its limits are in the OpenAPI page; those of `limits.py` come on top."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_PROMPT = 10_000
MAX_SEED = 2**63 - 1
MAX_CONTROLS = 3

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]
Name = Annotated[str, Field(min_length=1, max_length=300)]


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Lora(Form):
    """A LoRA by its name in /api/loras. `<lora:name:0.8>` in the prompt does the same."""

    name: Name
    strength: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)


class Control(Form):
    """A ControlNet by its name in /api/controls, and the image that it steers by."""

    net: Name
    image: str = Field(description="a data URL of a PNG, JPEG or WebP image")
    strength: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    start: Share = 0.0
    end: Share = 1.0
    guess_mode: bool = False


class Drawing(Form):
    """A picture to draw. The first fields are those of `Request` in sd/request.py; null is the model's own default."""

    prompt: Prompt
    uncond_prompt: Prompt = ""
    input_image: str | None = Field(None, description="a data URL of a PNG, JPEG or WebP image")
    mask_image: str | None = Field(None, description="the same: white is repainted, black stays")
    strength: float = Field(0.8, gt=0, le=1, allow_inf_nan=False)
    do_cfg: bool = True
    cfg_scale: float | None = Field(None, ge=-1000, le=1000, allow_inf_nan=False)
    sampler_name: str | None = Field(None, max_length=50)
    n_inference_steps: int | None = Field(None, ge=1, le=1000)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: a random one, which the events name")
    height: Side | None = None
    width: Side | None = None
    feather: float = Field(0, ge=0, le=1000, allow_inf_nan=False)
    padding_mask_crop: int | None = Field(None, ge=0, le=8192)
    cfg_rescale: Share = 0
    cfg_interval: list[Share] | None = Field(None, min_length=2, max_length=2)
    deep_cache: int = Field(1, ge=1, le=1000)
    control: list[Control] | None = Field(None, max_length=MAX_CONTROLS)
    clip_skip: int = Field(1, ge=1, le=24)
    freeu: list[Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]] | None = Field(
        None, min_length=4, max_length=4
    )
    hires_scale: float = Field(1, ge=1, le=8, allow_inf_nan=False)
    hires_strength: float = Field(0.6, gt=0, le=1, allow_inf_nan=False)
    hires_latents: bool = False
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    loras: list[Lora] = Field(default_factory=list, max_length=8)
    fast: bool = Field(False, description="the tiny model's four distilled steps, as --fast of demo.py")


class NewJob(Drawing):
    """A picture, and what to show of its making."""

    previews: Literal["none", "small", "full"] = Field(
        "full", description="pictures in the events: none, with one pixel per latent, or also the decoded prediction"
    )
    attention: bool = Field(False, description="record where the U-Net attended to each token: /api/jobs/ID/attention")
    features: bool = Field(False, description="record feature maps of the U-Net's stages: /api/jobs/ID/features")
    client: str = Field("", max_length=64, description="whose turn in the queue this takes: a tab's random name")
    supersedes: Literal["nothing", "queued", "all"] = Field(
        "nothing", description="which earlier pictures of the same client, waiting or all, are cancelled by this one"
    )


class Text(Form):
    prompt: Prompt


class Picture(Form):
    image: str = Field(description="a data URL of a PNG, JPEG or WebP image, or base64 alone")
