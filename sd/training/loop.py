"""The training loop that all stages share: draw a batch, compute the loss and gradients, update, average, save.

A `Stage` defines the networks, the batches and the loss. The loop saves everything that it needs to resume in a state
file: the weights, their average, the optimizers, the step and the random generator. A run that was killed resumes with
exactly the losses that it would have had. Under torchrun, the ranks share each batch, and rank 0 writes the files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sd.files import whole_file
from sd.runtime.out_of_memory import is_about_memory
from sd.training import ranks, sharding
from sd.training.gradients import ManyRanks, OneProcess
from sd.training.muon import Muon

WARMUP = 100  # steps during which the learning rate rises
CALIBRATION = 20  # steps that are timed, to decide how many fit into the given minutes


class Stage(Protocol):
    """What a `Training` trains: one of the model's stages (stages.py), or the judge (judge.py).

    Two attributes are optional. With `gathers`, a loss that is not divisible can be shared by ranks: it gathers what it
    compares (`ranks.gather`), and is the loss of the whole batch on every rank. A method `optimizers()` returns other
    optimizers than `make_optimizers`; it is called once, when the networks are on their device.
    """

    name: str
    config: dict  # describes the networks; a state resumes only with an equal one
    networks: nn.ModuleDict  # all that is trained
    learning_rate: float
    batch_size: int  # of the whole run, whatever the number of ranks
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
        accumulate: int = 1,
        sharded: bool = False,
    ):
        """Train for `steps`, or if that is None, for about this many `minutes`.

        With `accumulate` n, a rank computes its share of a batch in n parts, one after the other, to save memory. With
        `sharded`, each rank keeps only a part of the weights (sharding.py). `average` is then whole, but only on rank
        0, and as it was when a state was last saved or loaded.

        If the folder `out` has a state of this stage, it is resumed, with the number of steps it started with. `record`
        describes the training data (record.py) and is saved in the state.

        Raises TrainingError if that state is damaged or has another configuration, if the batch cannot be divided like
        this, or if ranks differ in what they train.
        """
        check_division(stage, accumulate)
        if sharded:
            check_sharding(stage)
        self.stage, self.device, self.record = stage, device, record
        self.state_path = out / f"{stage.name}.state"
        self.minutes, self.total, self.step, self.loss = minutes, steps, 0, math.nan
        self.times: list[float] = []  # seconds of each step, until the number of steps is decided
        self.networks = stage.networks.to(device)
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.shards = sharding.Shards(self.networks, device) if sharded else None
        if sharded and ranks.rank() > 0:
            self.average.to("meta")
        self.parameters = list(self.networks.parameters())
        self.optimizers = stage.optimizers() if hasattr(stage, "optimizers") else make_optimizers(self.networks)
        self.generator = torch.Generator().manual_seed(seed)
        if has_state(self.state_path):
            self._load()
        check_alike({"data": record, "configuration": stage.config, "step": self.step, "steps": self.total})
        self.gradients = (
            ManyRanks(stage, device, accumulate, sharded) if ranks.joins() else OneProcess(stage, device, accumulate)
        )

    @property
    def done(self) -> bool:
        return self.total is not None and self.step >= self.total

    def run(self, report: Callable[[Progress], None], save_every: float, pause: Callable[[], None]) -> None:
        """Train until all steps are done.

        `report` is called after every step. Every `save_every` seconds, and at the end, the state is saved and `pause`
        is called on rank 0, which may use `average`. Raises TrainingError if the loss or its gradient is not finite,
        OSError if the state cannot be written.
        """
        before = saved = ranks.clock()
        with self.gradients.ready() as parallel_map:
            for optimizer in self.optimizers:
                if isinstance(optimizer, Muon):
                    optimizer.map = parallel_map
            while not self.done:
                self._one_step()
                now = ranks.clock()
                self._calibrate(now - before)
                report(Progress(self.step, self.total, self.loss, self.stage.batch_size / (now - before)))
                if now - saved > save_every or self.done:
                    self.save()
                    if ranks.rank() == 0:
                        pause()
                    now = saved = ranks.clock()
                before = now

    def _one_step(self) -> None:
        self.loss = self.gradients([tensor.to(self.device) for tensor in self.stage.draw(self.generator)])
        if not math.isfinite(self.loss):
            raise TrainingError(f"The loss of stage {self.stage.name} is {self.loss} at step {self.step}.")
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)).item()
        if not math.isfinite(norm):  # clipping divides every gradient by it: all weights would be lost
            raise TrainingError(f"The gradient of stage {self.stage.name} is {norm} at step {self.step}.")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.stage.learning_rate * self._schedule()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._update_average()

    def _schedule(self) -> float:
        """The factor of the learning rate: half a cosine (1608.03983) over all steps, times a linear warm-up."""
        warmup = min(1.0, (self.step + 1) / WARMUP)
        return warmup * (0.5 + 0.5 * math.cos(math.pi * self.step / self.total)) if self.total else warmup

    def _update_average(self) -> None:
        """The exponential moving average of the weights. Its decay is small at first, so that the average soon forgets
        the random initial weights."""
        decay = min(self.stage.ema, (1 + self.step) / (10 + self.step))
        averaged = self.shards.average.values() if self.shards else self.average.parameters()
        averaged, weights = (
            [sharding.own_part(tensor) for tensor in tensors] for tensors in (averaged, self.parameters)
        )
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - decay)

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
            "generator": self.generator.get_state(),
        }
        if self.shards:
            self._save_shards(state)
        elif ranks.rank() == 0:
            state |= {"networks": self.networks.state_dict(), "average": self.average.state_dict()}
            state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
            save_atomically(state, self.state_path)

    def _save_shards(self, state: dict) -> None:
        folder = self.state_path / str(self.step)
        with ranks.rank_0_first():
            if ranks.rank() == 0:
                save_atomically(state, folder / sharding.LOOP)
        self.shards.save(folder, self.optimizers)
        if ranks.rank() == 0:
            sharding.delete_others(folder)
        self.shards.gather(self.average)

    def _load(self) -> None:
        state = load_state(self.state_path)
        if state["config"] != self.stage.config:
            raise TrainingError(
                f"{self.state_path} has another configuration: choose another --out, or delete that file."
            )
        if self.state_path.is_dir() != bool(self.shards):
            kind = "not sharded" if self.shards else "sharded"
            raise TrainingError(
                f"{self.state_path} is of a run that was {kind}: resume it alike, or choose another --out."
            )
        if self.shards:
            self.shards.load(sharding.newest(self.state_path), self.optimizers)
            self.shards.gather(self.average)
        else:
            self.networks.load_state_dict(state["networks"])
            self.average.load_state_dict(state["average"])
            for optimizer, values in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(values)
        self.generator.set_state(state["generator"])
        self.step, self.total, self.times = state["step"], state["total"], state.get("times", [])


def check_division(stage: Stage, accumulate: int) -> None:
    """Raise TrainingError unless the batch of a stage can be divided into parts, `accumulate` for each rank."""
    parts = accumulate * ranks.count()
    if accumulate > 1 and not stage.divisible:
        raise TrainingError(
            f"Stage {stage.name} compares all images of a batch: --accumulate should be 1, not {accumulate}."
        )
    if parts > 1 and not stage.divisible and not getattr(stage, "gathers", False):
        raise TrainingError(f"Stage {stage.name} should be trained by one process, not by {ranks.count()} ranks.")
    if stage.batch_size < parts:
        raise TrainingError(
            f"The batch of stage {stage.name} should have at least {parts} rows, one for each part of each rank, not "
            f"{stage.batch_size}."
        )


def check_sharding(stage: Stage) -> None:
    """Raise TrainingError unless the weights of a stage can be divided among the ranks."""
    if not ranks.joins():
        raise TrainingError(
            "Sharded training should be started by torchrun, also on one device (torchrun --nproc-per-node 1 SCRIPT)."
        )
    if not hasattr(stage, "optimizers"):
        raise TrainingError(
            f"Sharded training should use optimizers such as AdamW: stage {stage.name} uses Muon, which needs whole "
            "matrices."
        )


def check_alike(mine: dict) -> None:
    """Raise TrainingError, on all ranks, if two ranks differ in anything that they train on."""
    everyones = ranks.everyones(mine)
    for number, other in enumerate(everyones):
        for what, value in everyones[0].items():
            if other[what] != value:
                raise TrainingError(
                    f"All ranks should have the same {what}: rank 0 has {value}, and rank {number} has {other[what]}."
                )


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


def has_state(path: Path) -> bool:
    """Whether there is a state with this name, and complete if it is sharded."""
    return path.exists() and (not path.is_dir() or sharding.newest(path) is not None)


def load_state(path: Path, mapped: bool = False) -> dict:
    """Read what `save_atomically` wrote. With `mapped`, tensors are read only when they are used. The networks of a
    sharded state are not read.

    Raises TrainingError if the file does not exist or is damaged, OSError if it cannot be read.
    """
    if folder := sharding.newest(path):
        path = folder / sharding.LOOP
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise TrainingError(f"There is no {path}: train stage {path.stem} first.") from None
    except Exception as error:
        if isinstance(error, OSError) or is_about_memory(error):
            raise  # the state may be good: nobody should delete it
        raise TrainingError(f"{path} is damaged, or not a training state: delete it to start again.") from error
