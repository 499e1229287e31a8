"""DreamBooth with LoRA: a model learns one thing from a few pictures, and keeps what it knew (2208.12242, 2106.09685).

The U-Net gets a change of low rank (low_rank.py). Part of each batch are pictures that the model itself drew before, of
other things. Without them, it would soon draw the new thing for every prompt. This is the paper's prior preservation
(2208.12242, eq. 2):

    E |e - e_theta(z_t, t, c)|^2  +  lambda E |e' - e_theta(z'_t, t, c')|^2        z': drawn by the model for prompts c'

In the paper, e' is the noise in z'_t. Here it is what the model predicted there before the training: the mean of that
noise. So this part is zero as long as nothing has changed, and z' may be any latents, also those of the pictures.

In: a finished model, pictures, and captions with the new word. Out: a LoRA, and with it the rows of the word
(inversion.py), in a file that other programs read as well. A rare word of a large model needs no rows: the U-Net learns
what it means. In the tiny model, words that it was not trained on have no meaning at all, so there the rows are learned
together with the LoRA.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sd.checkpoints.files import write_checkpoint
from sd.config import TINY
from sd.models import Models
from sd.noise import add_noise
from sd.samplers.ddim import DDIMSampler
from sd.training.data import CaptionedImages
from sd.training.distillation import drawn_by
from sd.training.inversion import InversionRun, InversionStage, NewThing
from sd.training.latents import Latents
from sd.training.loop import TrainingError
from sd.training.losses import drop_captions
from sd.training.low_rank import low_rank_changes, low_rank_state, wearing
from sd.training.ranks import rank_0_first
from sd.training.text import tokenise
from sd.training.world.scenes import scene_and_captions

WORLD_PROMPTS, OF_KIND = 96, 64  # of the toy world: other things, and those of the kind
KIND_PROMPTS = 100  # of other models
OTHER_PROMPTS = 8  # for each of the pictures
DROPPED = 0.1  # share of empty captions among the rows that are kept as they were


class LoRAStage(InversionStage):
    """The U-Net's LoRA, and the new word if it has rows."""

    name = "lora"

    def __init__(
        self, models: Models, networks: nn.ModuleDict, pictures: Latents, prior: Latents | None, settings: NewThing
    ):
        """networks: the changes of the U-Net under "lora", and the `NewWord` under "word", if it has rows; prior: what
        the model should do as before, `settings.prior` of each batch: lambda is prior / (1 - prior)."""
        super().__init__(models, networks, pictures, settings)
        self.prior, self.kept = prior, kept_rows(settings)
        self.sampler = DDIMSampler(schedule=models.config.schedule)
        self.empty = models.tokenizer([""])  # (1, 77)
        self.unet = wearing(models.diffusion, networks["lora"])

    def _latents(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of the pictures, then those for which the model should stay as it is."""
        latents, tokens = self.pictures.draw(self.batch_size - self.kept, generator)
        if not self.kept:
            return latents, tokens
        others, captions = self.prior.draw(self.kept, generator)
        captions = drop_captions(captions, self.empty, DROPPED, generator)
        return torch.cat([latents, others]), torch.cat([tokens, captions])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: as that of `InversionStage`, and whether a row is of the second kind, (B,)."""
        return *super().draw(generator), torch.arange(self.batch_size) >= self.batch_size - self.kept

    def loss(self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
        """2208.12242, eq. 2, with min-SNR weights. Rows of the second kind, `kept` (B,), get e' in place of the noise,
        and the x_0 that goes with it: x_t stays the same."""
        if kept.any():
            noise, latents = noise.clone(), latents.clone()
            rows = latents[kept], tokens[kept], timesteps[kept], noise[kept]
            latents[kept], noise[kept] = self._as_before(*rows)
        return super().loss(latents, tokens, timesteps, noise)

    @torch.no_grad()
    def _as_before(self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What the model predicts without the LoRA: x_0 and the noise, (B, 4, h, w) each."""
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        x_t = add_noise(latents, noise, alpha_bar)
        context = self.models.clip(tokens)
        output = self.models.diffusion(x_t.to(context.dtype), context, timesteps).float()
        return self.sampler.x0_and_noise(alpha_bar, x_t, output)


def kept_rows(settings: NewThing) -> int:
    """How many rows of a batch have prompts of other things, for which the model should stay as it is."""
    return round(settings.prior * settings.batch_size)


class LoRARun(InversionRun):
    """Teaches a model a new thing in one folder: `train`, then `write`."""

    stage = LoRAStage
    least_vectors = 0

    def _check(self, start: Path) -> None:
        super()._check(start)
        settings = self.settings
        layers = [
            module.weight for module in self.models.diffusion.modules() if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        most = max(min(weight.flatten(1).shape) for weight in layers)
        if not 1 <= settings.rank <= most:
            raise TrainingError(f"--rank should be 1 to {most}, the highest of a layer, not {settings.rank}.")
        if not 0 <= settings.prior < 1:  # false for NaN too
            raise TrainingError(f"--prior should be from 0 to below 1, not {settings.prior:g}.")
        if settings.prior and not 0 < kept_rows(settings) < settings.batch_size:
            raise TrainingError(
                f"--batch should be larger than {settings.batch_size} with --prior {settings.prior:g}: each batch has "
                "some of the pictures, and some that the model drew."
            )
        if kept_rows(settings) and not settings.kind and not _draws_the_toy_world(self.models):
            raise TrainingError("--class should say what kind of thing it is, such as dog: or use --prior 0.")

    def _stage(self) -> LoRAStage:
        pictures = self._pictures()
        prior = self._prior(pictures) if kept_rows(self.settings) else None
        return LoRAStage(self.models, self._networks(), pictures, prior, self.settings)

    def _networks(self) -> nn.ModuleDict:
        networks = super()._networks()
        torch.manual_seed(self.seed)
        networks["lora"] = low_rank_changes(self.models.diffusion, self.settings.rank)
        return networks

    def _prior(self, pictures: Latents) -> Latents:
        """The latents of P drawn images of other things, each with two captions: its prompt and another one. Then those
        of the N pictures, each with `OTHER_PROMPTS` such prompts: (P + N, 4, h, w)."""
        prompts = prior_prompts(self.models, self.settings.kind)
        record = {"run": self.record, "prompts": prompts}
        with rank_0_first():
            latents = drawn_by(self.models, prompts, self.seed, self.out / "drawn.state", record)
        rng = random.Random(self.seed)
        captions = [[own, other] for own, other in zip(prompts, rng.sample(prompts, len(prompts)))]
        captions += [rng.choices(prompts, k=OTHER_PROMPTS) for _ in range(len(pictures))]
        tokens = tokenise(CaptionedImages(np.zeros(0, np.uint8), captions), self.models.tokenizer)
        means, stds = (torch.cat(parts) for parts in ((latents, pictures.means), (0 * latents, pictures.stds)))
        return Latents(means, stds, tokens)

    def _trained(self, average: nn.ModuleDict) -> Models:
        models = super()._trained(average)
        return replace(models, diffusion=wearing(self.models.diffusion, average["lora"]))

    def write(self) -> Path:
        """Write the LoRA with kohya's names, in float16, and the rows of the word as the AUTOMATIC1111 web UI bundles
        them, "bundle_emb.WORD.string_to_param.*" (n, width). Returns the path."""
        average = self._average()
        state = low_rank_state(average["lora"], self.models)
        if "word" in average:
            state[f"bundle_emb.{self.settings.word}.string_to_param.*"] = average["word"].rows.detach().half()
        write_checkpoint(self.path, state)
        return self.path


def prior_prompts(models: Models, kind: str | None) -> list[str]:
    """Prompts of what a model should still draw as before: other things of this kind, and of the toy world also all
    else, in the words of its captions."""
    if not _draws_the_toy_world(models):
        return [f"a {kind}"] * KIND_PROMPTS
    of_kind, others = [], []
    for scene, [caption] in (scene_and_captions(seed, 1, held_out=None) for seed in range(4000)):
        shows_it = scene.things and kind in caption.split()  # not "no house, only mountains"
        (of_kind if shows_it else others).append(caption)
    return of_kind[:OF_KIND] + others[:WORLD_PROMPTS]


def _draws_the_toy_world(models: Models) -> bool:
    return models.config.text == TINY.text
