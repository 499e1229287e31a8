"""ControlNet: a copy of the U-Net's way down learns to steer it by an image (2302.05543).

    y = F(x; W) + Z(F(x + Z(c; W_z1); W_c); W_z2)        (eq. 2)

W are the U-Net's weights, which stay as they are. W_c begin as a copy of them, and the convolutions Z with zeros: at
the start, the image c changes nothing. The loss is that of the U-Net itself (eq. 5). A third of the captions are empty
in training, so that the ControlNet learns to read the image where the caption does not help (section 3.4: half).

In: a finished model, pictures with captions, and an image for each of them, such as its outline. Out: a file that any
program reads which knows ControlNets. How such a file is read and used: `sd.adapters`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd.adapters.controlnet import HINT_SCALE, ControlNet
from sd.adapters.controlnet_files import PREFIX, RULES, load_controlnet
from sd.checkpoints.files import write_checkpoint
from sd.checkpoints.key_rules import inverse, rename
from sd.diffusion import Diffusion
from sd.images import from_uint8, image_to_tensor, read_image, to_uint8
from sd.model_converter import CONVOLUTIONS_1X1, UNET_RULES, split_qkv
from sd.model_loader import TINY_CHECKPOINT, load_models
from sd.models import Models
from sd.noise import make_betas, make_generators
from sd.pipeline import decode_latents, denoise, encode_prompt, get_latents
from sd.runtime.devices import best_device
from sd.samplers import SAMPLERS
from sd.training.captions import DataError, read_captions
from sd.training.data import CaptionedImages, load_folder, load_scenes
from sd.training.loop import Training, TrainingError, load_state, save_atomically
from sd.training.losses import diffusion_loss, drop_captions
from sd.training.outlines import agreement, outlines, scribbles
from sd.training.record import make_folder, make_record
from sd.training.stages import MIN_IMAGES, train_with_bar, write_grid
from sd.training.text import pick_captions, tokenise
from sd.training.vae import encode_all
from sd.training.world.scenes import scene_and_captions

log = logging.getLogger(__name__)

KINDS = ("outlines", "scribbles")
OUTLINED = 1 / 2  # share of plain outlines among scribbles, so that a ControlNet follows both
DROPPED = 1 / 3  # share of empty captions
HELD_BACK = 16  # pictures that are not trained on: their images are shown with what is drawn from them

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
        # Evenly spread, as in stage `diffusion`, but most of them early in the run, where the layout is decided
        # (2302.08453, section 3.4).
        spread = (torch.rand(1, generator=generator) + torch.arange(self.batch_size) / self.batch_size) % 1
        timesteps = ((1 - spread**2) * (self.schedule.num_training_steps - 1)).long()  # (B,)
        hints = self.hints(indices, generator)
        return latents, tokens, hints, timesteps, torch.randn(mean.shape, generator=generator)

    def loss(self, latents: Tensor, tokens: Tensor, hints: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """2302.05543, eq. 5: the error of the noise that the steered U-Net predicts."""
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


class ControlRun:
    """Trains a ControlNet for a finished model in one folder: `train`, then `write`."""

    def __init__(
        self,
        out: Path,
        checkpoint: Path | None = None,
        kind: str = "outlines",
        pictures: Path | None = None,
        control_images: Path | None = None,
        scenes: int = 3000,
        start: Path | None = None,
        batch_size: int = 8,
        device: str | None = None,
        seed: int = 0,
        save_every: float = 3,
    ):
        """Train in the folder `out`, for the model in `checkpoint` (default: the tiny model).

        It learns from the captioned `pictures` in a folder, or else from this number of `scenes` of the toy world.
        `control_images` is a folder with an image of the same name for each picture; any kind of image that is the same
        for what is alike in the pictures, such as edges, poses or depths. Without it, outlines or scribbles are made,
        as `kind` says. `start` is a ControlNet to train further. `save_every` is in minutes.

        Raises what `load_models` and `load_controlnet` raise, ValueError if the model or the images cannot be used or
        if `out` is the folder of another run, OSError if `out` cannot be written.
        """
        checkpoint = checkpoint or TINY_CHECKPOINT
        self.out, self.seed, self.save_every, self.batch_size = out, seed, save_every, batch_size
        self.kind, self.given = kind, None
        if control_images and not pictures:
            raise TrainingError("--control-images should be given with --pictures, the folder of what they belong to.")
        self.models = load_models(checkpoint, best_device(device), torch.float32, tuned=False)
        _check_model(self.models, checkpoint)
        self.start = start and load_controlnet(start, self.models)
        if self.start and (self.start.global_pool or self.start.inpaints):
            raise TrainingError(f"{start} is a ControlNet of the kind shuffle or inpaint, which is not trained here.")
        size = self.models.config.image_size
        self.record = make_record(scenes, pictures, seed, checkpoint, self.models)
        if self.record["pictures"] < MIN_IMAGES:
            what = "pictures" if pictures else "scenes"
            raise TrainingError(f"The number of {what} should be at least {MIN_IMAGES}, not {self.record['pictures']}.")
        if control_images:
            self.given = read_control_images(control_images, pictures, size)
            if (self.given == self.given[:, :, :1, :1]).all():
                raise TrainingError("The control images should have something in them, but each is of one colour.")
        self._describe(control_images)
        make_folder(out, pictures, self.record)
        self.images = load_folder(pictures, out, size) if pictures else scenes_of_one_thing(out, scenes, size)

    def _describe(self, control_images: Path | None) -> None:
        """Add to the record what the ControlNet is steered by, and what it starts from."""
        digest = hashlib.sha256(f"{self.record['sha256']} {self.batch_size}".encode())
        if self.given is None:
            self.record["about"] += f", with {self.kind}"
            digest.update(self.kind.encode())
        else:
            self.record["about"] += f", with the images of {control_images}"
            digest.update(self.given.numpy())
        if self.start:
            self.record["about"] += f", from {self.start.source}"
            for tensor in self.start.state_dict().values():
                digest.update(tensor.float().cpu().contiguous().numpy())
        self.record["sha256"] = digest.hexdigest()

    def train(self, minutes: float, steps: int | None = None) -> None:
        """Train for about `minutes`, or for `steps`; or resume. Raises TrainingError if it cannot start or continue,
        OSError if its files cannot be written."""
        if self.given is None:
            self.lines = self._outlines()
        latents = self._latents()
        self.held_back = min(HELD_BACK, -(-len(self.images) // 10))
        count = len(self.images) - self.held_back
        tokens = tokenise(self.images, self.models.tokenizer)[:count]
        latents = tuple(part[:count] for part in latents)
        torch.manual_seed(self.seed)
        stage = ControlStage(self.models, latents, tokens, self._hints, self.start, self.batch_size)
        training = Training(stage, self.out, self.models.device, minutes, steps, self.seed, self.record)
        if training.done:
            log.info("Stage %s is finished, after %d steps.", stage.name, training.step)
        train_with_bar(training, self.save_every, self._show)

    def _outlines(self) -> Tensor:
        """The outlines of all pictures: bool (N, 1, H, W). Raises TrainingError if none of them has any."""
        batches = tqdm(torch.arange(len(self.images)).split(32), "finding outlines", leave=False)
        lines = torch.cat([outlines(self.images.batch(part)).bool() for part in batches])
        if not lines.any():
            raise TrainingError("The pictures should have outlines, but each is of one colour.")
        return lines

    def _hints(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of pictures (B,) -> the images to steer by, (B, 3, H, W) in [0, 1]."""
        if self.given is not None:
            return self.given[indices].float() / 255
        lines = self.lines[indices].float()  # (B, 1, H, W)
        if self.kind == "scribbles":
            plain = torch.rand(len(lines), 1, 1, 1, generator=generator) < OUTLINED
            lines = torch.where(plain, lines, scribbles(lines, generator))
        return lines.expand(-1, 3, -1, -1)

    def _latents(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of all pictures, saved for the next time."""
        path = self.out / "latents.state"
        if path.exists() and (known := load_state(path))["record"] == self.record:
            return known["means"], known["stds"]
        means, stds = encode_all(self.models.encoder, self.images, self.models.device)
        save_atomically({"record": self.record, "means": means, "stds": stds}, path)
        return means, stds

    def _show(self, training: Training) -> str:
        """Write a grid: images of pictures that were held back, and below each what is drawn from it with the caption.
        Returns a line for the log."""
        indices = torch.arange(len(self.images))[-self.held_back :][:8]
        hints = self._hints(indices, torch.Generator().manual_seed(0))
        prompts = [self.images.captions[i][0] for i in indices.tolist()]
        drawn = draw_steered(self.models, training.average["control"], hints, prompts)
        write_grid(self.out / "control.png", torch.cat([2 * hints - 1, drawn]), columns=len(indices))
        line = f"control, step {training.step}: see {self.out / 'control.png'}"
        if self.given is None:
            share, _ = agreement(hints[:, :1], outlines(drawn), within=2)
            line += f"; {share:.0%} of the lines are within 2 pixels of an edge of the picture"
        return line

    def write(self) -> Path:
        """Write what was trained to `out`/control.safetensors. Returns the path."""
        network = ControlNet(self.models.config.unet)
        average = load_state(self.out / "control.state")["average"]
        network.load_state_dict({key.removeprefix("control."): tensor for key, tensor in average.items()})
        path = self.out / "control.safetensors"
        write_controlnet(path, network, self.models)
        return path


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
    settings = models.config.sampling
    generators = make_generators(0, len(prompts))
    sampler = SAMPLERS[sampler_name or settings.sampler](generators, schedule=models.config.schedule)
    sampler.set_inference_timesteps(steps or settings.steps)
    latents = get_latents(models, len(prompts), *hints.shape[2:], seed=generators)
    context = encode_prompt(models, prompts, plain=True)
    with torch.no_grad():
        features = control.hint(hints.to(models.device))
    steered = replace(models, diffusion=Steered(models.diffusion, control, features))
    for step in denoise(steered, latents, context, sampler, cfg_scale):
        latents = step.latents
    return from_uint8(torch.from_numpy(decode_latents(models, latents)).permute(0, 3, 1, 2))


def scenes_of_one_thing(cache: Path, count: int, size: int) -> CaptionedImages:
    """Those of `load_scenes` with one thing or none: the tiny model in data/ cannot draw two, along no lines."""
    images = load_scenes(cache, count, size)
    chosen = [seed for seed in range(count) if len(scene_and_captions(seed, 0)[0].things) < 2]
    return CaptionedImages(images.pixels[chosen], [images.captions[seed] for seed in chosen])


def read_control_images(folder: Path, pictures: Path, size: int) -> Tensor:
    """The control image of each captioned picture, cropped and resized as the pictures are: uint8 (N, 3, size, size).

    A control image has its picture's name; its suffix may be another. Raises DataError for one that is missing, cannot
    be read or has another shape than its picture.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: choose one with a control image for each picture.")
    by_stem = {path.stem: path for path in sorted(folder.iterdir()) if path.is_file()}
    images = []
    for name in read_captions(pictures):
        path = folder / name if (folder / name).is_file() else by_stem.get(Path(name).stem)
        if path is None:
            raise DataError(f"There is no control image for {pictures / name}: {folder} should have one of its name.")
        try:
            image, shape = read_image(path, behind="black"), read_image(pictures / name).size
        except (ValueError, OSError) as error:
            raise DataError(str(error)) from error
        if abs(image.width * shape[1] - image.height * shape[0]) > 0.02 * image.width * shape[1]:
            width, height = shape
            raise DataError(
                f"{path} should have the shape of its picture, {width} x {height} pixels or as many times that, not "
                f"{image.width} x {image.height}."
            )
        images.append(to_uint8(image_to_tensor(image, size, size)))
    return torch.cat(images)


def _check_model(models: Models, checkpoint: Path) -> None:
    """Raise TrainingError unless a ControlNet can be trained for a model."""
    if models.config.unet.inpaints:
        raise TrainingError(f"{checkpoint} is an inpainting model: train on the one that it was made from.")
    if models.config.sampling.cfg_scale <= 1:
        raise TrainingError(f"{checkpoint} draws in a few steps: train on the model that it was made from.")
    if models.config.vae.downscale != HINT_SCALE:
        raise TrainingError(
            f"The autoencoder of {checkpoint} should have {HINT_SCALE} pixels to a latent, not "
            f"{models.config.vae.downscale}."
        )
