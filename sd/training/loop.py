"""The training loop that all stages share: draw a batch, compute the loss and gradients, update, average, save.

A `Stage` defines the networks, the batches and the loss. The loop saves everything that it needs to resume in a state
file: the weights, their average, the optimizers, the step and the random generator. A run that was killed resumes with
exactly the losses that it would have had.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sd.files import whole_file
from sd.training.muon import Muon
from sd.training.precision import mixed_precision

WARMUP = 100  # steps during which the learning rate rises
CALIBRATION = 20  # steps that are timed, to decide how many fit into the given minutes


class Stage(Protocol):
    """What a `Training` trains: one of the model's stages (stages.py), or the judge (evaluation.py)."""

    name: str
    config: dict  # describes the networks; a state resumes only with an equal one
    networks: nn.ModuleDict  # all that is trained
    learning_rate: float
    batch_size: int
    divisible: bool  # whether the loss of a batch is the mean of the losses of its parts
    ema: float  # the decay of the moving average of the weights

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: tensors of batch_size rows. All randomness in training comes from this generator."""

    def loss(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, or of a part of one: a scalar."""


@dataclass
class Progress:
    """What a progress bar shows after a step."""

    step: int
    total: int | None  # None until the speed is known
    loss: float
    samples_per_second: float


class TrainingError(ValueError):
    """A training run cannot start or continue. The message is one sentence."""


