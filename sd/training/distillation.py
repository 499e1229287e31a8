"""Latent consistency distillation: a U-Net learns from itself to draw in four steps, or in one (2310.04378).

A U-Net predicts the noise in x_t, and a sampler follows this prediction in small steps to an image. A consistency
function jumps: from any x_t on this path, f(x_t, t) is the image at its end. So f must give the same for two
neighbours on one path, and this is what is trained:

    f(x_t, t) = f(x_s, s),    x_s: one guided step of DDIM by the teacher, from x_t to an earlier timestep s

In: a finished model, the teacher; latents and captions. Out: a LoRA, with which the teacher's own U-Net is f. Guidance
is part of what it learns: f needs one pass of the U-Net per step, not two.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd.guidance import classifier_free
from sd.model_loader import TINY_CHECKPOINT, load_models
from sd.models import Models
from sd.noise import add_noise
from sd.runtime.devices import best_device
from sd.runtime.out_of_memory import ADVICE_FOR_TRAINING, explain_out_of_memory
from sd.samplers.lcm import DISTILLED_STEPS, LCMSampler, boundary_scalings
from sd.training.data import CaptionedImages, load_folder
from sd.training.latents import spread_timesteps
from sd.training.loop import Training, TrainingError, load_state, save_atomically
from sd.training.losses import pseudo_huber_loss
from sd.training.low_rank import low_rank_changes, wearing, write_low_rank
from sd.training.ranks import rank_0_first
from sd.training.recompute import recompute_activations
from sd.training.record import check_result, make_folder, make_record
from sd.training.samples import decode, draw_latents
from sd.training.stages import MIN_IMAGES, train_with_bar, write_grid
from sd.training.text import pick_captions, tokenise
from sd.training.vae import encode_all
from sd.training.world.scenes import scene_and_captions

log = logging.getLogger(__name__)

DRAWN_AT_ONCE = 32
RANK = 6  # of the tiny model's LoRA, a file of 1.3 MB


class ConsistencyStage:
    """The LoRA of a consistency function. As target, the function itself is used, without gradient (2310.14189, section
    3.2), not an average of its weights as in the paper: it learns faster."""

    name = "lcm"
    learning_rate = 2e-3
    divisible = True
    ema = 0.95

    def __init__(
        self,
        teacher: Models,
        latents: tuple[Tensor, Tensor],
        tokens: list[Tensor],
        cfg_scale: float,
        batch_size: int = 32,
        rank: int = RANK,
    ):
        """latents: mean and standard deviation of N images, (N, 4, h, w) each; tokens: their captions, as `tokenise`
        returns them; cfg_scale: the teacher's guidance."""
        self.config = {"rank": rank, "cfg_scale": cfg_scale, "batch_size": batch_size}
        self.teacher, self.cfg_scale, self.batch_size = teacher, cfg_scale, batch_size
        self.means, self.stds = latents
        self.tokens = tokens
        self.empty = teacher.tokenizer([""])  # (1, 77)
        self.sampler = LCMSampler(schedule=teacher.config.schedule)
        changes = low_rank_changes(teacher.diffusion, rank)
        self.networks = nn.ModuleDict({"lora": changes})
        self.student = wearing(teacher.diffusion, changes)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: latents (B, 4, h, w), token ids (B, 77), levels (B,) and noise (B, 4, h, w). Level n of 1..50
        is timestep 20 n - 1 of 1000; a batch has them evenly spread, as in stage `diffusion`."""
        indices = torch.randint(len(self.means), (self.batch_size,), generator=generator)
        mean, std = self.means[indices].float(), self.stds[indices].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        tokens = pick_captions(self.tokens, indices, generator).long()
        levels = 1 + spread_timesteps(self.batch_size, DISTILLED_STEPS, generator)
        return latents, tokens, levels, torch.randn(mean.shape, generator=generator)

    def loss(self, latents: Tensor, tokens: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        """2310.04378, algorithm 1: the distance between the student's f(x_t, t) and f(x_s, s), where x_s is
        the teacher's."""
        stride = self.sampler.schedule.num_training_steps // DISTILLED_STEPS
        later = stride * levels - 1
        earlier = (later - stride).clamp(min=0)
        x_t = add_noise(latents, noise, self._alpha_bar(later))
        with torch.no_grad():
            empty = self.empty.to(tokens.device).expand(len(tokens), -1)
            uncond, context = self.teacher.clip(torch.cat([empty, tokens])).chunk(2)  # (B, 77, D) each
        # Before the target: autocast keeps the casts of weights, and in older torch those made without gradients, too.
        predicted = self._end(x_t, context, later)
        with torch.no_grad():
            x_s = self._teacher_step(x_t, torch.cat([uncond, context]), later, earlier)
            target = self._end(x_s, context, earlier)
        return pseudo_huber_loss(predicted, target)

    def _teacher_step(self, x_t: Tensor, context: Tensor, later: Tensor, earlier: Tensor) -> Tensor:
        """One step of DDIM (2010.02502, eq. 12, without noise) with guidance: latents (B, 4, h, w) at timesteps
        `later` -> those at `earlier`. The unconditional half of the context (2B, 77, D) comes first."""
        outputs = self.teacher.diffusion(x_t.repeat(2, 1, 1, 1), context, later.repeat(2))
        output = classifier_free(*outputs.float().chunk(2), self.cfg_scale)
        x_0, e = self.sampler.x0_and_noise(self._alpha_bar(later), x_t, output)
        return add_noise(x_0, e, self._alpha_bar(earlier))

    def _end(self, x_t: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
        """f(x_t, t) of the student: latents (B, 4, h, w), timesteps (B,) -> the ends of their paths (B, 4, h, w)."""
        output = self.student(x_t, context, timesteps).float()
        x_0, _ = self.sampler.x0_and_noise(self._alpha_bar(timesteps), x_t, output)
        c_skip, c_out = boundary_scalings(timesteps[:, None, None, None])
        return c_skip * x_t + c_out * x_0

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        return self.sampler.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None]  # (B, 1, 1, 1)


