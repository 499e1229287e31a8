"""Training on several ranks: the losses of one process, states for any number of ranks, and errors that end all."""

import contextlib
import os
import random
import re
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sd.checkpoints.files import read_checkpoint
from sd.clip import CLIP
from sd.diffusion import Diffusion
from sd.tokenizer import Tokenizer
from sd.training import ranks
from sd.training.data import CaptionedImages
from sd.training.diffusion import DiffusionStage
from sd.training.distillation import ConsistencyStage
from sd.training.loop import Training, TrainingError, load_state
from sd.training.recompute import recompute_activations
from sd.training.stages import TrainingRun
from sd.training.text import TextStage, tokenise
from sd.training.vae import VAEStage
from tests.support.ranks import CPU, KILLED, needs_fork, on_ranks
from tests.support.synthetic import FEW_LAYERS, random_models
from tests.training.test_loop import Line

pytestmark = needs_fork

CLOSE = 1e-5
LATENTS = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(9, 4, 8, 8)
IMAGES = CaptionedImages(
    np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8), [[f"{number} houses"] for number in range(9)]
)


def train(folder, make, steps=20, stop_after=None, **more):
    """Trains the stage that `make` returns. With `stop_after`, rank 0 stops after this many steps, right after a save.
    Returns the losses."""
    losses = []

    def pause():
        if len(losses) == stop_after:
            raise KeyboardInterrupt

    training = Training(make(), folder, CPU, 1.0, steps, seed=3, **more)
    with contextlib.suppress(KeyboardInterrupt):
        training.run(lambda progress: losses.append(progress.loss), 1e9 if stop_after is None else 0.0, pause)
    return losses


def vae():
    torch.manual_seed(0)
    return VAEStage(FEW_LAYERS.vae, IMAGES, batch_size=8, crop=16)


def text():
    torch.manual_seed(0)
    return TextStage(FEW_LAYERS.text, IMAGES, tokenise(IMAGES, Tokenizer()))


def diffusion():
    torch.manual_seed(0)
    tokens, empty, clip = tokenise(IMAGES, Tokenizer()), Tokenizer()([""]), CLIP(FEW_LAYERS.text)
    return DiffusionStage(FEW_LAYERS.unet, FEW_LAYERS.schedule, LATENTS, tokens, empty, clip, batch_size=8)


def lcm():
    torch.manual_seed(0)
    return ConsistencyStage(random_models(FEW_LAYERS), LATENTS, tokenise(IMAGES, Tokenizer()), 3.0, 8, rank=2)


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
        latents = torch.randn(self.batch_size, 4, 8, 8, generator=generator)
        context = torch.randn(self.batch_size, 5, 32, generator=generator)
        return latents, context, torch.randint(1000, (self.batch_size,), generator=generator)

    def loss(self, latents, context, timesteps):
        return (self.networks["diffusion"](latents, context, timesteps).float() - latents).square().mean()


def losses_and_average(folder):
    training, losses = Training(Line(), folder, CPU, 1.0, 20, seed=3), []
    training.run(lambda progress: losses.append(progress.loss), 1e9, lambda: None)
    return losses, training.average["line"].weight.numpy()


def test_two_ranks_have_the_losses_of_one_process(tmp_path):
    alone, average = losses_and_average(tmp_path / "alone")
    one, other = on_ranks(2, losses_and_average, tmp_path / "two")
    assert one[0] == other[0] == pytest.approx(alone, rel=CLOSE)
    assert np.array_equal(one[1], other[1])
    np.testing.assert_allclose(one[1], average, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [vae, text, diffusion, lcm])
def test_ranks_and_parts_do_not_change_the_losses_of_a_stage(tmp_path, make):
    alone = train(tmp_path / "alone", make)
    for losses in on_ranks(2, train, tmp_path / "two", make):
        assert losses == pytest.approx(alone, rel=CLOSE)
    if make is text:
        with pytest.raises(TrainingError, match="Stage text compares all images of a batch: --accumulate should be 1"):
            train(tmp_path / "parts", make, accumulate=2)
        return
    assert train(tmp_path / "parts", make, accumulate=4) == pytest.approx(alone, rel=CLOSE)
    for losses in on_ranks(2, partial(train, accumulate=4), tmp_path / "both", make):
        assert losses == pytest.approx(alone, rel=CLOSE)


