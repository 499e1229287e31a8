"""What each network is trained to do, as one number to make small.

In: what the networks put out, and what they should have put out. Out: a scalar with gradients. Three networks, three
losses: `vae_loss`, `contrastive_loss` for the text encoder, `diffusion_loss` for the U-Net.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vae_loss(
    image: Tensor,
    decoded: Tensor,
    mean: Tensor | None = None,
    log_variance: Tensor | None = None,
    kl_weight: float = 1e-4,
    square_weight: float = 8.0,
    edge_weight: float = 0.5,
) -> Tensor:
    """The negative evidence lower bound (1312.6114, eq. 10), its two terms weighted against each other.

    image, decoded (B, 3, H, W); mean, log_variance (B, 4, H/8, W/8) of q(z | x). The first term says how badly
    `decoded` fits: the squared error is -log p(x | z) for a normal p, the absolute error for a Laplace p, and the
    absolute error of the differences between neighbouring pixels keeps edges crisp. Errors are small, and their squares
    smaller still, which is why these weigh more. The second is the divergence; with the encoder frozen it cannot
    change, and `mean` is left out.
    """
    error = decoded - image
    reconstruction = square_weight * error.square().mean() + error.abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.0 if mean is None else kl_to_standard_normal(mean, log_variance)
    return reconstruction + edge_weight * edges + kl_weight * divergence


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) = -1/2 (1 + log variance - mean^2 - variance), 1312.6114, app. B.

    mean, log_variance of any shape; averaged, not summed, over it.
    """
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


def sample_posterior(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """z = mean + std * noise (1312.6114, section 2.4): so gradients reach mean and std. All of one shape."""
    return mean + torch.exp(0.5 * log_variance) * noise


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Each of B pictures should pick its own caption out of B, and each caption its picture (2103.00020, figure 3).

    images, texts (B, D), of any length; log_scale () is the learned log of the inverse temperature, exp of it at most
    100, as there. 0.5 (cross-entropy over rows + cross-entropy over columns) of scale * cosine.
    """
    cosine = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # (B, B)
    logits = log_scale.exp().clamp(max=100) * cosine
    own = torch.arange(len(logits), device=logits.device)  # (B,): row i belongs to column i
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def drop_captions(tokens: Tensor, empty: Tensor, chance: float, generator: torch.Generator | None = None) -> Tensor:
    """Replaces a caption now and then by the empty one, so that one U-Net learns both predictions (2207.12598, alg. 1).

    tokens (B, 77), empty (1, 77) -> (B, 77); each row is replaced with probability `chance`.
    """
    dropped = torch.rand(len(tokens), generator=generator).to(tokens.device) < chance  # (B,)
    return torch.where(dropped[:, None], empty, tokens)


def diffusion_target(latents: Tensor, noise: Tensor, a_t: Tensor, prediction_type: str) -> Tensor:
    """What the U-Net should say: the noise e, or v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (2202.00512, app. D).

    latents, noise (B, 4, h, w); a_t (B, 1, 1, 1), the signal's share of the variance.
    """
    if prediction_type == "v_prediction":
        return a_t.sqrt() * noise - (1 - a_t).sqrt() * latents
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
) -> Tensor:
    """E || e - e_theta(sqrt(a_t) x_0 + sqrt(1 - a_t) e, t, c) ||^2 (2006.11239, eq. 14; 2112.10752, eq. 3).

    latents, noise (B, 4, h, w), context (B, 77, D), timesteps (B,). With `min_snr`, gamma, each picture's error counts
    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v, where SNR = a_t / (1 - a_t) (2303.09556,
    section 3.4): nearly clean pictures, whose noise is hardest to tell, then no longer drown the others.
    """
    a_t = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    noisy = a_t.sqrt() * latents + (1 - a_t).sqrt() * noise  # (B, 4, h, w)
    predicted = unet(noisy, context, timesteps)
    target = diffusion_target(latents, noise, a_t, prediction_type)
    error = (predicted.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    if min_snr is not None:
        snr = (a_t / (1 - a_t)).flatten()  # (B,)
        error = error * snr.clamp(max=min_snr) / (snr + 1 if prediction_type == "v_prediction" else snr)
    return error.mean()
