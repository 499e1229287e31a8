"""Pictures that can be drawn together, and how: several requests -> one batch.

The batches follow from the items alone. So a picture is in the same batch, and has the same bytes, whatever the number
of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scripts.support.prompts_files import Item
from sd import pipeline
from sd.models import Models
from sd.request import Request
from sd.runtime.out_of_memory import explain_out_of_memory

OWN = {"prompt": "", "uncond_prompt": "", "seed": None, "input_image": None}  # what may differ within a batch


def make_batches(items: Sequence[Item], size: int, models: Models) -> list[list[Item]]:
    """The items without an error, in batches of up to `size` that have the same size, settings and LoRAs."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        if item.request is not None:
            groups.setdefault(_key(item, models), []).append(item)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _key(item: Item, models: Models) -> object:
    request = item.request
    if request.mask_image is not None or request.control or models.config.unet.inpaints:
        return item.index  # alone: what inpainting keeps and ControlNets add belong to one picture
    return repr((item.loras, request.input_image is None, replace(request, **OWN)))


@explain_out_of_memory()
def draw(requests: Sequence[Request], models: Models) -> np.ndarray:
    """The pictures of a batch, uint8 (N, height, width, 3): what `pipeline.draw` makes of each request, to one level.

    Each request has one prompt. Their seeds need not follow each other. Raises what `pipeline.draw` raises.
    """
    requests = [request.read_images() for request in requests]
    first = requests[0]
    if models.config.unet.inpaints and first.hires_scale > 1:
        raise ValueError("hires_scale should be 1 for an inpainting model.")
    control = [one.loaded(models) for one in first.control or ()]
    guided = first.do_cfg and models.config.unet.guidance_width is None
    unconds = [request.uncond_prompt or "" for request in requests] if guided else None
    prompts = [request.prompt for request in requests]
    context = pipeline.encode_prompt(models, prompts, unconds, clip_skip=first.clip_skip)  # (2N, 77 k, D)
    samplers, parts, kept = zip(*(pipeline.prepare(models, request) for request in requests))
    sampler, inpainting = samplers[0], kept[0]
    sampler.generator = [one.generator[0] for one in samplers]  # each picture's own, as its seed alone would give

    def run(latents: Tensor) -> Tensor:
        for step in pipeline.steps_of(first, models, latents, context, sampler, inpainting, control):
            latents = step.latents
        return latents

    latents = run(torch.cat(parts))  # (N, 4, H/8, W/8)
    if first.hires_scale > 1:
        sampler.set_strength(first.hires_strength)
        latents = run(pipeline.enlarge(models, latents, first.hires_scale, sampler, first.hires_latents))
    images = pipeline.decode_latents(models, latents)
    return images if inpainting is None else inpainting.restore_pixels(images)
