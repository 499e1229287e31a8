"""How well does the model do what it is told? A judge looks at its pictures, and counts.

In: a model, and prompts whose scenes are known. Out: for each attribute the share of pictures that show it as asked,
beside the same for true renders and for renders that went through the autoencoder, which no picture can beat.

The judge is a small classifier trained on fresh renders, of all combinations; it never sees a generated picture.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.checkpoints.files import read_state_dict
from sd.models import Models
from sd.noise import make_generators
from sd.pipeline import decode_latents, denoise, encode_prompt, get_latents
from sd.runtime.devices import device_and_dtype
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer
from sd.training.data import Pictures
from sd.training.loop import load_state
from sd.training.text import CaptionEncoder, PictureEncoder, retrieval, shrink
from sd.training.vae import psnr, reconstruct
from sd.training.world.render import SUNS
from sd.training.world.scenes import ATTRIBUTES, Scene, caption, random_scene

ABSENT = -100  # the target of an attribute that a scene does not have; cross_entropy passes over it
CLASSES = [len(values) for values in ATTRIBUTES.values()]
JUDGE_SEED = 10_000_000  # the judge's pictures are of seeds that no model trains on


def targets(scene: Scene) -> list[int]:
    """The number of each attribute's value: seven integers. An empty scene has no colour and no position."""
    numbers = [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]
    if scene.thing == "none":
        return [ABSENT if name in ("colour", "position") else n for name, n in zip(ATTRIBUTES, numbers)]
    return numbers


class JudgeStage:
    """Training of the judge, for the same loop as the model's own stages."""

    name = "judge"
    learning_rate = 2e-3
    divisible = False  # each attribute is averaged over the scenes that have it, and parts have unlike many
    ema = 0.99
    batch_size = 64

    def __init__(self, pictures: Pictures, scenes: list[Scene]):
        self.config = {"attributes": {name: list(values) for name, values in ATTRIBUTES.items()}}
        self.small = shrink(pictures)  # uint8 (N, 3, 64, 64)
        self.targets = torch.tensor([targets(scene) for scene in scenes])  # (N, 7)
        self.networks = nn.ModuleDict({"judge": PictureEncoder(sum(CLASSES))})

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        indices = torch.randint(len(self.small), (self.batch_size,), generator=generator)
        images = self.small[indices].float() / 127.5 - 1
        noise = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)  # renders are cleaner than pictures judged
        return images + noise * torch.randn(images.shape, generator=generator), self.targets[indices]

    def loss(self, images: Tensor, wanted: Tensor) -> Tensor:
        logits = self.networks["judge"](images).float().split(CLASSES, dim=1)
        losses = [F.cross_entropy(logit, wanted[:, i], ignore_index=ABSENT) for i, logit in enumerate(logits)]
        return torch.stack(losses).mean()


