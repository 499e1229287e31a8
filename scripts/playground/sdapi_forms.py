"""AUTOMATIC1111's requests: their fields, with its names and defaults, and what they mean as a `forms.Drawing`.

The names and defaults are those of modules/api/models.py and modules/processing.py in its repository. Unknown fields
are ignored, as they are there. A field that would change the picture, and cannot here, is refused unless it has its
default.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from scripts.playground.forms import MAX_CONTROLS, MAX_SEED, Prompt
from scripts.playground.limits import Wrong

PLAIN_SCHEDULES = ("", "automatic", "uniform", "normal")
HASH = re.compile(r" ?\[[0-9a-fA-F]+\]$")  # behind the name of a file; `\s*` would take the square of the time
CONTROL_MODES = {"balanced": False, "0": False, "controlnet is more important": True, "2": True}
# Fields that change the picture in a way that is not supported, and the values that do not.
WITHOUT_EFFECT = {
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "script_name": ("",),
    "refiner_checkpoint": ("", "None"),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "initial_noise_multiplier": (1,),
}
MISSING = (None, [], {})
# Our names of settings, with which errors begin -> AUTOMATIC1111's.
NAMES = {
    "uncond_prompt": "negative_prompt",
    "n_inference_steps": "steps",
    "strength": "denoising_strength",
    "hires_strength": "denoising_strength",
    "hires_scale": "hr_scale",
    "input_image": "init_images",
    "mask_image": "mask",
    "feather": "mask_blur",
    "padding_mask_crop": "inpaint_full_res_padding",
    "clip_skip": "CLIP_stop_at_last_layers",
}

Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class Picture(BaseModel):
    """What txt2img and img2img share."""

    model_config = ConfigDict(extra="allow")

    prompt: Prompt = ""
    negative_prompt: Prompt | None = ""
    styles: list[str] | None = Field(None, max_length=100, description="ignored: there are no styles here")
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: a random one")
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field("Euler", max_length=100, description="the older name of sampler_name")
    scheduler: str | None = Field(None, max_length=100, description="Automatic, Uniform or Karras")
    batch_size: int = Field(1, ge=1, le=1000)
    n_iter: int = Field(1, ge=1, le=1000)
    steps: int = Field(50, ge=1, le=1000)
    cfg_scale: float = Field(7.0, ge=-1000, le=1000, allow_inf_nan=False)
    width: Side | None = Field(None, description="default: the model's own, such as 512")
    height: Side | None = None
    denoising_strength: float | None = Field(0.75, ge=0, le=1, allow_inf_nan=False)
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True


class TextToImage(Picture):
    """/sdapi/v1/txt2img"""

    enable_hr: bool = False
    hr_scale: float = Field(2.0, ge=1, le=8, allow_inf_nan=False)
    hr_upscaler: str | None = Field(None, max_length=100, description="Latent or Lanczos")
    hr_second_pass_steps: int = Field(0, ge=0, le=1000)


class ImageToImage(Picture):
    """/sdapi/v1/img2img"""

    init_images: Annotated[list[str], Field(max_length=100)] | None = None
    mask: str | None = None
    mask_blur: Annotated[int, Field(ge=0, le=500)] | None = 4
    inpainting_fill: int = Field(0, ge=0, le=3)
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(0, ge=0, le=8192)
    inpainting_mask_invert: bool = False
    resize_mode: int = Field(0, ge=0, le=3)
    include_init_images: bool = False


def work_of(form: Picture, about: dict) -> dict:
    """What the worker gets for the first picture of a request. `about` describes the model. Raises Wrong."""
    refuse_what_has_no_equal(form)
    work = {
        "prompt": form.prompt,
        "uncond_prompt": form.negative_prompt or "",
        "cfg_scale": form.cfg_scale,
        "sampler_name": sampler_of(form, about["samplers"]),
        "n_inference_steps": form.steps,
        "width": form.width,
        "height": form.height,
        "previews": "small",
        **overridden(form.override_settings or {}, about),
    }
    if isinstance(form, TextToImage) and form.enable_hr:
        work |= second_pass(form)
    if isinstance(form, ImageToImage):
        work |= image_and_mask(form)
    return work | {"control": controls_of(form.alwayson_scripts or {}, work.get("input_image"))}


def renamed(sentence: str) -> str:
    """An error with AUTOMATIC1111's name of the setting."""
    name, space, rest = sentence.partition(" ")
    return NAMES.get(name, name) + space + rest


def refuse_what_has_no_equal(form: Picture) -> None:
    for name, allowed in WITHOUT_EFFECT.items():
        value = (form.model_extra or {}).get(name)
        if value not in MISSING and value not in allowed:
            raise Wrong(f"{name} should be {allowed[0]!r}, not {value!r:.100}: it is not supported here.")


