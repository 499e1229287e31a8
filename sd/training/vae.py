"""Stage 1: the autoencoder, pictures -> latents -> the same pictures.

In: pictures. Out: an encoder and a decoder whose latents have mean 0 and variance 1 in every channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd.config import VAEConfig
from sd.decoder import Decoder
from sd.encoder import Encoder
from sd.training.data import Pictures
from sd.training.losses import sample_posterior, vae_loss
from sd.training.precision import mixed_precision


class VAEStage:
    """Encoder and decoder, trained on square crops, which hold as many edges for less time."""

    name = "vae"
    learning_rate = 4e-3
    tries = 3  # crops to choose from
    divisible = True
    ema = 0.998

    def __init__(self, config: VAEConfig, pictures: Pictures, batch_size: int = 16, crop: int = 64):
        self.config = {"channels": list(config.channels), "blocks": config.blocks_per_level, "groups": config.groups}
        self.pictures, self.batch_size, self.crop = pictures, batch_size, min(crop, pictures.pixels.shape[1])
        self.latent_shape = (config.latent_channels, self.crop // config.downscale, self.crop // config.downscale)
        self.networks = nn.ModuleDict({"encoder": Encoder(config), "decoder": Decoder(config)})
        with torch.no_grad():  # begin with little noise in the latents, or the decoder learns to ignore them
            self.networks["encoder"].quant_conv.bias[config.latent_channels :] -= 6

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        indices = torch.randint(len(self.pictures), (self.batch_size,), generator=generator)
        corners = torch.rand(self.batch_size, self.tries, 2, generator=generator)
        room = self.pictures.pixels.shape[1] - self.crop
        pairs = zip(self.pictures.batch(indices), (corners * (room + 1)).long())
        images = torch.stack([self._richest(image, places) for image, places in pairs])
        return images, torch.randn((self.batch_size, *self.latent_shape), generator=generator)

    def _richest(self, image: Tensor, corners: Tensor) -> Tensor:
        """Of the crops at these corners (tries, 2), the one with most edges: bare sky has little left to teach."""
        crops = [image[:, y : y + self.crop, x : x + self.crop] for y, x in corners.tolist()]
        return max(crops, key=lambda crop: crop.diff(dim=-1).abs().mean().item())

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        encoder, decoder = self.networks["encoder"], self.networks["decoder"]
        mean, log_variance = (moment.float() for moment in encoder.moments(images))
        latents = sample_posterior(mean, log_variance, noise) * encoder.scaling_factor
        decoded = decoder(latents).float()
        return vae_loss(images, decoded, mean, log_variance)


class DecoderStage:
    """The decoder alone, some more, on whole pictures. The encoder stays as it is, and with it all that the U-Net has
    learned about latents; so this comes last, and makes pictures crisper for as long as there is time."""

    name = "decoder"
    learning_rate = 2e-3
    divisible = True
    ema = 0.998

    def __init__(self, stage: VAEStage, encoder: Encoder, decoder: Decoder):
        """Data and batches are the first stage's, `stage`; the networks are those that it trained."""
        self.config, self.batch_size, self.draw = stage.config, stage.batch_size, stage.draw
        self.encoder = encoder.eval().requires_grad_(False)
        self.networks = nn.ModuleDict({"decoder": decoder})

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self.encoder(images, noise)
        decoded = self.networks["decoder"](latents).float()
        return vae_loss(images, decoded)


@torch.no_grad()
def encode_all(encoder: Encoder, pictures: Pictures, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every picture once -> mean and standard deviation of its scaled latents, float16 (N, 4, H/8, W/8) each."""
    means, stds = [], []
    for indices in tqdm(torch.arange(len(pictures)).split(32), "encoding pictures", leave=False):
        with mixed_precision(device):
            mean, log_variance = encoder.moments(pictures.batch(indices).to(device))
        means.append((mean.float() * encoder.scaling_factor).half().cpu())
        stds.append(((0.5 * log_variance.float()).exp() * encoder.scaling_factor).half().cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def normalise_latents(encoder: Encoder, decoder: Decoder, mean: Tensor, std: Tensor) -> None:
    """Gives the latents mean 0 and variance 1 in every channel, by folding both into the 1x1 convolutions next to them.

    mean and std are those of the scaled latents of a whole training set, (4,) each: z' = (z - mean) / std after the
    encoder, and z = std z' + mean before the decoder, so that pictures come through as before.
    """
    channels = len(mean)
    mean = mean / encoder.scaling_factor  # the convolutions are on the other side of the factor
    quant, post = encoder.quant_conv, decoder.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log variances
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def reconstruct(encoder: Encoder, decoder: Decoder, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) through the autoencoder and back, in [-1, 1]."""
    return decoder(encoder(images)).clamp(-1, 1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of pictures (B, 3, H, W) in [-1, 1] -> (B,)."""
    return -10 * ((images - others) / 2).square().mean(dim=(1, 2, 3)).log10()
