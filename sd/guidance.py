"""Guidance: steer the prediction by one prompt against another, or by the gradient of any loss on the image.

In: the U-Net's predictions. Out: the prediction, or the latents, that the sampler continues with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sd.decoder import Decoder
from sd.runtime.devices import device_and_dtype
from sd.sampler import Sampler

ImageLoss = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> one number, the smaller the better


def classifier_free(noise_uncond: Tensor, noise_cond: Tensor, scale: float, rescale: float = 0) -> Tensor:
    """Moves the prediction away from the unconditional one (2207.12598, eq. 6, with scale = 1 + w):

        e = e_uncond + scale (e_cond - e_uncond)

    A large scale also makes e larger than the noise in training, and images too harsh. `rescale`, from 0 to 1, brings e
    back to the standard deviation of e_cond (2305.08891, section 3.4; deviations are per image):

        e' = rescale e std(e_cond) / std(e) + (1 - rescale) e,    all tensors (B, 4, h, w)
    """
    noise = noise_uncond + scale * (noise_cond - noise_uncond)
    if rescale == 0:
        return noise
    dims = tuple(range(1, noise.ndim))
    ratio = noise_cond.std(dims, keepdim=True) / noise.std(dims, keepdim=True)  # (B, 1, 1, 1)
    return rescale * ratio * noise + (1 - rescale) * noise


def by_loss(
    decoder: Decoder, sampler: Sampler, timestep: Tensor, latents: Tensor, noise: Tensor, loss: ImageLoss
) -> Tensor:
    """Latents x_t (B, 4, h, w), moved down the gradient of a loss on the image they are heading for:

        x_t - (1 - a_t) d loss(decode(x_0)) / d x_t,    x_0 predicted from x_t and the U-Net's output `noise`

    The factor 1 - a_t makes the push fade with the noise; for x = x_0 + sigma_t e it is sigma_t^2. (Guidance by the
    gradient of a classifier: 2105.05233, algorithm 1; by a loss on the predicted x_0: 2302.07121, section 3.1.)

    The output is held fixed: unlike in that paper, no gradient goes through the U-Net. d x_0 / d x_t is then
    1 / sqrt(a_t) for a U-Net that predicts noise, and sqrt(a_t) for v, which therefore needs a loss of larger weight.
    """
    decoder.gradient_checkpointing = True
    try:
        with torch.enable_grad():
            x = latents.detach().requires_grad_()
            denoised, _ = sampler.predict(timestep, x, noise)
            images = decoder(denoised.to(*device_and_dtype(decoder)))  # (B, 3, H, W)
            leaf = images.detach().float().requires_grad_()
            push = torch.autograd.grad(loss(leaf), leaf)[0]  # (B, 3, H, W)
            # The gradient of a mean over all pixels is too small for float16: it is scaled to 1 on its way back.
            size = push.abs().amax().clamp_min(1e-30)
            gradient = size * torch.autograd.grad(images, x, (push / size).to(images))[0]  # (B, 4, h, w)
    finally:
        decoder.gradient_checkpointing = False
    return latents - (1 - sampler.alpha_bar_at(timestep).to(latents)) * gradient
