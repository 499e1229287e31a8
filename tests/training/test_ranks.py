"""Training on several ranks: the losses of one process, states for any number of ranks, and errors that end all."""

import contextlib

import pytest
import torch
from torch import nn

from sd.diffusion import Diffusion
from sd.training import ranks
from sd.training.loop import Training
from tests.support.ranks import CPU, on_ranks
from tests.support.synthetic import FEW_LAYERS
from tests.training.test_loop import Line

CLOSE = 1e-5


def train(folder, stage, steps=20, stop_after=None, **more):
    """Trains on this rank. With `stop_after`, rank 0 stops after this many steps, right after a save. Returns the
    losses."""
    losses = []

    def pause():
        if len(losses) == stop_after:
            raise KeyboardInterrupt

    training = Training(stage, folder, CPU, 1.0, steps, seed=3, **more)
    with contextlib.suppress(KeyboardInterrupt):
        training.run(lambda progress: losses.append(progress.loss), 1e9 if stop_after is None else 0.0, pause)
    return losses


def test_two_ranks_have_the_losses_of_one_process(tmp_path):
    alone = train(tmp_path / "alone", Line())
    for accumulate in (1, 4):
        one, other = on_ranks(2, train, tmp_path / f"two {accumulate}", Line())
        assert one == other == pytest.approx(alone, rel=CLOSE)


class UNetStage:
    """A U-Net with AdamW, for sharding."""

    name = "unet"
    learning_rate = 1e-2
    divisible = True
    ema = 0.9
    batch_size = 6

    def __init__(self):
        torch.manual_seed(0)
        self.config = {}
        self.networks = nn.ModuleDict({"diffusion": Diffusion(FEW_LAYERS.unet)})

    def optimizers(self):
        return [torch.optim.AdamW(self.networks.parameters(), lr=0.0)]

    def draw(self, generator):
        size = self.batch_size
        return (
            torch.randn(size, 4, 8, 8, generator=generator),
            torch.randn(size, 5, 32, generator=generator),
            torch.randint(1000, (size,), generator=generator),
        )

    def loss(self, latents, context, timesteps):
        return (self.networks["diffusion"](latents, context, timesteps).float() - latents).square().mean()


def train_sharded(folder, steps=20, stop_after=None, **more):
    """Returns the losses and, on rank 0, the average."""
    losses = []
    training = Training(UNetStage(), folder, CPU, 1.0, steps, seed=3, sharded=ranks.joins(), **more)

    def pause():
        if len(losses) == stop_after:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        training.run(lambda progress: losses.append(progress.loss), 1e9 if stop_after is None else 0.0, pause)
    return losses, {
        name: tensor.numpy() for name, tensor in training.average.state_dict().items()
    } if ranks.rank() == 0 else {}


@pytest.mark.slow
def test_sharded(tmp_path):
    alone, average = train_sharded(tmp_path / "alone")
    (one, whole), (other, _) = on_ranks(2, train_sharded, tmp_path / "two")
    assert one == other == pytest.approx(alone, rel=CLOSE)
    for name in average:
        assert whole[name] == pytest.approx(average[name], rel=1e-3, abs=1e-5)
