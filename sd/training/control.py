"""ControlNet: a copy of the U-Net's way down learns to steer it by an image (2302.05543).

    y = F(x; W) + Z(F(x + Z(c; W_z1); W_c); W_z2)        (eq. 2)

W are the U-Net's weights, which stay as they are. W_c begin as a copy of them, and the convolutions Z with zeros: at
the start, the image c changes nothing. The loss is that of the U-Net itself (eq. 5). A third of the captions are empty
in training, so that the ControlNet learns to read the image where the caption does not help (section 3.3: half).

In: a finished model, pictures with captions, and an image for each of them, such as its outline. Out: a file for
any program that knows ControlNets. How such a file is read and used: `sd.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.adapters.controlnet import ControlNet
from sd.adapters.controlnet_files import PREFIX, RULES
from sd.checkpoints.files import write_checkpoint
from sd.checkpoints.key_rules import inverse, rename
from sd.diffusion import Diffusion
from sd.model_converter import CONVOLUTIONS_1X1, UNET_RULES, split_qkv
from sd.models import Models
from sd.noise import make_betas
from sd.training.losses import diffusion_loss, drop_captions
from sd.training.samples import decode, draw_latents
from sd.training.text import pick_captions

DROPPED = 1 / 3  # share of empty captions

Hints = Callable[[Tensor, torch.Generator], Tensor]  # indices (B,) -> the images to steer by, (B, 3, H, W) in [0, 1]


class ControlStage:
    """A ControlNet for a U-Net that stays as it is. Gradients pass the U-Net's way up, and reach no weight of it."""

    name = "control"
    learning_rate = 2e-3  # halved when training starts from a trained ControlNet
    divisible = True
    ema = 0.99

    def __init__(
        self,
        models: Models,
        latents: tuple[Tensor, Tensor],
        tokens: list[Tensor],
        hints: Hints,
        start: ControlNet | None = None,
        batch_size: int = 8,
    ):
        """models: with the U-Net, in float32; latents: mean and standard deviation of N images, (N, 4, h, w) each;
        tokens: their captions, as `tokenise` returns them; hints: gives the images to steer by; start: a ControlNet to
        start from, instead of the U-Net."""
        self.config = {"channels": list(models.config.unet.channels), "batch_size": batch_size}
        self.models, self.batch_size = models, batch_size
        self.means, self.stds = latents
        self.tokens, self.hints = tokens, hints
        self.empty = models.tokenizer([""])  # (1, 77)
        self.schedule = models.config.schedule
        self.alphas_cumprod = torch.cumprod(1 - make_betas(self.schedule), 0).to(models.device)
        if start:
            self.learning_rate /= 2
        self.networks = nn.ModuleDict({"control": _trainable(start) if start else control_of(models)})

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: latents (B, 4, h, w), token ids (B, 77), images to steer by (B, 3, 8h, 8w), timesteps (B,)
        and noise (B, 4, h, w)."""
        indices = torch.randint(len(self.means), (self.batch_size,), generator=generator)
        mean, std = self.means[indices].float(), self.stds[indices].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        tokens = pick_captions(self.tokens, indices, generator).long()
        tokens = drop_captions(tokens, self.empty, DROPPED, generator)
        # Evenly spread, as in stage `diffusion`, but most of them large: these are the first steps of a run, where the
        # layout is decided (2302.08453).
        spread = (torch.rand(1, generator=generator) + torch.arange(self.batch_size) / self.batch_size) % 1
        timesteps = ((1 - spread**2) * (self.schedule.num_training_steps - 1)).long()  # (B,)
        hints = self.hints(indices, generator)
        return latents, tokens, hints, timesteps, torch.randn(mean.shape, generator=generator)

    def loss(self, latents: Tensor, tokens: Tensor, hints: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """2302.05543, eq. 5, with min-SNR weights: the error of what the steered U-Net predicts, noise or v."""
        with torch.no_grad():
            context = self.models.clip(tokens)  # (B, 77, D)
        control: ControlNet = self.networks["control"]
        features = control.hint(hints)  # (B, 320, h, w)
        steered = Steered(self.models.diffusion, control, features)
        predicts = self.schedule.prediction_type
        return diffusion_loss(steered, latents, context, timesteps, noise, self.alphas_cumprod, predicts, min_snr=5.0)


class Steered(nn.Module):
    """A U-Net with a ControlNet. `features` (B, 320, h, w) are `ControlNet.hint` of the images to steer by."""

    def __init__(self, unet: Diffusion, control: ControlNet, features: Tensor):
        super().__init__()
        self.unet, self.control, self.features = unet, control, features

    def forward(self, latents: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
        """As the U-Net, for B latents, or for 2B with the unconditional half first."""
        features = self.features.repeat(len(latents) // len(self.features), 1, 1, 1)
        return self.unet(latents, context, timesteps, self.control(latents, context, timesteps, features))


@torch.no_grad()
def control_of(models: Models) -> ControlNet:
    """A ControlNet that changes nothing yet: a copy of the U-Net's way down, and convolutions that start with zeros."""
    network = ControlNet(models.config.unet)
    own, unet = network.state_dict(), models.diffusion.state_dict()
    network.load_state_dict(own | {name: unet[name] for name in own if name in unet})
    for convolution in (*network.zero_convs, network.zero_middle, network.hint[-1]):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return network


def _trainable(start: ControlNet) -> ControlNet:
    """A copy of a ControlNet from a file, with weights in memory."""
    network = ControlNet(start.config)
    network.load_state_dict(start.state_dict())
    return network


def write_controlnet(path: Path, network: ControlNet, models: Models) -> None:
    """Write a ControlNet in float16, under the names of the paper's own code. Raises OSError if it cannot be written.

    Queries, keys and values, one matrix here, are three layers there, and the projections around the attention of SD
    1.x are convolutions there.
    """
    state = {}
    for name, tensor in split_qkv(network.state_dict()).items():
        key = rename(name, inverse(RULES + UNET_RULES))
        is_convolution = CONVOLUTIONS_1X1.search(key) and not models.config.text.is_openclip
        state[PREFIX + key] = (tensor[:, :, None, None] if is_convolution else tensor).half().contiguous()
    write_checkpoint(path, state)


def draw_steered(
    models: Models,
    control: ControlNet,
    hints: Tensor,
    prompts: list[str],
    sampler_name: str | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
) -> Tensor:
    """One picture for each of N prompts and images to steer by, (N, 3, H, W) in [0, 1] -> (N, 3, H, W) in [-1, 1].

    Picture i has seed i. The settings are the model's own, unless given.
    """
    with torch.no_grad():
        features = control.hint(hints.to(models.device))
    steered = replace(models, diffusion=Steered(models.diffusion, control, features))
    height, width = hints.shape[2:]
    latents = draw_latents(steered, prompts, sampler_name, steps, cfg_scale, height=height, width=width)
    return decode(models, latents)