@pytest.mark.slow
def test_any_number_of_ranks_resumes(tmp_path):
    whole = train(tmp_path / "whole", Line, 40)
    halves = tmp_path / "halves"
    begun, stopped = on_ranks(2, train, halves, Line, 40, 9)
    assert "another rank stopped" in str(stopped)
    more = train(halves, Line, 40, 13)
    rest, *others = on_ranks(3, train, halves, Line, 40)
    assert others == [rest, rest]
    assert [len(begun), len(more), len(rest)] == [9, 13, 18]
    assert begun + more + rest == pytest.approx(whole, rel=CLOSE)


def train_sharded(folder, steps=20, stop_after=None, accumulate=1, recompute=False):
    """Returns the losses and, on rank 0, the average: sharded if there is a process group."""
    losses, stage = [], UNetStage()
    if recompute:
        recompute_activations(stage.networks)
    training = Training(stage, folder, CPU, 1.0, steps, 3, None, accumulate, sharded=ranks.joins())

    def report(progress):
        losses.append(progress.loss)
        if len(losses) == stop_after:
            training.save()
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        training.run(report, 1e9, lambda: None)
    average = training.average.state_dict() if ranks.rank() == 0 else {}
    return losses, {name: tensor.numpy() for name, tensor in average.items()}


@pytest.mark.slow
def test_sharded_networks_train_like_whole_ones_and_any_number_of_ranks_resumes(tmp_path):
    alone, average = train_sharded(tmp_path / "alone")
    (losses, whole), (others, _) = on_ranks(2, train_sharded, tmp_path / "two")
    assert losses == others == pytest.approx(alone, rel=CLOSE)
    for name in average:
        np.testing.assert_allclose(whole[name], average[name], rtol=1e-3, atol=1e-5)
    halves = tmp_path / "halves"
    begun = on_ranks(2, train_sharded, halves, 20, 7)[0][0]
    assert [path.name for path in (halves / "unet.state").iterdir()] == ["7"]
    (halves / "unet.state/9").mkdir()  # of a rank that was killed while it saved
    more = on_ranks(1, train_sharded, halves, 20, 6)[0][0]
    (rest, whole), *_ = on_ranks(3, train_sharded, halves)
    assert begun + more + rest == pytest.approx(alone, rel=CLOSE)
    for name in average:
        np.testing.assert_allclose(whole[name], average[name], rtol=1e-3, atol=1e-5)
    assert load_state(halves / "unet.state")["step"] == 20
    (none, again), _ = on_ranks(2, train_sharded, halves)  # it is finished
    assert none == []
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    with pytest.raises(TrainingError, match=r"unet\.state is of a run that was sharded: resume it alike"):
        train_sharded(halves)


@pytest.mark.slow
def test_sharded_networks_in_parts_that_are_recomputed(tmp_path):
    alone, _ = train_sharded(tmp_path / "alone", 5)
    two = on_ranks(2, partial(train_sharded, accumulate=3, recompute=True), tmp_path / "two", 5)
    assert [losses for losses, _ in two] == [pytest.approx(alone, rel=CLOSE)] * 2


def log_losses(folder, steps):
    """Trains on this rank, and saves a state every step. Rank 0 appends each step and its loss to a file."""
    with open(folder / "losses.txt", "a", buffering=1) if ranks.rank() == 0 else contextlib.nullcontext() as log:
        training = Training(Line(), folder, CPU, 1.0, steps, seed=3)
        training.run(lambda progress: log and log.write(f"{progress.step} {progress.loss!r}\n"), 0.0, lambda: None)