@torch.no_grad()
def judge_accuracy(judge: PictureEncoder, images: Tensor, wanted: Tensor) -> dict[str, float]:
    """Pictures (N, 3, H, W) in [-1, 1] and what they should show (N, 7) -> a share in 0..1 for each attribute.

    "mean" is the mean of the seven, "all" the share of pictures in which everything is right.
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
    """The share of pictures (N, 3, H, W) in [-1, 1] with as many suns or moons as asked for: one, or none.

    The judge cannot say: it was never shown two.
    """
    return sum(count_lights(image, scene.time) == scene.light for image, scene in zip(images, scenes)) / len(scenes)


def count_lights(image: Tensor, time: str) -> int:
    """How many suns, or moons at night, stand in a picture (3, H, W) in [-1, 1]: connected spots of their colour."""
    sky = (image[:, : image.shape[1] * 17 // 32] + 1) * 127.5  # (3, h, W), above water and snow
    alike = (sky - torch.tensor(SUNS[time])[:, None, None]).abs().amax(dim=0) < 22  # (h, W), of 255 levels
    labels = torch.arange(1.0, alike.numel() + 1).view_as(alike) * alike
    while not torch.equal(labels, grown := F.max_pool2d(labels[None], 3, stride=1, padding=1)[0] * alike):
        labels = grown  # until each spot bears the largest number in it
    sizes = labels[alike].unique(return_counts=True)[1]
    return int((sizes > image.shape[1] ** 2 / 180).sum())  # a disc is 1/52 of the picture, with clouds before it less


def make_prompts(count: int, held_out: bool, seed: int = 0) -> tuple[list[Scene], list[str]]:
    """Scenes by chance, and for each a prompt that mentions everything."""
    rng = random.Random(f"prompts {seed} {held_out}")
    scenes = [random_scene(rng, held_out) for _ in range(count)]
    return scenes, [caption(scene, rng, frozenset(ATTRIBUTES)) for scene in scenes]


def draw_prompts(
    models: Models, prompts: list[str], sampler_name: str, steps: int, cfg_scale: float, deep_cache: int = 1
) -> Tensor:
    """One picture for each of N prompts -> (N, 3, H, W) in [-1, 1]. Picture i has seed i."""
    pictures, batch = [], 32
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = make_generators(start, len(part))
        sampler = SAMPLERS[sampler_name](generators, schedule=models.config.schedule)
        sampler.set_inference_timesteps(steps)
        context = encode_prompt(models, part)
        latents = get_latents(models, len(part), seed=generators)
        for step in denoise(models, latents, context, sampler, cfg_scale, deep_cache=deep_cache):
            latents = step.latents
        pictures.append(torch.from_numpy(decode_latents(models, latents)))
    return torch.cat(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def through_the_vae(models: Models, images: Tensor) -> tuple[Tensor, float]:
    """Pictures (N, 3, H, W) -> the same after encoding and decoding, and the mean PSNR in dB."""
    parts = [
        reconstruct(models.encoder, models.decoder, part.to(*device_and_dtype(models.encoder))).float().cpu()
        for part in images.split(16)
    ]
    copies = torch.cat(parts)
    return copies, psnr(images, copies).mean().item()


def interval(share: float, count: int) -> float:
    """Half the width of the 95 % interval of a share observed in `count` pictures (Wilson 1927)."""
    z = 1.96
    return z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)


def load_judge(path: Path) -> PictureEncoder:
    """The judge whose weights are in a checkpoint file. Raises what `read_state_dict` raises."""
    judge = PictureEncoder(sum(CLASSES))
    judge.load_state_dict({name: tensor.float() for name, tensor in read_state_dict(path).items()})
    return judge.eval().requires_grad_(False)


def load_encoders(text_state: Path, models: Models) -> nn.ModuleDict | None:
    """The contrastive encoders of stage 2, if they are those with which the text encoder of `models` was trained.

    None if there is no such file, or if it holds another training's. Raises TrainingError if it is damaged.
    """
    if not text_state.exists():
        return None
    state, own = load_state(text_state)["average"], models.clip.position_embedding.weight.cpu()
    # Its token embeddings were changed since; these were only rounded, to the 16 bits of the checkpoint.
    if not torch.equal(state["captions.clip.position_embedding.weight"].half().to(own.dtype), own):
        return None
    networks = nn.ModuleDict({"pictures": PictureEncoder(), "captions": CaptionEncoder(models.config.text)}).eval()
    networks.load_state_dict({name: tensor for name, tensor in state.items() if name != "log_scale"})
    return networks


@torch.no_grad()
def second_opinion(encoders: nn.ModuleDict, tokenizer: Tokenizer, pictures: Tensor, prompts: list[str]) -> float:
    """How often a picture's own prompt is the likeliest of all N, in the eyes of these encoders.

    pictures (N, 3, H, W) in [-1, 1] -> a share in 0..1.
    """
    seen = torch.cat([encoders["pictures"](part) for part in pictures.split(64)])
    return retrieval(seen, encoders["captions"](tokenizer(prompts)))