def sampler_of(form: Picture, samplers: list[dict]) -> str:
    """Our name of a sampler. Raises Wrong for one that does not exist here."""
    given = form.sampler_name or form.sampler_index or "Euler"
    base, schedule = given.removesuffix(" Karras"), (form.scheduler or "").lower()
    karras = base != given or schedule == "karras"
    if not karras and schedule not in PLAIN_SCHEDULES:
        raise Wrong(f"scheduler should be Automatic, Uniform or Karras, not {form.scheduler!r}.")
    for one in samplers:
        if (base + " Karras" * karras).lower() in (one["label"].lower(), one["name"].replace("_karras", " karras")):
            return one["name"]
    labels = ", ".join(one["label"] for one in samplers)
    raise Wrong(f"sampler_name should be one of {labels}, not {given!r}{' with the schedule Karras' * karras}.")


def overridden(settings: dict, about: dict) -> dict:
    """`override_settings`: those that are known."""
    check_model(settings.get("sd_model_checkpoint"), about)
    skip = settings.get("CLIP_stop_at_last_layers", 1)
    return {} if skip == 1 else {"clip_skip": skip}


def check_model(name: object, about: dict) -> None:
    """Raises Wrong for another model than the one that is loaded."""
    known = {about["model"], about["file"], about["file"].rpartition(".")[0]}
    if name not in (None, "") and not (isinstance(name, str) and HASH.sub("", name) in known):
        raise Wrong(f"sd_model_checkpoint should be {about['file']!r}, the model of this server, not {name!r:.100}.")


def second_pass(form: TextToImage) -> dict:
    upscaler = form.hr_upscaler or "Latent"
    if upscaler not in ("Latent", "Lanczos"):
        raise Wrong(f"hr_upscaler should be 'Latent' or 'Lanczos', not {upscaler!r}.")
    if form.hr_second_pass_steps not in (0, form.steps):
        raise Wrong(f"hr_second_pass_steps should be 0, which is the same as steps, not {form.hr_second_pass_steps}.")
    strength = 0.75 if form.denoising_strength is None else form.denoising_strength
    return {"hires_scale": form.hr_scale, "hires_latents": upscaler == "Latent", "hires_strength": strength}


def image_and_mask(form: ImageToImage) -> dict:
    if len(form.init_images or []) != 1:
        raise Wrong(f"init_images should be one image, not {len(form.init_images or [])}.")
    if form.resize_mode > 1:
        raise Wrong(f"resize_mode should be 0 or 1, not {form.resize_mode}: an image of another shape is cropped.")
    strength = 0.75 if form.denoising_strength is None else form.denoising_strength
    work = {"input_image": form.init_images[0], "strength": strength}
    if not form.mask:
        return work
    if form.inpainting_fill > 1:
        raise Wrong(
            f"inpainting_fill should be 0 or 1, not {form.inpainting_fill}: the image itself is what is noised."
        )
    # There the blur reaches to both sides of the mask's edge, here only inwards: black stays the same to the byte.
    work |= {"mask_image": form.mask, "invert_mask": form.inpainting_mask_invert, "feather": 2 * (form.mask_blur or 0)}
    return work | ({"padding_mask_crop": form.inpaint_full_res_padding} if form.inpaint_full_res else {})


def controls_of(scripts: dict, image: str | None) -> list[dict] | None:
    """The units of the ControlNet extension. `image` stands in for a unit without one. Raises Wrong."""
    found = []
    for name, script in scripts.items():
        units = script.get("args", []) if isinstance(script, dict) else script
        if not isinstance(units, list):
            raise Wrong(f"alwayson_scripts.{name:.50} should have a list of args.")
        if name.lower() != "controlnet":
            raise Wrong(f"alwayson_scripts should be ControlNet, the only one here, not {name!r:.100}.")
        found += [unit for unit in units if isinstance(unit, dict) and unit.get("enabled", True)]
    units = [unit for unit in found if str(unit.get("model", "None")) != "None"]
    if len(units) > MAX_CONTROLS:  # each takes a copy of its image
        raise Wrong(f"ControlNet should have at most {MAX_CONTROLS} units, not {len(units)}.")
    return [_unit(unit, image) for unit in units] or None


def _unit(unit: dict, image: str | None) -> dict:
    module, mode = str(unit.get("module", "none")).lower(), str(unit.get("control_mode", "0")).lower()
    if module != "none":
        raise Wrong(f"module should be 'none', not {module!r:.100}: send the image of edges, poses or depths itself.")
    if mode not in CONTROL_MODES:
        raise Wrong(f"control_mode should be Balanced or ControlNet is more important, not {mode!r:.100}.")
    given = unit.get("image") or unit.get("input_image") or image
    if not isinstance(given, str):
        raise Wrong("image should be given for each unit of ControlNet, in base64.")
    values = {"net": HASH.sub("", str(unit["model"])), "image": given, "guess_mode": CONTROL_MODES[mode]}
    numbers = {"strength": unit.get("weight", 1.0), "start": unit.get("guidance_start", 0.0)}
    numbers |= {"end": unit.get("guidance_end", 1.0)}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise Wrong(f"The {name} of a ControlNet should be a number, not {number!r:.100}.")
    return values | numbers
