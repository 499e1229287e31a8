"""A `Recording` -> an animation of how the image was made, as frames for `images.write_animation`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image
from torch import Tensor

from sd import pipeline
from sd.config import SD15
from sd.decoder import Decoder
from sd.inside.preview import SD15_PREVIEW
from sd.inside.recording import Recording
from sd.models import Models


def frames(recording: Recording) -> list[np.ndarray]:
    """The image that the U-Net expected (x_0) at each recorded step, then the final image: each uint8 (H, W, 3).

    A small decoder decodes every frame. SD 1.x's decoder takes longer than a step, so its frames are previews, unless
    the recording has a tiny decoder for them.

    The last two often look the same: what is expected at the last step is the final image. WebP and GIF files store
    such frames as one.
    """
    models, inpainting = recording.models, recording.inpainting
    models = models if recording.preview is None else replace(models, decoder=recording.preview)
    draw = _preview if shows_previews(models) else pipeline.decode_latents
    images = (draw(models, moment.denoised) for moment in recording.moments)  # each (1, H, W, 3)
    if inpainting is not None:
        images = map(inpainting.restore_pixels, images)  # inpainting: with the kept part of the input image
    return [*(image[0] for image in images), recording.image]


def shows_previews(models: Models) -> bool:
    """Whether the frames are previews, because the decoder is too slow to decode each of them."""
    return models.config.vae == SD15.vae and isinstance(models.decoder, Decoder)


def _preview(models: Models, latents: Tensor) -> np.ndarray:
    """Latents (1, 4, h, w) -> their preview, enlarged to uint8 (1, H, W, 3)."""
    small = Image.fromarray(SD15_PREVIEW(latents)[0])
    downscale = models.config.vae.downscale
    large = small.resize((small.width * downscale, small.height * downscale), Image.Resampling.BICUBIC)
    return np.array(large)[None]