class Training:
    """The training of one stage. `run` trains until it is done, and saves the state in `state_path`."""

    def __init__(
        self,
        stage: Stage,
        out: Path,
        device: torch.device,
        minutes: float,
        steps: int | None,
        seed: int,
        record: dict | None = None,
    ):
        """Train for `steps`, or if that is None, for about this many `minutes`.

        If the folder `out` has a state of this stage, it is resumed, with the number of steps it started with. `record`
        describes the training data (record.py) and is saved in the state.

        Raises TrainingError if that state is damaged or has another configuration.
        """
        self.stage, self.device, self.record = stage, device, record
        self.state_path = out / f"{stage.name}.state"
        self.minutes, self.total, self.step, self.loss = minutes, steps, 0, math.nan
        self.times: list[float] = []  # seconds of each step, until the number of steps is decided
        self.networks = stage.networks.to(device)
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.parameters = list(self.networks.parameters())
        self.optimizers = make_optimizers(self.networks)
        self.generator = torch.Generator().manual_seed(seed)
        # On a CPU with two cores, two threads with half a batch each are faster than one thread whose operations use
        # both cores: operations on small tensors are too short to be split.
        workers = os.cpu_count() or 1 if device.type == "cpu" and stage.divisible else 1
        self.workers = max(1, min(workers, stage.batch_size // 8, 8))
        if self.state_path.exists():
            self._load()

    @property
    def done(self) -> bool:
        return self.total is not None and self.step >= self.total

    def run(self, report: Callable[[Progress], None], save_every: float, pause: Callable[[], None]) -> None:
        """Train until all steps are done.

        `report` is called after every step. Every `save_every` seconds, and at the end, the state is saved and `pause`
        is called, which may use `average`. Raises TrainingError if the loss or its gradient is not finite, OSError if
        the state cannot be written.
        """
        threads = torch.get_num_threads()
        saved = time.monotonic()
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            if self.workers > 1:
                torch.set_num_threads(1)
                self.optimizers[0].map = pool.map
            try:
                while not self.done:
                    started = time.monotonic()
                    self._one_step(pool)
                    elapsed = time.monotonic() - started
                    self._calibrate(elapsed)
                    report(Progress(self.step, self.total, self.loss, self.stage.batch_size / elapsed))
                    if time.monotonic() - saved > save_every or self.done:
                        self.save()
                        pause()
                        saved = time.monotonic()
            finally:
                torch.set_num_threads(threads)

    def _one_step(self, pool: ThreadPoolExecutor) -> None:
        batch = [tensor.to(self.device) for tensor in self.stage.draw(self.generator)]
        parts = list(zip(*(tensor.chunk(self.workers) for tensor in batch)))
        losses, gradients = zip(*(pool.map if self.workers > 1 else map)(self._gradients, parts))
        self.loss = sum(losses)
        if not math.isfinite(self.loss):
            raise TrainingError(f"The loss of stage {self.stage.name} is {self.loss} at step {self.step}.")
        for parameter, *shares in zip(self.parameters, *gradients):
            parameter.grad = sum(shares[1:], shares[0])  # always in the same order: float sums depend on it
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        if not math.isfinite(norm):  # clipping divides every gradient by it: all weights would be lost
            raise TrainingError(f"The gradient of stage {self.stage.name} is {norm} at step {self.step}.")
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.stage.learning_rate * self._schedule()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._update_average()

    def _gradients(self, part: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """Of one part of the batch: its share of the loss, and of the gradient of every parameter."""
        attention = StoredAttention() if self.device.type == "cpu" else nullcontext()
        with mixed_precision(self.device), attention:
            loss = self.stage.loss(*part) * (len(part[0]) / self.stage.batch_size)
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def _schedule(self) -> float:
        """The factor of the learning rate: half a cosine (1608.03983) over all steps, times a linear warm-up."""
        warmup = min(1.0, (self.step + 1) / WARMUP)
        return warmup * (0.5 + 0.5 * math.cos(math.pi * self.step / self.total)) if self.total else warmup

    def _update_average(self) -> None:
        """The exponential moving average of the weights. Its decay is small at first, so that the average soon forgets
        the random initial weights."""
        decay = min(self.stage.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1 - decay)

    def _calibrate(self, elapsed: float) -> None:
        """Decide once how many steps fit into the given minutes: after `CALIBRATION` steps, or after half of the time.

        Resuming does not change the number, because the learning rate depends on it.
        """
        if self.total is None:
            self.times.append(elapsed)
            left = 60 * self.minutes - sum(self.times)
            if len(self.times) == CALIBRATION or left < 30 * self.minutes:
                usual = self.times[len(self.times) // 2 :]  # the first steps are slower
                self.total = self.step + max(0, round(left * len(usual) / sum(usual)))

    def save(self) -> None:
        """Write the state atomically. Raises OSError if it cannot be written."""
        state = {
            "config": self.stage.config,
            "record": self.record,
            "step": self.step,
            "total": self.total,
            "times": self.times,
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }
        save_atomically(state, self.state_path)

    def _load(self) -> None:
        state = load_state(self.state_path)
        if state["config"] != self.stage.config:
            raise TrainingError(
                f"{self.state_path} has another configuration: choose another --out, or delete that file."
            )
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        for optimizer, values in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        self.generator.set_state(state["generator"])
        self.step, self.total, self.times = state["step"], state["total"], state.get("times", [])


class StoredAttention(TorchFunctionMode):
    """Plain attention that keeps its scores for the backward pass: on a CPU, several times faster than the built-in
    function, which computes them again."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        query, key, value = args  # (B, heads, N, d), (B, heads, M, d), (B, heads, M, d)
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)  # (B, heads, N, M)
        return scores.softmax(dim=-1).to(value.dtype) @ value  # (B, heads, N, d)


def make_optimizers(networks: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for most matrices, AdamW for vectors and for the first and last layers.

    These layers are chosen by name: embeddings, the first and last layers of the autoencoder, the last layer of the
    U-Net and that of the caption encoder. The first layers of the U-Net and of the image encoder use Muon.
    """
    inner, outer = [], []
    for name, parameter in networks.named_parameters():
        is_outer = any(part in name for part in ("embedding", "conv_in", "conv_out", "quant_conv", "captions.out"))
        (outer if is_outer or parameter.ndim < 2 else inner).append(parameter)
    muon = [Muon(inner, lr=0.0)] if inner else []
    return [*muon, torch.optim.AdamW(outer, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)]


def save_atomically(state: dict, path: Path) -> None:
    """torch.save, but atomic: no partial file ever has this name. Raises OSError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, overwrite=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        reason = getattr(error, "strerror", None) or "is there space left on the disk?"
        raise OSError(f"{path} cannot be written ({reason}); an earlier version of it is kept.") from error


def load_state(path: Path, mapped: bool = False) -> dict:
    """Read what `save_atomically` wrote. With `mapped`, tensors are read only when they are used.

    Raises TrainingError if the file does not exist or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise TrainingError(f"There is no {path}: train stage {path.stem} first.") from None
    except Exception as error:
        raise TrainingError(f"{path} is damaged, or not a training state: delete it to start again.") from error
