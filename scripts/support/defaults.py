"""What a request leaves open, as the model decides it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scripts.support.image_size import choose_size

if TYPE_CHECKING:
    from sd.models import Models
    from sd.request import Request


def with_defaults(request: Request, models: Models) -> Request:
    """The request with the model's defaults filled in: sampler, steps, scale and size."""
    from sd.samplers import SAMPLERS

    defaults, name = models.config.sampling, request.sampler_name
    image = request.input_image or (request.control[0].image if request.control else None)
    image = image.size if image and request.padding_mask_crop is None else None
    width, height = choose_size(image, request.width, request.height, models.config.image_size)
    default_steps = SAMPLERS[name].default_steps if name else defaults.steps
    return replace(
        request,
        sampler_name=name or defaults.sampler,
        n_inference_steps=request.n_inference_steps or default_steps,
        cfg_scale=defaults.cfg_scale if request.cfg_scale is None else request.cfg_scale,
        height=height,
        width=width,
    )
