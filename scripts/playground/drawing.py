"""In the worker: what a client asked for -> a checked `Request`, and then a picture, with an event for every step.

In: a dict as `forms.Drawing` describes it. Out: events, each a name and a dict for JSON. README.md lists them.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn

from scripts.playground import files
from scripts.playground.limits import FORMATS, Limits
from scripts.support.defaults import with_defaults
from scripts.support.embeddings import add_named
from scripts.support.fast import SETTINGS
from scripts.support.loras import find
from scripts.support.saved_settings import parameters
from sd import pipeline
from sd.adapters.control import Control
from sd.images import read_image, read_mask_image
from sd.inside.film import shows_previews
from sd.inside.preview import preview_for
from sd.inside.report.pictures import encode_maps
from sd.inside.report.tokens import tokens_of
from sd.inside.tracer import STAGE, Tracer, feature_image
from sd.models import Models
from sd.prompts.other_tools import adapt, take_loras
from sd.request import Request
from sd.runtime.out_of_memory import explain_out_of_memory

KEPT_MODELS = 3  # with different LoRAs; they share the weights that no LoRA changes
KEPT_CONTROLS = 2
FEATURE_STEPS = 4  # of a run, for which the feature maps are kept
MAP_BYTES = 250_000  # of all attention maps of a picture
IMAGE_FIELDS = ("input_image", "mask_image")
LARGE = 2  # times the pixels that the model was trained on: from here on, previews are not decoded

Emit = Callable[[str, dict], None]


class Stopped(Exception):
    """The picture is no longer wanted."""


@dataclass(frozen=True)
class Prepared:
    """A checked request with its images read, its LoRAs, and sentences for the user."""

    request: Request
    loras: tuple
    notes: list[str]


class Studio:
    """The models, and what was loaded for them."""

    def __init__(
        self, models: Models, options: argparse.Namespace, limits: Limits, preview_decoder: nn.Module | None = None
    ):
        """`options` has `checkpoint` and `vae`, which the settings in a picture name. `preview_decoder` decodes the
        predicted picture of every step, in the place of the models' own."""
        self.models, self.options, self.limits, self.preview_decoder = models, options, limits, preview_decoder
        self.preview = preview_for(models)
        self._models: OrderedDict[tuple, Models] = OrderedDict()
        self._controls: OrderedDict[tuple, object] = OrderedDict()

    def prepare(self, work: dict) -> Prepared:
        """Raises ValueError, in one sentence, for whatever cannot be drawn. No network runs."""
        settings = {field.name: work[field.name] for field in fields(Request) if field.name in work}
        given = [self._lora(one) for one in work.get("loras") or ()]
        if work.get("fast"):
            given += self._use_fast(settings)
        prompt, notes = adapt(settings["prompt"])
        prompt, tags = take_loras(prompt)
        used, missing = find(tags, given)
        negative, more = adapt(settings.get("uncond_prompt") or "")
        negative, ignored = take_loras(negative)
        if ignored:
            more["lora"] = f"{ignored[0].text:.80} in the negative prompt is left out: a LoRA belongs in the prompt."
        sentences = list(dict.fromkeys([*notes.values(), *missing.values(), *more.values()]))
        settings |= {"prompt": prompt, "uncond_prompt": negative}
        for name in IMAGE_FIELDS:
            settings[name] = self._image(name, settings.get(name))
        if work.get("invert_mask"):
            settings["mask_image"] = ImageOps.invert(settings["mask_image"])
        settings["control"] = [self._control(one) for one in settings.get("control") or ()] or None
        with heard(sentences):
            request = Request(**settings)
            request.check()
            request = with_defaults(request.read_images(), self.models)
            request.check()  # again: with_defaults chose the sampler, its steps and the size
        self.limits.check_size(request)
        return Prepared(request, used, sentences)

    def draw(self, work: dict, emit: Emit, stop: Callable[[], str | None]) -> None:
        """Emits "started", a "step" for each step, and "done". `stop` says "drop" or "finish" once it should end: the
        first raises `Stopped`, the second makes the picture of what has been drawn so far."""
        begun = time.perf_counter()
        prepared = self.prepare(work)
        request, sentences = prepared.request, prepared.notes
        options = argparse.Namespace(
            **vars(self.options), image=request.input_image, embedded={}, saved_embeddings={}, source=None
        )
        with heard(sentences):
            models, more = add_named(options, request, self._with_loras(prepared.loras))
            sentences += more
            request = replace(request, control=self._loaded(request, models))
            options.control, options.control_from = [Path(one.path) for one in request.control or ()], None
            if work.get("features"):
                stages = [name for name, _ in models.diffusion.named_modules() if STAGE.fullmatch(name)]
            else:
                stages = []
            traced = bool(work.get("attention") or stages)
            names = [f"diffusion.{stage}" for stage in stages]
            with Tracer(models, names, bool(work.get("attention"))) if traced else nullcontext() as trace:
                run = Run(self, request, models, work, emit, stop, trace, stages)
                image = run.draw()
            text = parameters(options, request, prepared.loras)
            done = {"images": [png_url(image, text)], "parameters": text, "seed": request.seed}
            done |= {"width": image.shape[1], "height": image.shape[0], "interrupted": run.interrupted}
            if work.get("attention"):
                done["attention"] = run.attention()
            if stages:
                done["features"] = run.features
        emit("done", done | {"seconds": round(time.perf_counter() - begun, 3), "notes": sentences})

    def _lora(self, given: dict) -> tuple[Path, float, float]:
        strength = given.get("strength", 1.0)
        return files.choose("loras", given["name"], files.lora_files(self.options.checkpoint)), strength, strength

    def _use_fast(self, settings: dict) -> list[tuple[Path, float, float]]:
        """The LoRA of the distilled few steps, with its settings where the client gave none."""
        if self.options.checkpoint:
            raise ValueError("fast should be false with another checkpoint: its LoRA is the tiny model's.")
        defaults = {"sampler_name": SETTINGS["sampler"], "n_inference_steps": SETTINGS["steps"]}
        for name, value in (defaults | {"cfg_scale": SETTINGS["cfg_scale"]}).items():
            if settings.get(name) is None:
                settings[name] = value
        return [(files.choose("fast", "tiny-lcm", files.lora_files()), 1.0, 1.0)]

    def _image(self, name: str, url: str | None) -> Image.Image | None:
        if url is None:
            return None
        content = self.limits.image_bytes(name, url)
        return read_mask_image(content) if name == "mask_image" else read_image(content, name=name)

    def _control(self, given: dict) -> Control:
        path = files.choose("control.net", given["net"], files.control_files(self.options.checkpoint))
        image = Image.open(self.limits.image_bytes("control.image", given["image"]), formats=FORMATS)
        numbers = {name: given[name] for name in ("strength", "start", "end", "guess_mode") if name in given}
        return Control(path, image, **numbers)

    def _with_loras(self, loras: tuple) -> Models:
        if not loras:
            return self.models
        return _kept(self._models, loras, lambda: self.models.with_loras(loras), KEPT_MODELS)

    def _loaded(self, request: Request, models: Models) -> list[Control] | None:
        loaded = []
        for one in request.control or ():
            key = one.path, models.loras  # some files hold differences from the model's weights
            net = _kept(self._controls, key, lambda one=one: one.loaded(models).net, KEPT_CONTROLS)
            loaded.append(replace(one, net=net).loaded(models))
        return loaded or None


