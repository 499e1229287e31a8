"""Full fine-tuning: the U-Net of a finished model is trained further, all of it, on your own captioned pictures.

The loss is that of stage `diffusion`, E || e - e_theta(x_t, t, c) ||^2 with min-SNR weights (losses.py). What people
add to it is here, too: noise with an offset, mirrored pictures, batches of many shapes (buckets.py), and the change to
a U-Net that predicts v, on a schedule that ends in noise alone (2305.08891).

In: a finished model; pictures and captions. Out: a checkpoint of the same kind, in float16, with the moving average of
the weights. The text encoder and the autoencoder are not changed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sd.checkpoints.files import write_checkpoint
from sd.checkpoints.self_description import V_PREDICTION, ZERO_SNR
from sd.config import PREDICTION_TYPES, ModelConfig, ScheduleConfig
from sd.model_converter import to_compvis
from sd.model_loader import TINY_CHECKPOINT, load_models
from sd.models import Models
from sd.noise import make_betas
from sd.runtime.devices import best_device
from sd.runtime.out_of_memory import ADVICE_FOR_TRAINING, explain_out_of_memory
from sd.training import ranks
from sd.training.buckets import PicturesOfOneShape, shapes_of_model, sort_into_buckets
from sd.training.captions import read_captions
from sd.training.data import CaptionedImages, note_left_out
from sd.training.latents import Latents, spread_timesteps
from sd.training.loop import (
    Training,
    TrainingError,
    check_division,
    check_sharding,
    has_state,
    load_state,
    save_atomically,
)
from sd.training.losses import diffusion_loss, drop_captions, offset_noise
from sd.training.precision import mixed_precision
from sd.training.recompute import recompute_activations
from sd.training.record import check_result, make_folder, make_record
from sd.training.samples import decode, draw_latents
from sd.training.stages import MIN_IMAGES, train_with_bar, write_grid
from sd.training.text import tokenise
from sd.training.vae import encode_all

log = logging.getLogger(__name__)

MIN_SNR = 5.0
OPTIMIZERS = ("adamw", "adamw8bit")
DROPPED = 0.1  # share of empty captions, for classifier-free guidance
SHOWN = 4
# Bytes for each weight of the U-Net, in float32: the weight, its gradient and its average, and AdamW's two averages.
BYTES_PER_WEIGHT = {"adamw": 4 + 4 + 4 + 8, "adamw8bit": 4 + 4 + 4 + 2}


@dataclass(frozen=True)
class FineTuning:
    """The settings of a run. None stands for what suits the model (`suited_to`)."""

    learning_rate: float | None = None  # 5e-4 for models as small as the tiny one, 1e-5 for others
    batch_size: int | None = None  # 16 and 4
    ema: float = 0.999  # the decay of the moving average of the weights, from 0 (no average) to below 1
    min_snr: float | None = None  # gamma of 2303.09556, or 0 for no weights; 5, but 0 with zero_snr
    offset_noise: float = 0.0  # how strong it is (`losses.offset_noise`)
    flip: bool = False  # whether half of the pictures are mirrored
    buckets: bool = False  # whether pictures keep about their shape, or are cropped to squares
    prediction_type: str | None = None  # one of PREDICTION_TYPES; that of the model
    zero_snr: bool = False  # whether the noise schedule is changed to end in noise alone (2305.08891)
    optimizer: str = "adamw"  # or "adamw8bit", from the package bitsandbytes

    def suited_to(self, config: ModelConfig) -> FineTuning:
        """The same settings without None."""
        small = config.image_size < 256
        zero_snr = self.zero_snr or config.schedule.rescale_betas_zero_snr
        min_snr = self.min_snr
        if min_snr is None:
            min_snr = 0.0 if zero_snr else MIN_SNR
        return replace(
            self,
            learning_rate=self.learning_rate or (5e-4 if small else 1e-5),
            batch_size=self.batch_size or (16 if small else 4),
            min_snr=min_snr,
            prediction_type=self.prediction_type or config.schedule.prediction_type,
            zero_snr=zero_snr,
        )

    def check(self) -> None:
        """Raises TrainingError, with the name of a flag, for settings that are invalid or do not fit together, and
        ImportError if the optimizer's package is missing."""
        for name in ("learning_rate", "batch_size"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:  # false for NaN too
                raise TrainingError(f"{_flag(name)} should be a number above 0, not {value:g}.")
        for name in ("min_snr", "offset_noise"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise TrainingError(f"{_flag(name)} should be a number from 0 on, not {value:g}.")
        if not 0 <= self.ema < 1:
            raise TrainingError(f"--ema should be from 0 to below 1, not {self.ema:g}.")
        for name, known in {"prediction_type": (None, *PREDICTION_TYPES), "optimizer": OPTIMIZERS}.items():
            if getattr(self, name) not in known:
                raise TrainingError(f"{_flag(name)} should be {' or '.join(known[-2:])}, not {getattr(self, name)}.")
        if self.zero_snr and self.prediction_type == "epsilon":
            raise TrainingError(
                "--zero-snr should be used with --prediction-type v_prediction: in noise alone, predicting the noise "
                "teaches nothing."
            )
        if self.zero_snr and self.min_snr:
            raise TrainingError(
                "--min-snr should be 0 with --zero-snr: otherwise, the weight of the last timestep would be 0."
            )
        if self.optimizer == "adamw8bit":
            eight_bit_adamw()

    def schedule(self, schedule: ScheduleConfig) -> ScheduleConfig:
        """The noise schedule that is trained on, and that the checkpoint gets."""
        return replace(schedule, prediction_type=self.prediction_type, rescale_betas_zero_snr=self.zero_snr)


class FineTuningStage:
    """All weights of the U-Net."""

    name = "full"
    divisible = True

    def __init__(self, models: Models, pictures: list[Latents], settings: FineTuning):
        """models: with the schedule that is trained on; their U-Net is changed. pictures: those of each bucket;
        settings: without None."""
        unet = models.config.unet
        self.config = {"channels": list(unet.channels), "heads": unet.heads, "groups": unet.groups} | asdict(settings)
        self.models, self.pictures, self.settings = models, pictures, settings
        self.learning_rate, self.batch_size, self.ema = settings.learning_rate, settings.batch_size, settings.ema
        self.empty = models.tokenizer([""])  # (1, 77)
        self.alphas_cumprod = torch.cumprod(1 - make_betas(models.config.schedule), 0).to(models.device)
        self.networks = nn.ModuleDict({"diffusion": models.diffusion.requires_grad_(True)})

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW (1711.05101) for all weights. Unlike Muon, it treats each number alone: it can be sharded, or kept in
        8 bits (2110.02861). Raises ImportError if bitsandbytes is needed and missing."""
        kind = eight_bit_adamw() if self.settings.optimizer == "adamw8bit" else torch.optim.AdamW
        return [kind(self.networks.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.01)]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: latents (B, 4, h, w), token ids (B, 77), timesteps (B,) and noise (B, 4, h, w).

        All are of one bucket. It is chosen as often as it has pictures, so that all pictures are equally likely.
        """
        sizes = torch.tensor([float(len(bucket)) for bucket in self.pictures])
        bucket = self.pictures[torch.multinomial(sizes, 1, generator=generator).item()]
        latents, tokens = bucket.draw(self.batch_size, generator)
        tokens = drop_captions(tokens, self.empty, DROPPED, generator)
        total = self.models.config.schedule.num_training_steps
        timesteps = spread_timesteps(self.batch_size, total, generator)
        noise = torch.randn(latents.shape, generator=generator)
        return latents, tokens, timesteps, offset_noise(noise, self.settings.offset_noise, generator)

    def loss(self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The error of what the U-Net predicts, with the weights and the target of the settings."""
        with torch.no_grad():
            context = self.models.clip(tokens)  # (B, 77, D)
        unet, settings = self.networks["diffusion"], self.settings
        min_snr = settings.min_snr or None
        return diffusion_loss(
            unet, latents, context, timesteps, noise, self.alphas_cumprod, settings.prediction_type, min_snr
        )


def eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW, which keeps its averages in 8 bits. Raises ImportError if it is missing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ImportError(
            "--optimizer adamw8bit needs the package bitsandbytes: `pip install bitsandbytes`, or choose adamw."
        ) from None
    return AdamW8bit


class FineTuningRun:
    """Trains a finished model further in one folder: `train`, then `write_checkpoint`."""

    def __init__(
        self,
        out: Path,
        folder: Path,
        start: Path | None = None,
        settings: FineTuning | None = None,
        device: str | None = None,
        seed: int = 0,
        save_every: float = 3,
        accumulate: int = 1,
        recompute: bool = False,
        sharded: bool = False,
    ):
        """Train the model `start` (default: the tiny model) on the pictures in `folder`, with all files in the folder
        `out`. `save_every` is in minutes. `accumulate`, `recompute` and `sharded` save memory: see `Training` and
        `recompute_activations`.

        Raises what `load_models` raises for `start`, ValueError if the model, the pictures or the settings cannot be
        used or if `out` is the folder of another run, ImportError if an optional package is missing, OSError if `out`
        cannot be written.
        """
        settings, start = settings or FineTuning(), start or TINY_CHECKPOINT
        settings.check()
        if sharded and settings.optimizer != "adamw":
            raise TrainingError(f"--optimizer should be adamw with --sharded, not {settings.optimizer}.")
        self.accumulate, self.recompute, self.sharded = accumulate, recompute, sharded
        self.out, self.folder, self.seed, self.save_every = out, folder, seed, save_every
        self.captions = read_captions(folder)
        if len(self.captions) < MIN_IMAGES:
            raise TrainingError(
                f"The number of training images should be at least {MIN_IMAGES}, not {len(self.captions)}: for a few "
                "pictures of one thing, train a LoRA."
            )
        check_result(self.path, self._state)
        models = load_models(start, best_device(device), torch.float32, tuned=False)
        _check_model(models.config, start)
        self.settings = settings.suited_to(models.config)
        self.settings.check()  # again: some depend on the model
        _check_memory(models, self.settings.optimizer, ranks.count() if sharded else 1)
        schedule = self.settings.schedule(models.config.schedule)
        self.models = replace(models, config=replace(models.config, schedule=schedule))
        self.stage = FineTuningStage(self.models, [], self.settings)
        check_division(self.stage, accumulate)
        if sharded:
            check_sharding(self.stage)
        self.record = make_record(0, folder, seed, start, models)
        self._check_settings()
        make_folder(out, folder, self.record)

    @property
    def path(self) -> Path:
        """The checkpoint that `write_checkpoint` writes."""
        return self.out / "full.safetensors"

    @property
    def _state(self) -> Path:
        return self.out / "full.state"

    def _check_settings(self) -> None:
        """Raise TrainingError if `out` has a run with other settings."""
        known = load_state(self._state, mapped=True).get("config", {}) if has_state(self._state) else {}
        for name, value in asdict(self.settings).items():
            if name in known and known[name] != value:
                raise TrainingError(
                    f"{_flag(name)} should be {_said(known[name])}, as in the run in {self.out}, not {_said(value)}: "
                    "or choose another --out."
                )

    @explain_out_of_memory(f"{ADVICE_FOR_TRAINING}, or --optimizer adamw8bit, or train a LoRA")
    def train(self, minutes: float, steps: int | None = None) -> None:
        """Train for about `minutes`, or for `steps`; or resume. Raises TrainingError if it cannot start or continue,
        OutOfMemory, OSError if its files cannot be written."""
        stage = self.stage
        stage.pictures = self._pictures()
        if self.recompute:
            recompute_activations(stage.networks)
        training = Training(
            stage,
            self.out,
            self.models.device,
            minutes,
            steps,
            self.seed,
            self.record,
            self.accumulate,
            self.sharded,
        )
        train_with_bar(training, self.save_every, self._show)
        self.trained = training.average["diffusion"]

    def _pictures(self) -> list[Latents]:
        """The encoded pictures of each bucket, saved for the next time. Mirrored ones are further pictures."""
        path, settings = self.out / "latents.state", [self.settings.buckets, self.settings.flip]
        known = load_state(path) if path.exists() else {}
        if (known.get("record"), known.get("settings")) != (self.record, settings):
            known = {"record": self.record, "settings": settings, "buckets": self._encode()}
            if ranks.rank() == 0:
                save_atomically(known, path)
        captions = CaptionedImages(np.zeros(0, np.uint8), list(self.captions.values()))
        tokens = dict(zip(self.captions, tokenise(captions, self.models.tokenizer)))
        return [
            Latents(bucket["means"], bucket["stds"], [tokens[name] for name in bucket["names"]])
            for bucket in known["buckets"]
        ]

    def _encode(self) -> list[dict]:
        note_left_out(self.folder)
        config = self.models.config
        square = (config.image_size, config.image_size)
        shapes = shapes_of_model(config.image_size, config.vae.downscale) if self.settings.buckets else [square]
        buckets = []
        for shape, names in sort_into_buckets(self.folder, list(self.captions), shapes).items():
            flips = (False, True) if self.settings.flip else (False,)
            sets = [PicturesOfOneShape(self.folder, names, shape, mirrored) for mirrored in flips]
            moments = [encode_all(self.models.encoder, pictures, self.models.device, shared=True) for pictures in sets]
            means, stds = (torch.cat(each) for each in zip(*moments))  # (N, 4, h, w), or 2N
            buckets.append({"names": names * len(flips), "means": means, "stds": stds})
        return buckets

    def _show(self, training: Training) -> str:
        """Write a grid of images for the captions of some training images. Returns a line for the log."""
        models = replace(self.models, diffusion=training.average["diffusion"].eval())
        prompts = [max(captions, key=len) for captions in list(self.captions.values())[:SHOWN]]
        with mixed_precision(models.device):
            # Only one at a time, because most of the memory is in use.
            latents = [draw_latents(models, [prompt], seed=seed) for seed, prompt in enumerate(prompts)]
            images = [decode(models, one) for one in latents]
        write_grid(self.out / "full.png", torch.cat(images), columns=SHOWN)
        lines = "".join(f"{' '.join(prompt.split())}\n" for prompt in prompts)
        (self.out / "full.txt").write_text(lines, encoding="utf-8")
        return f"full, step {training.step}: see {self.out / 'full.png'}"

    def write_checkpoint(self) -> Path:
        """Write the model with the average of the weights that `train` trained to `path`, in float16. Returns the path.

        The file has the layout of the published Stable Diffusion checkpoints, and marks that tell other programs what
        the U-Net predicts (`sd.checkpoints.self_description`).
        """
        tensors = to_compvis(replace(self.models, diffusion=self.trained))
        state = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
        schedule = self.models.config.schedule
        marks = {V_PREDICTION: schedule.prediction_type == "v_prediction", ZERO_SNR: schedule.rescale_betas_zero_snr}
        state |= {mark: torch.zeros(0) for mark, fits in marks.items() if fits}
        write_checkpoint(self.path, state, self.models.config.to_dict())
        return self.path


def _check_model(config: ModelConfig, start: Path) -> None:
    """Raise TrainingError unless a model of this kind can be trained further with this loss."""
    if config.unet.inpaints:
        raise TrainingError(
            f"{start} is an inpainting model, which cannot be trained further: choose another --checkpoint."
        )
    if config.unet.guidance_width is not None or config.sampling.cfg_scale <= 1:
        raise TrainingError(
            f"{start} draws in a few steps, which this training would undo: choose the --checkpoint that it was "
            "distilled from."
        )


def _check_memory(models: Models, optimizer: str, parts: int = 1) -> None:
    """Raise TrainingError if a GPU of CUDA cannot even hold what training needs without any picture. `parts`: among how
    many the weights are divided."""
    if models.device.type != "cuda":
        return
    needed = BYTES_PER_WEIGHT[optimizer] * sum(p.numel() for p in models.diffusion.parameters()) / parts
    device = next(models.diffusion.parameters()).device  # torch 2.4 wants the number of the GPU, too
    present = torch.cuda.mem_get_info(device)[1]
    if needed > present:
        raise TrainingError(
            f"{models.device} should have more than {needed / 1e9:.0f} GB to train all weights of this model, not "
            f"{present / 1e9:.0f} GB: use --optimizer adamw8bit, --sharded on several devices, or train a LoRA."
        )


def _flag(name: str) -> str:
    """The flag of a setting."""
    return "--batch" if name == "batch_size" else f"--{name.replace('_', '-')}"


def _said(value: object) -> object:
    """A setting's value, as an error says it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value
