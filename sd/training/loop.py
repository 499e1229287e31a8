"""The loop that all trainings share: draw, loss, backward, step, average, and now and then save.

In: a `Stage`, which knows its networks, its data and its loss. Out: a file in which the trained networks, and all that
is needed to go on as if nothing had happened, are kept: weights, their average, the optimizer, the step, the random
generator. So a run that was killed resumes to the very same losses.
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

WARMUP = 100  # steps over which the learning rate rises
CALIBRATION = 10  # steps whose speed, after as many to warm up, decides how many fit into the time given


class Stage(Protocol):
    """What a `Training` trains: a stage of the model (`stages`), or the judge of its pictures (`evaluation`)."""

    name: str
    config: dict  # of what is trained; a run resumes only with the same
    networks: nn.ModuleDict  # what is trained
    learning_rate: float
    batch_size: int
    divisible: bool  # whether the loss of a batch is the mean of its parts' losses
    ema: float  # how much of the average is kept at a step

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: tensors of batch_size rows. All chance in training comes from this generator."""

    def loss(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, or of a part of one."""


@dataclass
class Progress:
    """What a progress bar shows."""

    step: int
    total: int | None  # None until the speed is known
    loss: float
    samples_per_second: float


class TrainingError(ValueError):
    """A run cannot start or go on. Its message is one sentence."""


class Training:
    """A stage on its way. `run` trains to the end; `state_path` is where it is kept meanwhile and thereafter."""

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
        """Resumes if `out` holds a state of this stage, whose own budget then counts. `record` says what the run is on
        (record.py); it is kept in the state. Raises TrainingError if that is of another configuration, OSError if `out`
        cannot be written."""
        self.stage, self.device, self.record = stage, device, record
        self.state_path = out / f"{stage.name}.state"
        self.minutes, self.total, self.step, self.seconds, self.loss = minutes, steps, 0, 0.0, math.nan
        self.networks = stage.networks.to(device)
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.parameters = list(self.networks.parameters())
        self.optimizers = make_optimizers(self.networks)
        self.generator = torch.Generator().manual_seed(seed)
        # On a CPU two threads with half a batch each beat one operation after the other on two cores: operations on
        # small tensors are too short to share.
        workers = os.cpu_count() or 1 if device.type == "cpu" and stage.divisible else 1
        self.workers = max(1, min(workers, stage.batch_size // 8, 8))
        if self.state_path.exists():
            self._load()

    @property
    def done(self) -> bool:
        return self.total is not None and self.step >= self.total

    def run(self, report: Callable[[Progress], None], save_every: float, pause: Callable[[], None]) -> None:
        """Trains to the end of the budget. `report` is called at every step; every `save_every` seconds the state is
        saved and then `pause` called, which may look at `average`. Raises TrainingError if the loss or its gradient is
        not finite."""
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
            parameter.grad = sum(shares[1:], shares[0])  # always in the same order, so that a run can be repeated
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        if not math.isfinite(norm):  # every gradient is divided by it: no weight would be left
            raise TrainingError(f"The gradient of stage {self.stage.name} is {norm} at step {self.step}.")
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.stage.learning_rate * self._schedule()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._update_average()

    def _gradients(self, part: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """A part's share of the loss, and of the gradient of every parameter."""
        attention = StoredAttention() if self.device.type == "cpu" else nullcontext()
        with mixed_precision(self.device), attention:
            loss = self.stage.loss(*part) * (len(part[0]) / self.stage.batch_size)
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def _schedule(self) -> float:
        """The learning rate's factor: half a cosine (1608.03983) over the whole run, times a rise at its start."""
        rise = min(1.0, (self.step + 1) / WARMUP)
        return rise * (0.5 + 0.5 * math.cos(math.pi * self.step / self.total)) if self.total else rise

    def _update_average(self) -> None:
        """The exponential moving average; short at first, so that it soon forgets the random beginning."""
        decay = min(self.stage.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1 - decay)

    def _calibrate(self, elapsed: float) -> None:
        """Decides, once, how many steps fit into the minutes. Resuming must not change it: the schedule hangs on it."""
        if self.total is None and self.step > CALIBRATION:
            self.seconds += elapsed
            if self.step == 2 * CALIBRATION:
                self.total = max(self.step, int(60 * self.minutes * CALIBRATION / self.seconds))

    def save(self) -> None:
        """Writes the state, which appears complete or not at all. Raises OSError if it cannot be written."""
        state = {
            "config": self.stage.config,
            "record": self.record,
            "step": self.step,
            "total": self.total,
            "seconds": self.seconds,
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
                f"{self.state_path} is a run of another configuration: choose another --out, or remove that file."
            )
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        for optimizer, values in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        self.generator.set_state(state["generator"])
        self.step, self.total, self.seconds = state["step"], state["total"], state["seconds"]


class StoredAttention(TorchFunctionMode):
    """Attention whose scores are kept for the backward pass: on a CPU, several times as fast as computing them anew."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        query, key, value = args  # (B, heads, N, d), (B, heads, M, d) twice
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)  # (B, heads, N, M)
        return scores.softmax(dim=-1).to(value.dtype) @ value


def make_optimizers(networks: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for vectors and, by their names, for embeddings, the autoencoder's first and last layers, the U-Net's last
    and the captions' last; Muon for all other matrices, the U-Net's first layer and the picture encoder's among them.
    """
    inner, rest = [], []
    for name, parameter in networks.named_parameters():
        outer = any(part in name for part in ("embedding", "conv_in", "conv_out", "quant_conv", "captions.out"))
        (rest if outer or parameter.ndim < 2 else inner).append(parameter)
    return [Muon(inner, lr=0.0), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)]


def save_atomically(state: dict, path: Path) -> None:
    """torch.save under a name that appears only when the file is complete and on disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, overwrite=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # a RuntimeError is torch's word for a disk that is full
        reason = getattr(error, "strerror", None) or "is there space left on the disk?"
        raise OSError(f"{path} cannot be written ({reason}); what was there before is kept.") from error


def load_state(path: Path, mapped: bool = False) -> dict:
    """What `save_atomically` wrote; with `mapped`, tensors are read only when used. Raises TrainingError if there is
    none, or if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise TrainingError(f"There is no {path}: train stage {path.stem} first.") from None
    except Exception as error:
        raise TrainingError(f"{path} is damaged, or not a training state: remove it to start again.") from error
