"""Stage 1, the autoencoder: images -> latents -> the same images. And stage 4, its decoder once more.

In: images. Out: an encoder and a decoder whose latents have mean 0 and variance 1 in every channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd.config import VAEConfig
from sd.decoder import Decoder
from sd.encoder import Encoder, sample_posterior
from sd.training import ranks
from sd.training.data import CaptionedImages
from sd.training.losses import vae_loss
from sd.training.precision import mixed_precision

ENCODED_AT_ONCE = 32 * 128 * 128  # pixels: the activations of larger images need much more memory


class VAEStage:
    """Encoder and decoder, trained on square crops with many edges: as much to learn as whole images, in less time."""

    name = "vae"
    learning_rate = 4e-3
    tries = 3  # random crops per image; the one with the most edges is used
    divisible = True
    ema = 0.998

    def __init__(self, config: VAEConfig, dataset: CaptionedImages, batch_size: int = 16, crop: int = 64):
        """`crop` is the side of the crops in pixels."""
        self.config = {"channels": list(config.channels), "blocks": config.blocks_per_level, "groups": config.groups}
        self.dataset, self.batch_size, self.crop = dataset, batch_size, min(crop, dataset.pixels.shape[1])
        self.latent_shape = (config.latent_channels, self.crop // config.downscale, self.crop // config.downscale)
        self.networks = nn.ModuleDict({"encoder": Encoder(config), "decoder": Decoder(config)})
        with torch.no_grad():  # start with little noise in the latents, or the decoder learns to ignore them
            self.networks["encoder"].quant_conv.bias[config.latent_channels :] -= 6

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, crop, crop) of random images, and noise (B, 4, crop/8, crop/8) for their latents."""
        indices = torch.randint(len(self.dataset), (self.batch_size,), generator=generator)
        places = torch.rand(self.batch_size, self.tries, 2, generator=generator)
        room = self.dataset.pixels.shape[1] - self.crop
        pairs = zip(self.dataset.batch(indices), (places * (room + 1)).long())
        images = torch.stack([self._best_crop(image, corners) for image, corners in pairs])
        return images, torch.randn((self.batch_size, *self.latent_shape), generator=generator)

    def _best_crop(self, image: Tensor, corners: Tensor) -> Tensor:
        """Of the crops at these corners (tries, 2), the one with the most edges: plain sky has little to teach."""
        crops = [image[:, y : y + self.crop, x : x + self.crop] for y, x in corners.tolist()]
        return max(crops, key=lambda crop: crop.diff(dim=-1).abs().mean().item())

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        encoder, decoder = self.networks["encoder"], self.networks["decoder"]
        mean, log_variance = (moment.float() for moment in encoder.moments(images))
        latents = sample_posterior(mean, log_variance, noise) * encoder.scaling_factor
        decoded = decoder(latents).float()
        return vae_loss(images, decoded, mean, log_variance)


class DecoderStage:
    """The decoder alone, trained further on whole images, for sharper ones.

    The encoder is frozen, so the latents do not change, and the U-Net still fits them. This stage can therefore come
    last.
    """

    name = "decoder"
    learning_rate = 2e-3
    divisible = True
    ema = 0.998

    def __init__(self, stage: VAEStage, encoder: Encoder, decoder: Decoder):
        """`stage` draws the batches, as in stage 1; `encoder` and `decoder` were trained by stage 1."""
        self.config, self.batch_size, self.draw = stage.config, stage.batch_size, stage.draw
        self.encoder = encoder.eval().requires_grad_(False)
        self.networks = nn.ModuleDict({"decoder": decoder.requires_grad_(True)})

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self.encoder(images, noise)
        decoded = self.networks["decoder"](latents).float()
        return vae_loss(images, decoded)


@torch.no_grad()
def encode_all(
    encoder: Encoder, dataset: CaptionedImages, device: torch.device, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """N images -> mean and standard deviation of their scaled latents, float16 (N, 4, H/8, W/8) each.

    With `shared`, which all ranks have to call, each rank encodes its share.
    """
    means, stds = [], []
    batches = torch.arange(len(dataset)).split(32)
    first, end = (len(batches) * number // ranks.count() for number in (ranks.rank(), ranks.rank() + 1))
    own = batches[first:end] if shared else batches
    for indices in tqdm(own, "encoding images", leave=False, disable=ranks.rank() > 0):
        images = dataset.batch(indices)  # (32, 3, H, W)
        for part in images.split(max(1, ENCODED_AT_ONCE // images[0, 0].numel())):
            with mixed_precision(device):
                mean, log_variance = encoder.moments(part.to(device))
            means.append((mean.float() * encoder.scaling_factor).half().cpu())
            stds.append(((0.5 * log_variance.float()).exp() * encoder.scaling_factor).half().cpu())
    if shared:
        means, stds = ([part for share in ranks.everyones(own) for part in share] for own in (means, stds))
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def normalise_latents(encoder: Encoder, decoder: Decoder, mean: Tensor, std: Tensor) -> None:
    """Give the latents mean 0 and variance 1 in every channel, by changing the 1x1 convolutions next to them.

    mean and std (4,) are those of the scaled latents of a training set. The encoder's last convolution then also
    computes z' = (z - mean) / std, and the decoder's first one z = std z' + mean, so that images are reconstructed as
    before.
    """
    channels = len(mean)
    mean = mean / encoder.scaling_factor  # the convolutions compute unscaled latents
    quant, post = encoder.quant_conv, decoder.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log variances
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def reconstruct(encoder: Encoder, decoder: Decoder, images: Tensor) -> Tensor:
    """Encode and decode images (B, 3, H, W) in [-1, 1]; the result is in [-1, 1] too."""
    return decoder(encoder(images)).clamp(-1, 1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images (B, 3, H, W) in [-1, 1] -> (B,)."""
    return -10 * ((images - others) / 2).square().mean(dim=(1, 2, 3)).log10()
