"""The benchmark: its table, its workers, and its bad input. What it measures is for a quiet machine to say."""

import pytest

from scripts.benchmark import MEASURES, QUICK, Results, Worker, describe_machine, main, parse, workers
from sd.checkpoint import write_checkpoint
from tests.synthetic import MICRO, random_state


def test_quick_is_a_part():
    assert set(QUICK) < set(MEASURES)
    assert parse(["--quick"]).only == QUICK
    assert set(parse([]).only) == set(MEASURES) - {"throughput"}
    assert parse(["--only", "step"]).only == ["step"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--runs", "0"], "--runs should be at least 1, not 0."),
        (["--steps", "0"], "--steps should be at least 1, not 0."),
        (["--only", "speed"], "argument --only: invalid choice"),
        (["--checkpoint", "no.ckpt"], "--checkpoint should be a file: there is none at no.ckpt."),
        (["--json", "nowhere/x.json"], "--json should be in a folder that is there: there is no nowhere."),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there(capsys):
    assert main(["--device", "abacus", "--quick"]) == 2
    assert "device should be one that torch can use here" in capsys.readouterr().err


def test_ratios_compare_medians():
    results = Results()
    for seconds in (2.0, 1.0, 9.0):
        results.add("step", "sd bf16", seconds)
        results.add("step", "diffusers bf16", 2 * seconds)
        results.add("step", "diffusers fp32", 4 * seconds)
    rows = results.table().splitlines()[2:]
    assert rows[0] == f"| {MEASURES['step']} | sd bf16 | 2 | 0.50 | 0.25 |"
    assert rows[1] == f"| {MEASURES['step']} | diffusers bf16 | 4 |  | 0.50 |"


def test_a_worker_answers(tmp_path):
    write_checkpoint(tmp_path / "micro.safetensors", random_state(MICRO), MICRO.to_dict())
    with workers([("sd", "fp32", "cpu", tmp_path / "micro.safetensors")]) as (worker,):
        answer = worker.ask("load")
    assert worker.name == "sd fp32"
    assert 0 < answer["seconds"] < 60
    assert 0.05 < answer["resident"] < 10  # GB
    assert worker.process.poll() is not None


def test_a_worker_that_fails_is_an_error_here(tmp_path, capfd):
    with workers([("sd", "fp32", "cpu", tmp_path / "nothing.ckpt")]) as (worker,):
        assert isinstance(worker, Worker)
        with pytest.raises(ChildProcessError, match="sd fp32 ended while it was to load"):
            worker.ask("load")
    assert "There is no checkpoint" in capfd.readouterr().err


def test_the_machine_is_described():
    text = describe_machine()
    assert "torch" in text
    assert "cores" in text
