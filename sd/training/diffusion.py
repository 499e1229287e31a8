"""Stage 3, the U-Net, trained on latents of the trained autoencoder and captions encoded by the trained text encoder.

In: mean and standard deviation of the latents of each image, and its captions. Out: a U-Net that predicts the noise in
latents, given a caption.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sd.clip import CLIP
from sd.config import ScheduleConfig, UNetConfig
from sd.diffusion import Diffusion
from sd.noise import make_betas
from sd.training.latents import spread_timesteps
from sd.training.losses import diffusion_loss, drop_captions
from sd.training.text import pick_captions


class DiffusionStage:
    """The U-Net. The moving average of its weights makes the better images."""

    name = "diffusion"
    learning_rate = 2e-3  # halved when training starts from a trained U-Net
    divisible = True
    ema = 0.998

    def __init__(
        self,
        config: UNetConfig,
        schedule: ScheduleConfig,
        latents: tuple[Tensor, Tensor],
        tokens: list[Tensor],
        empty: Tensor,
        clip: CLIP,
        start: Diffusion | None = None,
        batch_size: int = 48,
    ):
        """latents: mean and standard deviation of N images, (N, 4, h, w) each; tokens: their captions, as `tokenise`
        returns them; empty: the tokens of the empty caption, (1, 77); clip: the trained text encoder; start: a trained
        U-Net to start from."""
        self.config = {"channels": list(config.channels), "heads": config.heads, "groups": config.groups}
        self.config |= {"predicts": schedule.prediction_type}
        self.schedule, self.batch_size = schedule, batch_size
        self.means, self.stds = latents
        self.tokens, self.clip = tokens, clip.eval().requires_grad_(False)
        self.empty = empty
        self.alphas_cumprod = torch.cumprod(1 - make_betas(schedule), 0).to(next(clip.parameters()).device)
        self.networks = nn.ModuleDict({"diffusion": Diffusion(config)})
        if start is None:
            start_as_identity(self.networks["diffusion"])
        else:
            self.networks["diffusion"].load_state_dict(start.state_dict())
            self.learning_rate /= 2

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: latents (B, 4, h, w), token ids (B, 77), timesteps (B,) and noise (B, 4, h, w)."""
        indices = torch.randint(len(self.means), (self.batch_size,), generator=generator)
        mean, std = self.means[indices].float(), self.stds[indices].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        tokens = drop_captions(pick_captions(self.tokens, indices, generator).long(), self.empty, 0.1, generator)
        timesteps = spread_timesteps(self.batch_size, self.schedule.num_training_steps, generator)  # (B,)
        return latents, tokens, timesteps, torch.randn(mean.shape, generator=generator)

    def loss(self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            context = self.clip(tokens)  # (B, 77, D)
        unet, predicts = self.networks["diffusion"], self.schedule.prediction_type
        weight = {"min_snr": 5.0, "snr_power": 0.5}
        return diffusion_loss(unet, latents, context, timesteps, noise, self.alphas_cumprod, predicts, **weight)


@torch.no_grad()
def start_as_identity(unet: Diffusion) -> None:
    """Zero the last layer of every residual branch and of the whole network.

    At the start, each block then passes on only what comes through its shortcut, and the predicted noise is 0.
    """
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
