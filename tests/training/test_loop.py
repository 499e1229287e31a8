"""The training loop learns, resumes with the same losses, and loses nothing when it has to stop."""

import contextlib
import errno
import math
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sd.training import loop, precision, ranks
from sd.training.gradients import StoredAttention, plain_attention
from sd.training.loop import Training, TrainingError
from sd.training.muon import Muon, orthogonalise


class Line:
    """Learns y = W x."""

    name = "line"
    learning_rate = 0.4
    divisible = True
    ema = 0.9
    batch_size = 32

    def __init__(self, width=8, scale=1.0):
        torch.manual_seed(0)
        self.config = {"width": width}
        self.networks = nn.ModuleDict({"line": nn.Linear(width, width)})
        self.truth = scale * torch.randn(width, width)

    def draw(self, generator):
        return (torch.randn(self.batch_size, len(self.truth), generator=generator),)

    def loss(self, x):
        return (self.networks["line"](x).float() - x @ self.truth.T).square().mean()


def train(folder, stop_after=None, stage=None, steps=40, minutes=1.0, save_every=0.0):
    """Train, and with `stop_after` stop after this many steps, right after a save, as if killed. Returns the losses."""
    losses = []

    def report(progress):
        losses.append(progress.loss)

    def pause():
        if stop_after is not None and len(losses) >= stop_after:
            raise KeyboardInterrupt

    training = Training(stage or Line(), folder, torch.device("cpu"), minutes, steps, seed=3)
    with contextlib.suppress(KeyboardInterrupt):
        training.run(report, save_every, pause)
    return losses, training