@torch.no_grad()
def drawn_by(teacher: Models, prompts: list[str], seed: int, path: Path, record: dict) -> Tensor:
    """Latents (N, 4, h, w), float16, of one image for each of N prompts, drawn in half of the model's usual steps.

    They are saved in the file `path` batch by batch; a run that was stopped goes on where it was.
    """
    settings = teacher.config.sampling
    known = load_state(path) if path.exists() else None
    parts = [known["latents"]] if known and known["record"] == record else []
    done = sum(map(len, parts))
    at_once = DRAWN_AT_ONCE if teacher.config.image_size < 256 else 2  # large images need much more memory
    for start in tqdm(range(done, len(prompts), at_once), "the teacher draws", disable=done == len(prompts)):
        texts = prompts[start : start + at_once]
        latents = draw_latents(teacher, texts, steps=max(1, settings.steps // 2), seed=seed + start)
        parts.append(latents.half().cpu())
        save_atomically({"record": record, "latents": torch.cat(parts)}, path)
    return torch.cat(parts)


class DistillationRun:
    """Distils a finished model in one folder: `train`, then `write_lora`."""

    def __init__(
        self,
        out: Path,
        start: Path | None = None,
        folder: Path | None = None,
        prompts: int = 960,
        device: str | None = None,
        seed: int = 0,
        save_every: float = 3,
        batch_size: int = 32,
        accumulate: int = 1,
        recompute: bool = False,
    ):
        """Train in the folder `out`. `start` is the teacher's checkpoint (default: the tiny model).

        It learns on the images in `folder`. Without a folder, the teacher draws one image for each of this number of
        `prompts` of the toy world. They may mention any combination, also those that the teacher never saw: how it
        draws them is what the student learns. `save_every` is in minutes. `batch_size` is that of all
        ranks together. `accumulate` and `recompute` save memory: see `Training` and `recompute_activations`.

        Raises what `load_models` raises for `start`, ValueError if the teacher or the images cannot be used or if `out`
        is the folder of another run, OSError if `out` cannot be written.
        """
        start = start or TINY_CHECKPOINT
        self.out, self.seed, self.save_every = out, seed, save_every
        self.batch_size, self.accumulate, self.recompute = batch_size, accumulate, recompute
        self.teacher = load_models(start, best_device(device), torch.float32, tuned=False)
        _check_teacher(self.teacher, start)
        self.record = make_record(prompts, folder, seed, start, self.teacher)
        if self.record["pictures"] < MIN_IMAGES:
            what = "training images" if folder else "prompts"
            raise TrainingError(f"The number of {what} should be at least {MIN_IMAGES}, not {self.record['pictures']}.")
        make_folder(out, folder, self.record)
        check_result(out / "lcm.safetensors", out / "lcm.state")
        if folder:
            self.images = load_folder(folder, out, self.teacher.config.image_size)
        else:
            captions = [scene_and_captions(number, 1, held_out=None)[1] for number in range(prompts)]
            self.images = CaptionedImages(np.zeros(0, np.uint8), captions)
        self.drawn = folder is None

    @explain_out_of_memory(ADVICE_FOR_TRAINING)
    def train(self, minutes: float, steps: int | None = None) -> None:
        """Train for about `minutes`, or for `steps`; or resume. Raises TrainingError if it cannot start or continue,
        OutOfMemory, OSError if its files cannot be written."""
        teacher = self.teacher
        if self.drawn:
            prompts = [captions[0] for captions in self.images.captions]
            with rank_0_first():
                latents = drawn_by(teacher, prompts, self.seed, self.out / "drawn.state", self.record)
            latents = latents, torch.zeros_like(latents)
        else:
            latents = encode_all(teacher.encoder, self.images, teacher.device, shared=True)
        torch.manual_seed(self.seed)
        tokens = tokenise(self.images, teacher.tokenizer)
        stage = ConsistencyStage(teacher, latents, tokens, teacher.config.sampling.cfg_scale, self.batch_size)
        if self.recompute:
            recompute_activations(stage.student)
        training = Training(stage, self.out, teacher.device, minutes, steps, self.seed, self.record, self.accumulate)
        train_with_bar(training, self.save_every, self._show)

    def _show(self, training: Training) -> str:
        """Write a grid of eight prompts, a row each with 1, 2, 4 and 8 steps. Returns a line for the log."""
        student = replace(self.teacher, diffusion=wearing(self.teacher.diffusion, training.average["lora"]))
        prompts = [captions[0] for captions in self.images.captions[:8]]
        rows = [draw_latents(student, prompts, "lcm", steps, cfg_scale=1) for steps in (1, 2, 4, 8)]
        write_grid(self.out / "lcm.png", torch.cat([decode(student, latents) for latents in rows]))
        return f"lcm, step {training.step}: see {self.out / 'lcm.png'}, with 1, 2, 4 and 8 steps"

    def write_lora(self) -> Path:
        """Write what was trained to `out`/lcm.safetensors, with kohya's names, in float16. Returns the path."""
        state = load_state(self.out / "lcm.state")
        changes = low_rank_changes(self.teacher.diffusion, state["config"]["rank"])
        changes.load_state_dict({key.removeprefix("lora."): tensor for key, tensor in state["average"].items()})
        path = self.out / "lcm.safetensors"
        write_low_rank(path, changes, self.teacher)
        return path


def _check_teacher(teacher: Models, start: Path) -> None:
    """Raise TrainingError unless a model can be distilled."""
    if teacher.config.unet.inpaints:
        raise TrainingError(f"{start} is an inpainting model, which cannot be distilled: choose another --start.")
    if teacher.config.sampling.cfg_scale <= 1:
        raise TrainingError(f"{start} already draws in a few steps, without guidance: choose another --start.")
