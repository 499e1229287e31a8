"""Measure how well a model follows its prompts. A classifier, the judge, says what each generated image shows.

In: a model, and prompts whose scenes are known. Out: for each attribute, the share of images that show what the prompt
says.

The judge is a small network, trained on renders of all combinations of attributes. It is never trained on generated
images. Its shares on renders, and on renders encoded and decoded by the VAE, are the upper limits for the model.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.checkpoints.files import read_state_dict
from sd.images import from_uint8
from sd.models import Models
from sd.noise import make_generators
from sd.pipeline import decode_latents, denoise, encode_prompt, get_latents
from sd.runtime.devices import device_and_dtype
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer
from sd.training.data import CaptionedImages
from sd.training.loop import load_state
from sd.training.text import CaptionEncoder, ImageEncoder, retrieval, shrink
from sd.training.vae import psnr, reconstruct
from sd.training.world.render import SUNS
from sd.training.world.scenes import ATTRIBUTES, Scene, caption, random_scene

ABSENT = -100  # the target of an attribute that a scene does not have; cross_entropy ignores it
CLASSES = [len(values) for values in ATTRIBUTES.values()]
JUDGE_SEED = 10_000_000  # the first seed of the judge's images: no model trains on these


def targets(scene: Scene) -> list[int]:
    """The classes of a scene: for each of the seven attributes, the index of its value.

    A scene without a thing has no colour and no position: they are ABSENT.
    """
    numbers = [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]
    if scene.thing == "none":
        return [ABSENT if name in ("colour", "position") else n for name, n in zip(ATTRIBUTES, numbers)]
    return numbers


class JudgeStage:
    """The judge, as a stage for the training loop."""

    name = "judge"
    learning_rate = 2e-3
    # Each attribute's loss is a mean over the scenes that have it, and parts of a batch have different numbers of them.
    divisible = False
    ema = 0.99
    batch_size = 64

    def __init__(self, dataset: CaptionedImages, scenes: list[Scene]):
        """`scenes` are those of the images in `dataset`."""
        self.config = {"attributes": {name: list(values) for name, values in ATTRIBUTES.items()}}
        self.small = shrink(dataset)  # uint8 (N, 3, 64, 64)
        self.targets = torch.tensor([targets(scene) for scene in scenes])  # (N, 7)
        self.networks = nn.ModuleDict({"judge": ImageEncoder(sum(CLASSES))})

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random renders with some noise, (B, 3, 64, 64), and their classes, (B, 7)."""
        indices = torch.randint(len(self.small), (self.batch_size,), generator=generator)
        images = from_uint8(self.small[indices])
        level = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)  # generated images are noisier than renders
        return images + level * torch.randn(images.shape, generator=generator), self.targets[indices]

    def loss(self, images: Tensor, wanted: Tensor) -> Tensor:
        logits = self.networks["judge"](images).float().split(CLASSES, dim=1)
        losses = [F.cross_entropy(logit, wanted[:, i], ignore_index=ABSENT) for i, logit in enumerate(logits)]
        return torch.stack(losses).mean()


@torch.no_grad()
def judge_accuracy(judge: ImageEncoder, images: Tensor, wanted: Tensor) -> dict[str, float]:
    """Images (N, 3, H, W) in [-1, 1] and the classes they should show (N, 7) -> for each attribute the share, in 0..1,
    of images in which it is right.

    "mean" is the mean of the seven shares, "all" the share of images in which every attribute is right.
    """
    logits = torch.cat([judge(part) for part in images.split(64)]).split(CLASSES, dim=1)
    seen = torch.stack([logit.argmax(dim=1) for logit in logits], dim=1)  # (N, 7)
    asked = wanted != ABSENT
    right = (seen == wanted) & asked
    shares = {name: (right[:, i].sum() / asked[:, i].sum()).item() for i, name in enumerate(ATTRIBUTES)}
    return shares | {
        "mean": sum(shares.values()) / len(shares),
        "all": (right | ~asked).all(dim=1).float().mean().item(),
    }


def lights_accuracy(images: Tensor, scenes: list[Scene]) -> float:
    """The share of images (N, 3, H, W) in [-1, 1] with the right number of suns or moons: one or none.

    The judge only detects whether there are any: it was never trained on images with two.
    """
    return sum(count_lights(image, scene.time) == scene.light for image, scene in zip(images, scenes)) / len(scenes)


