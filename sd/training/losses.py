"""The training losses: `vae_loss`, `contrastive_loss` for the text encoder, `diffusion_loss` and `pseudo_huber_loss`
for the U-Net. `drop_captions` and `offset_noise` change what the U-Net's loss gets.

In: what a network predicted, and what it should have predicted. Out: one number to minimise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.noise import add_noise


def vae_loss(
    image: Tensor,
    decoded: Tensor,
    mean: Tensor | None = None,
    log_variance: Tensor | None = None,
    kl_weight: float = 1e-4,
    square_weight: float = 8.0,
    edge_weight: float = 0.5,
) -> Tensor:
    """The negative evidence lower bound (1312.6114, eq. 10): a reconstruction error plus a weighted KL divergence.

    image, decoded (B, 3, H, W); mean, log_variance (B, 4, H/8, W/8) of q(z | x).

    The reconstruction error has three parts. The squared error is -log p(x | z) for a normal p, and the absolute error
    for a Laplace p. The absolute error of the differences between neighbouring pixels keeps edges sharp. Errors are
    small and their squares even smaller, so the squared error has a larger weight.

    If the encoder is frozen, the divergence is constant: leave out `mean` and `log_variance`.
    """
    error = decoded - image
    reconstruction = square_weight * error.square().mean() + error.abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.0 if mean is None else kl_to_standard_normal(mean, log_variance)
    return reconstruction + edge_weight * edges + kl_weight * divergence


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) = -1/2 (1 + log variance - mean^2 - variance), 1312.6114, app. B.

    mean and log_variance have the same shape, any; the result is the mean over all values, not the sum.
    """
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Match each of B images with its own caption, and each caption with its image (2103.00020, figure 3):

    0.5 (cross-entropy over rows + cross-entropy over columns) of scale * cosine similarity.

    images, texts (B, D), which need not be normalised; log_scale () is the learned log of the scale, the inverse
    temperature. As in the paper, the scale is at most 100.
    """
    cosine = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # (B, B)
    logits = log_scale.exp().clamp(max=100) * cosine
    labels = torch.arange(len(logits), device=logits.device)  # (B,): image i belongs to caption i
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))


def drop_captions(tokens: Tensor, empty: Tensor, chance: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace some captions by the empty one, so that one U-Net learns to predict with and without a caption
    (classifier-free guidance, 2207.12598, alg. 1).

    tokens (B, 77), empty (1, 77) -> (B, 77); each row is replaced with probability `chance`.
    """
    dropped = torch.rand(len(tokens), generator=generator).to(tokens.device) < chance  # (B,)
    return torch.where(dropped[:, None], empty, tokens)


def diffusion_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the U-Net should predict: the noise e, or v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (2202.00512, app. D).

    latents x_0 and noise e (B, 4, h, w); alpha_bar a_t (B, 1, 1, 1).
    """
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    return noise


def diffusion_loss(
    unet: nn.Module,
    latents: Tensor,
    context: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str = "epsilon",
    min_snr: float | None = None,
    snr_power: float = 1.0,
) -> Tensor:
    """E || e - e_theta(sqrt(a_t) x_0 + sqrt(1 - a_t) e, t, c) ||^2 (2006.11239, eq. 14; 2112.10752, eq. 3).

    latents x_0 and noise e (B, 4, h, w), context c (B, 77, D), timesteps (B,), alphas_cumprod (1000,), all a_t.

    `min_snr` is gamma of 2303.09556, section 3.4. The error of each image is then weighted by min(SNR, gamma) / SNR for
    epsilon and min(SNR, gamma) / (SNR + 1) for v, where SNR = a_t / (1 - a_t). Noise is hardest to predict in nearly
    clean images; the weight keeps their errors from dominating the loss.

    With `snr_power` p, the weight is min(SNR, gamma)^p / SNR, or with v / (SNR + 1). A p below 1 makes the noisiest
    images count more. In these, the first steps of sampling decide what is where.
    """
    alpha_bar = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    noisy = add_noise(latents, noise, alpha_bar)  # (B, 4, h, w)
    predicted = unet(noisy, context, timesteps)  # (B, 4, h, w)
    target = diffusion_target(latents, noise, alpha_bar, prediction_type)
    error = (predicted.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    if min_snr is not None:
        snr = (alpha_bar / (1 - alpha_bar)).flatten()  # (B,)
        weight = snr.clamp(max=min_snr) ** snr_power
        error = error * weight / (snr + 1 if prediction_type == "v_prediction" else snr)
    return error.mean()


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """e + s o: the same random number o ~ N(0, 1) is added to a whole channel of an image (N. Guttenberg, "Diffusion
    with Offset Noise", CrossLabs 2023: https://www.crosslabs.org/blog/diffusion-with-offset-noise).

    noise e (B, 4, h, w), strength s from 0 on -> (B, 4, h, w).

    At the last timestep, x_t still shows the mean of each channel of x_0: a mean over many pixels has hardly any noise.
    A model learns to keep this mean. So it cannot draw very dark or very bright images from noise, whose mean is near
    0. The offset hides the mean. With s = 0, the noise is unchanged.
    """
    offset = torch.randn((*noise.shape[:2], 1, 1), generator=generator)  # (B, 4, 1, 1)
    return noise + strength * offset


def pseudo_huber_loss(predicted: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """The mean of sqrt(d^2 + c^2) - c over all differences d (2310.14189, section 3.3, with one d for
    each number).

    Far from 0 it grows as |d| does, so that a few large differences do not outweigh the others.
    """
    return ((predicted - target).square() + c**2).sqrt().mean() - c
