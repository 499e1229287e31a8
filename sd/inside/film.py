"""How a picture came to be, as moving pictures: where it seemed to be heading at every step.

In: a `Recording`. Out: frames for `images.write_animation`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from sd import pipeline
from sd.config import SD15
from sd.inside.preview import SD15_PREVIEW
from sd.inside.recording import Recording
from sd.models import Models


def frames(recording: Recording) -> list[np.ndarray]:
    """Frames of the picture's size, uint8 (H, W, 3): the x_0 predicted at each recorded step, then the picture itself.

    A small decoder decodes every frame; where decoding takes longer than a step, as in SD 1.x, a preview stands in.
    """
    models, known = recording.models, recording.known
    draw = _previewed if models.config.vae == SD15.vae else pipeline.decode_latents
    images = (draw(models, moment.denoised) for moment in recording.moments)  # each (1, H, W, 3)
    if known is not None:
        images = map(known.restore_pixels, images)  # with what stays of the picture that is repainted
    return [*(image[0] for image in images), recording.picture]


def _previewed(models: Models, latents: Tensor) -> np.ndarray:
    """Latents (1, 4, h, w) -> their preview, enlarged to uint8 (1, H, W, 3)."""
    small = Image.fromarray(SD15_PREVIEW(latents)[0])
    downscale = models.config.vae.downscale
    large = small.resize((small.width * downscale, small.height * downscale), Image.Resampling.BICUBIC)
    return np.array(large)[None]