class Run:
    """One picture in the making. It computes what `pipeline.draw` computes."""

    def __init__(
        self,
        studio: Studio,
        request: Request,
        models: Models,
        work: dict,
        emit: Emit,
        stop: Callable[[], str | None],
        trace: Tracer | None,
        stages: list[str],
    ):
        self.studio, self.request, self.models, self.work = studio, request, models, work
        self.emit, self.stop, self.trace, self.stages = emit, stop, trace, stages
        self.preview_models = replace(models, decoder=studio.preview_decoder or models.decoder)
        self.features: list[dict] = []
        self.interrupted = False
        self.begun = time.perf_counter()

    @explain_out_of_memory()
    def draw(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3)."""
        request, models = self.request, self.models
        if models.config.unet.inpaints and request.hires_scale > 1:
            raise ValueError("hires_scale should be 1 for an inpainting model.")
        guided = request.do_cfg and models.config.unet.guidance_width is None
        unconds = (request.uncond_prompt or "") if guided else None
        context = pipeline.encode_prompt(models, request.prompts, unconds, clip_skip=request.clip_skip)
        self.sampler, latents, self.inpainting = pipeline.prepare(models, request)
        self._start(latents, 1)
        latents = self._pass(latents, context, 1)
        if request.hires_scale > 1 and not self.interrupted:
            self.sampler.set_strength(request.hires_strength)
            latents = pipeline.enlarge(models, latents, request.hires_scale, self.sampler, request.hires_latents)
            self._start(latents, 2)
            latents = self._pass(latents, context, 2)
        return self._decoded(latents, models)

    def attention(self) -> dict:
        """The tokens of the prompt with the map of each: where the U-Net attended to it."""
        tokens = tokens_of(self.models, self.request.prompts[0], self.trace)
        maps = encode_maps([token.map for token in tokens], MAP_BYTES)
        names = ("text", "id", "weight", "joined", "share")
        listed = [{name: getattr(token, name) for name in names} | {"map": url} for token, url in zip(tokens, maps)]
        region = self.inpainting and self.inpainting.region
        return {"tokens": listed, "box": None if region is None else list(region.box)}

    def _start(self, latents: Tensor, number: int) -> None:
        sampler, request = self.sampler, self.request
        scale = self.models.config.vae.downscale
        values = {
            "pass": number,
            "passes": 1 + (request.hires_scale > 1),
            "steps": len(sampler.timesteps),
            "skipped": sampler.skipped,
            "timesteps": sampler.timesteps.tolist(),
            "alpha_bar": sampler.alpha_bar.tolist(),
            "sigmas": [_finite(sigma) for sigma in sampler.sigmas.tolist()],
            "latents": [latents.shape[3], latents.shape[2]],
            "width": latents.shape[3] * scale,
            "height": latents.shape[2] * scale,
            "seed": request.seed,
            "sampler": request.sampler_name,
            "cfg_scale": request.cfg_scale,
            "prediction": sampler.schedule.prediction_type,
        }
        self.emit("started", values)

    def _pass(self, latents: Tensor, context: Tensor, number: int) -> Tensor:
        request, total = self.request, len(self.sampler.timesteps)
        kept = set(np.linspace(0, total - 1, min(FEATURE_STEPS, total)).round().astype(int).tolist())
        steps = pipeline.steps_of(
            request, self.models, latents, context, self.sampler, self.inpainting, request.control or ()
        )
        for step in steps:
            if (wish := self.stop()) == "drop":
                raise Stopped
            self.emit("step", self._step(step, latents, number))
            if self._decodes(latents):
                place = {"pass": number, "index": step.index}
                predicted = self._decoded(step.denoised, self.preview_models)
                self.emit("predicted", place | {"image": png_url(predicted)})
            latents = step.latents
            if self.trace is not None:
                self._keep_features(step, number, step.index in kept)
            if wish == "finish":
                self.interrupted = True
                return step.denoised
        return latents

    def _step(self, step: pipeline.Step, latents: Tensor, number: int) -> dict:
        """The event of a step. Its small pictures have one pixel for each position of the latents."""
        values = {
            "pass": number,
            "index": step.index,
            "steps": len(self.sampler.timesteps),
            "timestep": step.timestep,
            "alpha_bar": self.sampler.alpha_bar[step.index].item(),
            "sigma": _finite(self.sampler.sigmas[step.index].item()),
            "seconds": round(time.perf_counter() - self.begun, 3),
        }
        if self.work.get("previews", "full") == "none":
            return values
        maps = {"latents": latents, "denoised": step.denoised, "cond": step.noise_cond}
        if step.noise_uncond is not None:
            push = step.noise_cond - step.noise_uncond
            maps |= {"uncond": step.noise_uncond, "push": push / push.std().clamp_min(1e-6)}
        return values | {"images": {name: png_url(self.studio.preview(one)[0]) for name, one in maps.items()}}

    def _decodes(self, latents: Tensor) -> bool:
        """Whether the predicted picture of each step is decoded: only if that takes no longer than a step."""
        pixels = latents.shape[2] * latents.shape[3] * self.models.config.vae.downscale**2
        small = pixels <= LARGE * self.models.config.image_size**2 and not shows_previews(self.preview_models)
        return small and self.work.get("previews", "full") == "full"

    def _decoded(self, latents: Tensor, models: Models) -> np.ndarray:
        images = pipeline.decode_latents(models, latents)
        return (images if self.inpainting is None else self.inpainting.restore_pixels(images))[0]

    def _keep_features(self, step: pipeline.Step, number: int, kept: bool) -> None:
        """Turns the feature maps of this step into pictures, if it is one to keep, and drops the recorded tensors."""
        calls = [call for call in self.trace.calls if call.network == "diffusion"]
        if kept and self.stages:
            maps = {stage: x for call in calls for stage, x in call.activations.items()}
            stages = [
                {"name": name, "shape": list(x.shape[1:]), "image": png_url(feature_image(x[-1]))}
                for name, x in maps.items()
            ]
            self.features.append({"pass": number, "index": step.index, "stages": stages})
        self.trace.calls[:] = calls[-1:]  # whose shapes the attention maps need
        self.trace.calls[0].activations.clear()


def _finite(sigma: float) -> float | None:
    """JSON has no infinity, which is the level of noise alone."""
    return sigma if math.isfinite(sigma) else None


_heard = threading.local()


def hear_warnings() -> None:
    """Lets `heard` take the warnings of its own thread. `warnings.catch_warnings` would take those of all threads."""

    def keep(message: Warning, *_: object) -> None:
        sentences = getattr(_heard, "sentences", None)
        if sentences is not None and str(message) not in sentences:
            sentences.append(str(message))

    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = keep


@contextmanager
def heard(sentences: list[str]) -> Iterator[None]:
    """Adds the warnings of the block to the sentences for the user."""
    _heard.sentences = sentences
    try:
        yield
    finally:
        _heard.sentences = None


def png_url(image: np.ndarray, text: str | None = None) -> str:
    """uint8 (H, W, 3) -> a PNG data URL, with `text` as its "parameters"."""
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("parameters", text.encode("utf-8", "replace").decode("utf-8"))
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", pnginfo=info, compress_level=6 if text else 1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _kept(cache: OrderedDict, key: object, make: Callable, most: int) -> object:
    """The value of a small cache, which drops what was not used for longest."""
    if key not in cache:
        cache[key] = make()
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)
    return cache[key]
