"""Makes an image as `generate` does, and records how: what films and reports are made from.

A `Recording` holds the image, the U-Net's input and output at every step, and the time and memory of each of the four
parts of the pipeline.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd import pipeline
from sd.adapters.control import Control, Steering
from sd.inpainting import InpaintingInputs, Region
from sd.model_loader import load_models
from sd.models import Models
from sd.request import Request, check_models
from sd.runtime.out_of_memory import explain_out_of_memory
from sd.sampler import Sampler

MAX_MOMENTS = 60
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux only: this process's memory


@dataclass(frozen=True)
class Moment:
    """One recorded step of the denoising. All tensors are float32 (1, 4, h, w), on the CPU."""

    index: int
    timestep: int | float
    latents: Tensor  # x_t: the U-Net's input, before the step
    denoised: Tensor  # x_0, as predicted at this step
    noise_uncond: Tensor | None  # its output (noise or v) for the negative prompt; None without guidance
    noise_cond: Tensor  # its output for the prompt


@dataclass(frozen=True)
class Cost:
    """The time and memory that one part of the pipeline took."""

    seconds: float
    peak: int | None  # bytes: see `peak_memory`


@dataclass(frozen=True)
class Residuals:
    """What one ControlNet added to the U-Net at one recorded step, for the prompt's half of the batch."""

    moment: Moment
    maps: list[Tensor]  # 13 of float32 (1, C, h, w), on the CPU


@dataclass(frozen=True)
class Recording:
    """How one image was made."""

    prompt: str
    uncond_prompt: str
    cfg_scale: float
    models: Models
    image: np.ndarray  # uint8 (H, W, 3)
    moments: list[Moment]  # at most 60, evenly spaced, including the first and the last step
    sampler: Sampler  # `timesteps` has those of all steps; `skipped` is how many steps `strength` left out
    inpainting: InpaintingInputs | None  # for inpainting: the part of the input image to keep
    costs: dict[str, Cost]  # for "encode_prompt", "prepare", "denoise" and "decode_latents"
    control: Sequence[Control] = ()  # the ControlNets at work
    residuals: Sequence[Residuals | None] = ()  # of each of them; None if it worked in no step
    preview: nn.Module | None = None  # a decoder that is fast enough to decode every moment


@explain_out_of_memory()
def record(request: Request, models: Models | None = None, preview: nn.Module | None = None) -> Recording:
    """Makes the image that `pipeline.draw` makes of the same request, which has one prompt, and records how. `preview`
    is a decoder for films and reports that is faster than the models' own, such as a `TinyDecoder`.

    Raises ValueError for several prompts or a second pass (`hires_scale`), and what `generate` raises.
    """
    request.check()
    check_models(models, None, None, None)
    if len(request.prompts) > 1:
        raise ValueError(f"prompt should be one text to be recorded, not {len(request.prompts)}.")
    if request.hires_scale > 1:
        raise ValueError("hires_scale should be 1 to be recorded: a film and a report show one pass.")
    request, models = request.read_images(), models or load_models()
    uncond_prompt, cfg_scale = request.uncond_prompt or "", request.cfg_scale
    uncond_prompt = uncond_prompt if isinstance(uncond_prompt, str) else uncond_prompt[0]
    cfg_scale = models.config.sampling.cfg_scale if cfg_scale is None else cfg_scale
    control = [one.loaded(models) for one in request.control or ()]
    costs: dict[str, Cost] = {}
    with _measured(costs, "encode_prompt", models):
        unconds = uncond_prompt if request.do_cfg else None
        context = pipeline.encode_prompt(models, request.prompts, unconds, clip_skip=request.clip_skip)
    with _measured(costs, "prepare", models):
        sampler, latents, inpainting = pipeline.prepare(models, request)
    with _measured(costs, "denoise", models):
        steps = pipeline.steps_of(request, models, latents, context, sampler, inpainting, control)
        moments, latents = _watch(steps, latents, len(sampler.timesteps))
    with _measured(costs, "decode_latents", models):
        images = pipeline.decode_latents(models, latents)  # (1, H, W, 3)
    image = (images if inpainting is None else inpainting.restore_pixels(images))[0]
    region = inpainting and inpainting.region
    residuals = [_residuals(one, moments, context, len(sampler.timesteps), region) for one in control]
    return Recording(
        request.prompts[0],
        uncond_prompt,
        cfg_scale,
        models,
        image,
        moments,
        sampler,
        inpainting,
        costs,
        control,
        residuals,
        preview,
    )


@torch.no_grad()
def _residuals(
    control: Control, moments: list[Moment], context: Tensor, steps: int, region: Region | None
) -> Residuals | None:
    """The residuals in the middle one of the recorded steps in which a ControlNet works, or None if it never does.

    They are computed once more: to keep those of all steps would take gigabytes.
    """
    working = [moment for moment in moments if control.works(moment.index, steps)]
    if not working:
        return None
    moment = working[len(working) // 2]
    steering, times = Steering([control], moment.latents, region), torch.tensor([moment.timestep])
    maps = steering.residuals(moment.latents, context[-1:], times, moment.index, steps, guided=False)
    return Residuals(moment, [each.float().cpu() for each in maps])


def _watch(steps: Iterator[pipeline.Step], latents: Tensor, total: int) -> tuple[list[Moment], Tensor]:
    """Runs all `total` steps from `latents` -> the recorded moments, and the final latents."""
    kept = set(np.linspace(0, total - 1, min(total, MAX_MOMENTS)).round().astype(int).tolist())
    moments = []
    for step in tqdm(steps, total=total):
        if step.index in kept:
            tensors = (latents, step.denoised, step.noise_uncond, step.noise_cond)
            moments.append(Moment(step.index, step.timestep, *(x if x is None else x.cpu() for x in tensors)))
        latents = step.latents
    return moments, latents


@contextmanager
def _measured(costs: dict[str, Cost], name: str, models: Models) -> Iterator[None]:
    """Measures the time and peak memory of the block, into `costs[name]`."""
    device = models.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            CLEAR.write_text("5")  # resets the peak to the memory in use now
    started = time.perf_counter()
    yield
    if device.type != "cpu":
        torch.cuda.synchronize(device) if device.type == "cuda" else torch.mps.synchronize()
    costs[name] = Cost(time.perf_counter() - started, peak_memory(device))


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes, of the CUDA device or else of this process. None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if kibibytes := re.search(r"VmHWM:\s*(\d+)", STATUS.read_text()):
            return int(kibibytes[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