@pytest.mark.parametrize("fastest, mixed", [(torch.float32, False), (torch.bfloat16, True)])
def test_bfloat16_only_where_the_cpu_supports_it(tmp_path, monkeypatch, fastest, mixed):
    seen = []

    class Watched(Line):
        def loss(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().loss(x)

    monkeypatch.setattr(precision, "best_dtype", lambda device: fastest)
    train(tmp_path, stage=Watched(), steps=1)
    assert set(seen) == {mixed}


def test_no_bfloat16_on_apple_gpus():
    device = torch.device("mps")
    assert precision.product_dtype(device) == torch.float32
    assert isinstance(precision.mixed_precision(device), contextlib.nullcontext)


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_no_emulated_bfloat16_on_older_gpus(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.product_dtype(torch.device("cuda")) == dtype


def test_the_loss_falls_and_the_average_follows(tmp_path):
    losses, training = train(tmp_path, steps=90, save_every=60.0)
    assert losses[-1] < 0.3 * losses[0]
    assert training.done
    x = torch.randn(64, 8)
    averaged = (training.average["line"](x) - x @ training.stage.truth.T).square().mean()
    assert averaged < 0.3 * losses[0]


def test_an_interrupted_run_resumes_to_the_same_losses(tmp_path):
    whole, first = train(tmp_path / "whole")
    begun, _ = train(tmp_path / "halves", stop_after=17)
    rest, second = train(tmp_path / "halves")
    assert len(begun) == 17
    assert begun + rest == whole
    for a, b in zip(first.average.state_dict().values(), second.average.state_dict().values()):
        assert torch.equal(a, b)


def test_a_finished_run_does_nothing_more(tmp_path):
    train(tmp_path)
    assert train(tmp_path)[0] == []


def test_the_number_of_steps_is_decided_once(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CALIBRATION", 6)
    _, training = train(tmp_path, stop_after=10, steps=None, minutes=0.02)
    _, resumed = train(tmp_path, stop_after=1, steps=None, minutes=60.0)
    assert resumed.total == training.total > 6


@pytest.mark.parametrize("seconds, slow", [(0.05, 0), (0.5, 0), (2, 3), (5, 0), (40, 0)])
def test_training_takes_the_minutes_that_were_given(tmp_path, monkeypatch, seconds, slow):
    """Here 30 seconds, to the nearest step, however long a step takes and even if the first ones take longer."""
    clock = [0.0]

    class Slow(Line):
        divisible = False

        def loss(self, x):
            clock[0] += seconds + slow * math.exp(-clock[0])
            return super().loss(x)

    monkeypatch.setattr(ranks.time, "monotonic", lambda: clock[0])
    train(tmp_path, stage=Slow(), steps=None, minutes=0.5, save_every=1000)
    assert clock[0] == pytest.approx(30, abs=max(seconds, 0.1))


def test_a_state_of_an_earlier_version_resumes(tmp_path):
    """It has the seconds of some steps as one number."""
    whole, _ = train(tmp_path / "whole")
    begun, _ = train(tmp_path / "halves", stop_after=17)
    state = loop.load_state(tmp_path / "halves/line.state")
    del state["times"]
    loop.save_atomically(state | {"seconds": 0.5}, tmp_path / "halves/line.state")
    assert begun + train(tmp_path / "halves")[0] == whole


def test_another_configuration_does_not_resume(tmp_path):
    train(tmp_path, stop_after=2)
    before = (tmp_path / "line.state").read_bytes()
    with pytest.raises(TrainingError, match=r"line\.state has another configuration: choose another --out"):
        train(tmp_path, stage=Line(width=16))
    assert (tmp_path / "line.state").read_bytes() == before


def test_a_damaged_state_says_so(tmp_path):
    (tmp_path / "line.state").write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="is damaged, or not a training state"):
        train(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        PermissionError(13, "Permission denied"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_state_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, error):
    train(tmp_path, stop_after=2)
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        train(tmp_path)
    assert raised.value is error


def test_a_missing_state_names_the_stage(tmp_path):
    with pytest.raises(TrainingError, match="train stage vae first"):
        loop.load_state(tmp_path / "vae.state")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, error):
    train(tmp_path, stop_after=2)
    before = (tmp_path / "line.state").read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"line\.state cannot be written \(.*space left.*\); an earlier version of it is kept"
    ):
        train(tmp_path)
    assert (tmp_path / "line.state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["line.state"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match="The loss of stage line is (inf|nan) at step 0"):
        train(tmp_path, stage=Line(scale=math.inf))
    assert not (tmp_path / "line.state").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_any_weight_changes(tmp_path):
    class Steep(Line):
        def loss(self, x):
            return super().loss(x) + (0 * self.networks["line"].weight.sum()).sqrt()  # 0, with an infinite slope

    stage = Steep()
    before = stage.networks["line"].weight.detach().clone()
    with pytest.raises(TrainingError, match="The gradient of stage line is nan at step 0"):
        train(tmp_path, stage=stage)
    assert torch.equal(stage.networks["line"].weight, before)
    assert not (tmp_path / "line.state").exists()


def test_halves_of_a_batch_give_the_gradients_of_the_whole(tmp_path):
    gradients = []
    for workers in (1, 2):
        training = Training(Line(), tmp_path, torch.device("cpu"), 1.0, 5, seed=0)
        (x,) = training.stage.draw(training.generator)
        gradients.append(sum(training.gradients.of_part((part,))[1][0] for part in x.chunk(workers)))
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_stored_attention_is_attention():
    query, key, value = (torch.randn(2, 4, n, 16) for n in (9, 5, 5))
    expected = F.scaled_dot_product_attention(query, key, value)
    with StoredAttention():
        stored = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(stored, expected)


@pytest.mark.parametrize("dtype, stored", [(torch.bfloat16, True), (torch.float32, False)])
def test_attention_is_stored_for_products_in_bfloat16(monkeypatch, dtype, stored):
    monkeypatch.setattr("sd.training.gradients.product_dtype", lambda device: dtype)
    assert isinstance(plain_attention(torch.device("cpu")), StoredAttention) == stored


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape) @ torch.diag(torch.linspace(0.3, 1, shape[1]))))
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_muon_steps_are_as_large_for_small_gradients():
    steps = []
    for size in (1.0, 1e-3):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
        weight.grad = size * torch.randn_like(weight)
        Muon([weight], lr=0.1).step()
        steps.append(weight.detach())
    torch.testing.assert_close(steps[0], steps[1], rtol=0.05, atol=0.01)