def count_lights(image: Tensor, time: str) -> int:
    """The number of suns, or moons at night, in an image (3, H, W) in [-1, 1]: connected regions of their colour."""
    sky = (image[:, : image.shape[1] * 17 // 32] + 1) * 127.5  # (3, h, W), in 0..255; above water and snow
    alike = (sky - torch.tensor(SUNS[time])[:, None, None]).abs().amax(dim=0) < 22  # (h, W)
    # Each pixel gets a number. Numbers then spread, until all pixels of a region have the largest number in it.
    labels = torch.arange(1.0, alike.numel() + 1).view_as(alike) * alike
    while not torch.equal(labels, grown := F.max_pool2d(labels[None], 3, stride=1, padding=1)[0] * alike):
        labels = grown
    sizes = labels[alike].unique(return_counts=True)[1]
    return int((sizes > image.shape[1] ** 2 / 180).sum())  # a disc is 1/52 of the image, or less behind clouds


def make_prompts(count: int, held_out: bool, seed: int = 0) -> tuple[list[Scene], list[str]]:
    """Random scenes, held-out or not, and for each a prompt that mentions every attribute."""
    rng = random.Random(f"prompts {seed} {held_out}")
    scenes = [random_scene(rng, held_out) for _ in range(count)]
    return scenes, [caption(scene, rng, frozenset(ATTRIBUTES)) for scene in scenes]


def draw_prompts(
    models: Models, prompts: list[str], sampler_name: str, steps: int, cfg_scale: float, deep_cache: int = 1
) -> Tensor:
    """One image for each of N prompts -> (N, 3, H, W) in [-1, 1]. Image i has seed i."""
    images, batch_size = [], 32
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        generators = make_generators(start, len(part))
        sampler = SAMPLERS[sampler_name](generators, schedule=models.config.schedule)
        sampler.set_inference_timesteps(steps)
        context = encode_prompt(models, part)
        latents = get_latents(models, len(part), seed=generators)
        for step in denoise(models, latents, context, sampler, cfg_scale, deep_cache=deep_cache):
            latents = step.latents
        images.append(torch.from_numpy(decode_latents(models, latents)))  # uint8 (B, H, W, 3)
    return from_uint8(torch.cat(images).permute(0, 3, 1, 2))  # (N, 3, H, W)


@torch.no_grad()
def through_the_vae(models: Models, images: Tensor) -> tuple[Tensor, float]:
    """Images (N, 3, H, W) in [-1, 1] -> the same after encoding and decoding, and the mean PSNR in dB."""
    parts = [
        reconstruct(models.encoder, models.decoder, part.to(*device_and_dtype(models.encoder))).float().cpu()
        for part in images.split(16)
    ]
    copies = torch.cat(parts)
    return copies, psnr(images, copies).mean().item()


def interval(share: float, count: int) -> float:
    """Half the width of the 95 % confidence interval of a share observed in `count` images (Wilson 1927)."""
    z = 1.96
    return z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)


def load_judge(path: Path) -> ImageEncoder:
    """Load the judge from a checkpoint file. Raises the errors of `read_state_dict`."""
    judge = ImageEncoder(sum(CLASSES))
    judge.load_state_dict({name: tensor.float() for name, tensor in read_state_dict(path).items()})
    return judge.eval().requires_grad_(False)


def load_encoders(text_state: Path, models: Models) -> nn.ModuleDict | None:
    """Load the two encoders of stage 2 from its state file.

    Returns None if the file does not exist, or if it belongs to another training run than the text encoder of `models`.
    Raises TrainingError if it is damaged.
    """
    if not text_state.exists():
        return None
    state, own = load_state(text_state)["average"], models.clip.position_embedding.weight.cpu()
    # Stage 3 zeroed some token embeddings, so compare the position embeddings. A checkpoint has them in float16.
    if not torch.equal(state["captions.clip.position_embedding.weight"].half().to(own.dtype), own):
        return None
    networks = nn.ModuleDict({"pictures": ImageEncoder(), "captions": CaptionEncoder(models.config.text)}).eval()
    networks.load_state_dict({name: tensor for name, tensor in state.items() if name != "log_scale"})
    return networks


@torch.no_grad()
def second_opinion(encoders: nn.ModuleDict, tokenizer: Tokenizer, images: Tensor, prompts: list[str]) -> float:
    """The share, in 0..1, of N images whose own prompt is the most similar of all N, according to these encoders.

    images (N, 3, H, W) in [-1, 1].
    """
    seen = torch.cat([encoders["pictures"](part) for part in images.split(64)])
    return retrieval(seen, encoders["captions"](tokenizer(prompts)))
