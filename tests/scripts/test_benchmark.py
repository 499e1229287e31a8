"""The benchmark: its table, its workers and its error messages. The figures themselves are not tested."""

import io
import math
from types import SimpleNamespace

import pytest

from scripts.benchmark import (
    MEASURES,
    QUICK,
    Results,
    Worker,
    describe_machine,
    main,
    parse,
    take_turns,
    throughput,
    workers,
)
from sd.checkpoints.files import write_checkpoint
from tests.support.synthetic import MICRO, random_state


def test_quick_measures_less():
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
        (["--checkpoint", "no.ckpt"], "--checkpoint should be a file, but no.ckpt is not."),
        (["--json", "nowhere/x.json"], "--json should be in an existing folder, but nowhere is not."),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_device(capsys):
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
        imports, answer = worker.ask("imports"), worker.ask("load")
    assert worker.name == "sd fp32"
    assert imports["seconds"] > 0.02  # it was not imported before
    assert 0 < answer["seconds"] < 60
    assert 0.05 < answer["resident"] < 10  # GB
    assert worker.process.poll() is not None


def test_weights_that_do_not_fit_into_memory_are_an_error(tmp_path):
    with workers([("sd", "fp32", "cpu", tmp_path)]) as (worker,):
        worker.process.kill()
        worker.process.wait()
        pipes = {"stdin": io.StringIO(), "stdout": io.StringIO('{"seconds": Infinity}')}
        worker.process = SimpleNamespace(**pipes, kill=lambda: None, wait=lambda: None)
        with pytest.raises(ChildProcessError, match="^sd fp32 does not fit into memory with the others"):
            worker.ask("load")


class Clock:
    """Replaces a worker: answers with the given seconds, and keeps the commands."""

    def __init__(self, *seconds):
        self.name, self.seconds, self.asked = "sd fp32", list(seconds), []

    def ask(self, *command):
        self.asked.append(command)
        return {"seconds": 0.0 if command[0] == "prepare" else self.seconds.pop(0), "resident": 3.0}


@pytest.mark.parametrize(
    "arguments, seconds, counted",
    [(["--runs", "3"], [9.0, 8.0, 7.0], 3), (["--quick"], [9.0, 8.0], 1), (["--quick"], [1.0, 2.0], 2)],
)
def test_slow_measures_are_not_repeated_with_quick(arguments, seconds, counted):
    results, clock = Results(), Clock(*seconds)
    take_turns(parse(arguments), "step", [clock], results)
    assert clock.asked == [("prepare", "step"), *[("step",)] * counted]
    assert results.figures["step"]["sd fp32"] == seconds[:counted]
    assert results.figures["peak resident memory after a step, GB"] == {"sd fp32": [3.0]}


def test_throughput_stops_when_memory_runs_out():
    results, clock = Results(), Clock(2.0, 2.0, math.inf)
    throughput(parse(["--steps", "50"]), [clock], results)
    assert clock.asked[:2] == [("prepare", "picture", 1, 1), ("picture", 50, 1)]
    assert [row["sd fp32"] for row in results.figures.values()] == [[0.5], [1.0]]


@pytest.mark.slow
def test_a_worker_warms_up_and_runs(tmp_path):
    write_checkpoint(tmp_path / "micro.safetensors", random_state(MICRO), MICRO.to_dict())
    with workers([("sd", "fp32", "cpu", tmp_path / "micro.safetensors")]) as (worker,):
        worker.ask("load")
        for command in (["prepare", "decode"], ["decode"], ["prepare", "picture", 1, 2], ["picture", 2, 1]):
            assert 0 < worker.ask(*command)["seconds"] < 60


def test_a_worker_that_fails_is_an_error_here(tmp_path, capfd):
    with workers([("sd", "fp32", "cpu", tmp_path / "nothing.ckpt")]) as (worker,):
        assert isinstance(worker, Worker)
        with pytest.raises(ChildProcessError, match="sd fp32 ended during load"):
            worker.ask("load")
    assert "There is no checkpoint" in capfd.readouterr().err


def test_the_machine_is_described():
    text = describe_machine("cpu")
    assert "torch" in text
    assert "cores" in text