@pytest.mark.slow
def test_ten_kills_lose_nothing(tmp_path):
    rng, steps, kills = random.Random(int(os.environ.get("SEED", 0))), 120, 0
    whole = train(tmp_path / "whole", Line, steps)
    log = tmp_path / "losses.txt"

    def kill(processes):
        """Kills a random rank at a random moment after some more steps."""
        nonlocal kills
        before, more = len(lines(log)), rng.randrange(1, 10)
        while len(lines(log)) < before + more:
            if not any(process.is_alive() for process in processes):
                return
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        os.kill(rng.choice(processes).pid, signal.SIGKILL)
        kills += 1

    for _ in range(10):
        results = on_ranks(2, log_losses, tmp_path, steps, meanwhile=kill)
        assert results.count(KILLED) == 1
        assert "another rank stopped" in str(results)
    assert on_ranks(2, log_losses, tmp_path, steps) == [None, None]
    assert kills == 10
    seen = {}
    for step, loss in lines(log):
        assert loss == pytest.approx(whole[step - 1], rel=CLOSE)
        seen[step] = loss
    assert sorted(seen) == list(range(1, steps + 1))


def lines(log):
    """The complete lines of a file of steps and losses."""
    complete = log.read_text().split("\n")[:-1] if log.exists() else []
    return [(int(step), float(loss)) for step, loss in (line.split() for line in complete)]


def test_a_batch_that_cannot_be_divided(tmp_path):
    class Whole(Line):
        divisible = False

    with pytest.raises(TrainingError, match="batch of stage line should have at least 33 rows, .* not 32"):
        train(tmp_path, Line, accumulate=33)
    for error in on_ranks(2, train, tmp_path, Whole):
        assert str(error) == "Stage line should be trained by one process, not by 2 ranks."
    assert not list(tmp_path.iterdir())


def test_sharding_needs_torchrun_and_optimizers_for_parts(tmp_path):
    with pytest.raises(TrainingError, match=r"Sharded training should be started by torchrun, also on one device"):
        train(tmp_path, UNetStage, sharded=True)
    (error,) = on_ranks(1, partial(train, sharded=True), tmp_path, Line)
    assert "should use optimizers such as AdamW: stage line uses Muon" in str(error)


def other_data(folder):
    Training(Line(), folder, CPU, 1.0, 3, seed=3, record={"about": f"{8 + ranks.rank()} scenes"})


def own_folder(folder):
    out = folder / f"of rank {ranks.rank()}"
    out.mkdir(exist_ok=True)
    ranks.check_shared(out)


@pytest.mark.slow
def test_ranks_that_differ(tmp_path):
    error, same = map(str, on_ranks(2, other_data, tmp_path))
    assert error == same
    assert error.startswith("All ranks should have the same data: rank 0 has {'about': '8 scenes'}, and rank 1 has")
    for error in on_ranks(2, own_folder, tmp_path):
        assert re.fullmatch(
            r"--out should be a folder that all ranks share: rank 1 has another .* than rank 0\.", str(error)
        )
    on_ranks(2, ranks.check_shared, tmp_path / "of rank 0")
    assert not list((tmp_path / "of rank 0").iterdir())


def late(folder, seconds):
    if ranks.rank() == 0:
        time.sleep(seconds)
    ranks.clock()


@pytest.mark.slow
def test_a_rank_that_is_late(tmp_path):
    _, error = on_ranks(2, late, tmp_path, 3, wait=1)
    assert re.match(
        r"another rank stopped, or did not come within 1 s \(--wait\): .*Run the same command again", str(error)
    )
    assert on_ranks(2, late, tmp_path, 1, wait=20) == [None, None]


def train_all(out, folder=None):
    """All stages, two steps each. Returns the path of the checkpoint, on rank 0."""
    run = TrainingRun(out, folder, scenes=40, device="cpu", config=FEW_LAYERS)
    for name in ("vae", "text", "diffusion", "decoder"):
        run.train(name, minutes=1, steps=2)
    return run.write_checkpoint() if ranks.rank() == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_all_stages_in_one_folder(tmp_path, own):
    folder = tmp_path / "mine" if own else None
    if folder:
        folder.mkdir()
        for number, image in enumerate(IMAGES.pixels):
            Image.fromarray(image).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"{number} houses")
    one, two = train_all(tmp_path / "one", folder), on_ranks(2, train_all, tmp_path / "two", folder)
    assert two == [tmp_path / "two/tiny.ckpt", None]
    files = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("one", "two")]
    assert files[0] == files[1]
    expected, state = (read_checkpoint(path).state for path in (one, two[0]))
    for name in state:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-2, atol=1e-2)
