"""A prompt -> a picture, and how it came to be: where the picture seemed to be heading at every step.

In: what `generate` takes, for one picture. Out: the picture, and frames for `images.write_animation`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd import pipeline
from sd.arguments import check_request
from sd.config import SD15
from sd.images import Picture
from sd.inpainting import Known
from sd.model_loader import Models, load_models
from sd.preview import SD15_PREVIEW

MOST_FRAMES = 60


def generate_film(
    prompt: str,
    uncond_prompt: str = "",
    input_image: Picture | None = None,
    mask_image: Picture | None = None,
    strength: float = 0.8,
    cfg_scale: float = 7.5,
    sampler_name: str = "dpm++2m",
    n_inference_steps: int | None = None,
    models: Models | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    feather: float = 0,
    cfg_rescale: float = 0,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The picture that `generate` makes of the same arguments, uint8 (height, width, 3), and frames of the same size.

    A frame is the x_0 predicted at a step, of 60 steps at most and evenly spaced; the last is the picture itself. A
    small decoder decodes every frame; where decoding takes longer than a step, as in SD 1.x, a preview stands in.

    Raises ValueError as `generate` does.
    """
    check_request(**locals())  # every argument, under its own name
    models = models or load_models()
    context = pipeline.encode_prompt(models, prompt, uncond_prompt)
    size_and_pictures = (height, width, input_image, mask_image, strength, feather)
    sampler, latents, known = pipeline.begin(models, 1, sampler_name, n_inference_steps, seed, *size_and_pictures)
    steps = pipeline.denoise(models, latents, context, sampler, cfg_scale, known, cfg_rescale)
    return _film(models, steps, len(sampler.timesteps), known)


def _film(
    models: Models, steps: Iterator[pipeline.Step], total: int, known: Known | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Runs all `total` steps -> the picture, and the frames."""

    def shown(images: np.ndarray) -> np.ndarray:
        """Images (1, H, W, 3) -> one (H, W, 3), with what stays of the picture that is repainted."""
        return (images if known is None else known.paste(images))[0]

    draw = _previewed if models.config.vae == SD15.vae else pipeline.decode_latents
    every = -(-total // MOST_FRAMES)  # rounded up
    frames = []
    for step in tqdm(steps, total=total):
        if step.index % every == 0:
            frames.append(shown(draw(models, step.denoised)))
    picture = shown(pipeline.decode_latents(models, step.latents))
    return picture, [*frames, picture]


def _previewed(models: Models, latents: Tensor) -> np.ndarray:
    """Latents (1, 4, h, w) -> their preview, enlarged to uint8 (1, H, W, 3)."""
    small = Image.fromarray(SD15_PREVIEW(latents)[0])
    downscale = models.config.vae.downscale
    large = small.resize((small.width * downscale, small.height * downscale), Image.Resampling.BICUBIC)
    return np.array(large)[None]
