"""The benchmark: its table, its workers and its error messages. The figures themselves are not tested."""

import io
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts import benchmark
from scripts.benchmark import (
    MEASURES,
    QUICK,
    Worker,
    convert,
    describe_machine,
    few_steps,
    from_cold,
    main,
    parse,
    runs_of,
    take_part,
    take_turns,
    throughput,
    workers,
)
from scripts.benchmarks.contestants import PROMPT, OpenVINO, Ours
from scripts.benchmarks.few_steps import WAYS, FewSteps, write_add_ons
from scripts.benchmarks.results import FEW_STEPS, Results, pairs
from scripts.benchmarks.timing import steady_gemm
from sd import generate
from sd.checkpoints.files import write_checkpoint
from tests.support.synthetic import FEW_LAYERS, MICRO, random_state


def results_of(*products):
    """Results whose products of matrices have these rates, and then always the last of them."""
    rates = list(products) or [1.0]
    return Results(MEASURES, lambda: rates.pop(0) if len(rates) > 1 else rates[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "few-layers.safetensors"
    write_checkpoint(path, random_state(FEW_LAYERS), FEW_LAYERS.to_dict())
    return path


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


def add_runs(results, measure, **figures):
    """Adds one turn after the other, with a product before, between and after them."""
    results.probe(measure)
    for turn in zip(*figures.values()):
        for contestant, figure in zip(figures, turn):
            results.add(measure, contestant.replace("_", " "), figure)
        results.probe(measure)


def test_the_table_has_medians_the_fastest_and_the_spread():
    results = results_of()
    add_runs(results, "step", sd_bf16=[2.0, 1.0, 9.0, 3.0, 4.0])
    results.add("tokenizer", "sd", 1000.0)
    results.add("tokenizer", "sd", 3000.0)
    assert results.table().splitlines()[2:] == [
        f"| {MEASURES['step']} | sd bf16 | 3 | 1 | 2 to 4 | 5 |",
        f"| {MEASURES['tokenizer']} | sd | 2e+03 | 3e+03 | 1.5e+03 to 2.5e+03 | 2 |",  # here, more is faster
    ]


def test_ratios_are_of_medians_and_of_the_fastest():
    results = results_of()
    add_runs(results, "step", sd_bf16=[2.0, 1.0, 9.0], diffusers_bf16=[4.0, 4.0, 12.0], openvino_bf16=[2.0, 2.0, 2.0])
    rows = results.ratios().splitlines()[2:4]
    assert rows[0] == f"| {MEASURES['step']} | sd bf16 | diffusers bf16 | 0.50 | 0.25 | 0.38 to 0.62 | 3 |"
    assert rows[1] == f"| {MEASURES['step']} | sd bf16 | openvino bf16 | 1.00 | 0.50 | 0.75 to 2.75 | 3 |"


def test_a_noisy_machine_gets_no_ratios():
    results = results_of(1.0, 1.1, 0.9, 1.0)  # 22 % between the fastest and the slowest
    add_runs(results, "step", sd_bf16=[1.0, 1.0, 1.0], diffusers_bf16=[2.0, 2.0, 2.0])
    assert results.ratios().splitlines()[2] == (
        f"| {MEASURES['step']} | sd bf16 | diffusers bf16 | too noisy to judge | products varied by 22 % |  | 3 |"
    )
    assert "0.50" not in results.ratios()
    assert "| diffusers bf16 | 2 |" in results.table()


def test_only_measured_times_and_memory_have_ratios():
    """The share of the GEMM rate is computed from times: it would show the ratio that noise forbids."""
    results = results_of()
    for who, figure in {"sd fp32": 1.0, "diffusers fp32": 2.0}.items():
        results.add("step, share of the GEMM rate", who, figure)
        results.add("peak resident memory after a step, GB", who, figure)
    (row,) = results.ratios().splitlines()[2:-2]
    assert row == "| peak resident memory after a step, GB | sd fp32 | diffusers fp32 | 0.50 | 0.50 |  | 1 |"


def test_noise_in_one_measure_does_not_affect_another():
    results = results_of(1.0, 2.0, 1.0, 1.0)
    add_runs(results, "step", sd_fp32=[1.0], diffusers_fp32=[2.0])
    add_runs(results, "decode", sd_fp32=[1.0], diffusers_fp32=[2.0])
    step, decode = results.ratios().splitlines()[2:4]
    assert "too noisy" in step
    assert decode.endswith("| 0.50 | 0.50 |  | 1 |")


def test_who_is_compared_with_whom():
    row = ["sd fp32", "diffusers fp32", "openvino fp32", "sd bf16", "diffusers bf16", "sd bf16 compiled"]
    assert pairs("step", row) == [
        ("sd fp32", "diffusers fp32"),
        ("sd fp32", "openvino fp32"),
        ("sd bf16", "diffusers fp32"),
        ("sd bf16", "diffusers bf16"),
        ("sd bf16 compiled", "diffusers fp32"),
    ]
    assert pairs("convert", ["sd bf16", "copies bf16"]) == [("sd bf16", "copies bf16")]
    assert pairs(f"{FEW_STEPS}fp32, s", ["guided", "a", "b"]) == [("a", "guided"), ("b", "guided")]
    assert pairs("tiny", ["sd"]) == []


def test_a_product_of_matrices_has_a_rate():
    assert 1e8 < steady_gemm(torch.device("cpu"), torch.float32, seconds=0.01, side=256) < 1e15


@pytest.mark.parametrize(
    "arguments, runs",
    [
        ([], {"step": 9, "decode": 9, "convert": 9, "load": 3, "picture": 1}),
        (["--quick"], {"step": 2, "picture": 1}),
        (["--quick", "--runs", "5"], {"step": 5, "picture": 5}),
    ],
)
def test_the_number_of_runs(arguments, runs):
    options = parse(arguments)
    assert {measure: runs_of(measure, options) for measure in runs} == runs


@pytest.mark.parametrize("installed", [True, False])
def test_what_is_not_measured_is_said(installed, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    options, results = parse(["--only", "step", "--device", "cpu"]), results_of()
    found = take_part(options, ["fp32"], "fp32", results)
    assert results.not_measured[:2] == [
        "Not measured: a GPU, because torch can use none here.",
        "Not measured: bfloat16, because this CPU does not multiply it natively, as far as its flags say.",
    ]
    if installed:
        assert found == [("sd", "fp32"), ("diffusers", "fp32"), ("openvino", "fp32")]
        assert len(results.not_measured) == 2
    else:
        assert found == [("sd", "fp32")]
        assert results.not_measured[2:] == [
            "Not measured: diffusers, because it is not installed: `pip install -r requirements-dev.txt`.",
            "Not measured: OpenVINO, because it is not installed: `pip install -r requirements-benchmark.txt`.",
        ]


def test_openvino_needs_native_bfloat16(monkeypatch):
    """Elsewhere it silently computes in float32."""
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name == "openvino")
    options, results = parse(["--only", "decode", "--device", "cpu"]), results_of()
    assert ("openvino", "bf16") in take_part(options, ["bf16"], "bf16", results)
    assert take_part(options, ["bf16"], "fp32", results) == [("sd", "bf16")]
    assert results.not_measured[-1] == (
        "Not measured: OpenVINO in bf16, because this CPU does not multiply it natively."
    )


def test_openvino_takes_part_on_cpus_only(monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: True)
    options, results = parse(["--only", "step", "--device", "cuda"]), results_of()
    assert take_part(options, ["fp16"], "fp16", results) == [("sd", "fp16"), ("diffusers", "fp16")]
    assert results.not_measured == []


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
        self.name, self.library, self.seconds, self.asked = "sd fp32", "sd", list(seconds), []

    def ask(self, *command):
        self.asked.append(command)
        return {"seconds": 0.0 if command[0] == "prepare" else self.seconds.pop(0), "resident": 3.0}


@pytest.mark.parametrize(
    "arguments, seconds, counted",
    [(["--runs", "3"], [9.0, 8.0, 7.0], 3), (["--quick"], [9.0, 8.0], 1), (["--quick"], [1.0, 2.0], 2)],
)
def test_slow_measures_are_not_repeated_with_quick(arguments, seconds, counted):
    results, clock = results_of(), Clock(*seconds)
    take_turns(parse(arguments), "step", [clock], results)
    assert clock.asked == [("prepare", "step"), *[("step",)] * counted]
    assert results.figures["step"]["sd fp32"] == seconds[:counted]
    assert results.figures["peak resident memory after a step, GB"] == {"sd fp32": [3.0]}


def test_throughput_stops_when_memory_runs_out():
    results, clock = results_of(), Clock(2.0, 2.0, math.inf)
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


@pytest.mark.slow
def test_openvino_computes_what_we_compute(checkpoint, tmp_path):
    pytest.importorskip("openvino")
    from scripts.benchmarks.openvino_networks import convert

    convert(checkpoint, tmp_path / "openvino")
    theirs, ours = (kind(str(checkpoint), "cpu", torch.float32) for kind in (OpenVINO, Ours))
    theirs.load(str(tmp_path / "openvino"))
    ours.load()
    with torch.no_grad():
        torch.testing.assert_close(theirs.step(), ours.step(), rtol=0, atol=1e-4)
        levels = np.abs(theirs.decode().astype(int) - ours.decode().astype(int))
        assert levels.max() <= 1
        theirs.prepare("picture")
        theirs.picture(steps=2)


def test_a_checkpoint_and_its_add_ons_draw_in_every_way(checkpoint, tmp_path):
    write_add_ons(checkpoint, tmp_path)
    contestant = FewSteps(str(checkpoint), "cpu", torch.float32)
    contestant.load(str(tmp_path))
    contestant.side = 8  # 16x16 pixels
    images = {name: contestant.way(name, steps=3) for name in WAYS}
    plain = {"height": 64, "width": 64, "n_inference_steps": 3, "sampler_name": "dpm++2m", "seed": 0}
    assert (images["guided"] == generate([PROMPT], models=contestant.models, **plain)).all()
    assert len({image.tobytes() for image in images.values()}) == len(WAYS)
    assert {image.shape for image in images.values()} == {(1, 64, 64, 3)}


def test_ways_take_turns(monkeypatch):
    clock = Clock(*[1.0] * 12)
    clock.load = lambda: None
    monkeypatch.setattr(benchmark, "workers", lambda _: nullcontext([clock]))
    monkeypatch.setattr(benchmark, "run", lambda *_: "")
    monkeypatch.setattr(benchmark, "from_cold", lambda *_: None)
    results = results_of()
    few_steps(parse(["--few-steps", "--runs", "2", "--steps", "5"]), ["fp32"], Path("x.ckpt"), results)
    assert clock.asked == [("prepare", "way", way, 3) for way in WAYS] + [("way", way, 5) for way in WAYS] * 2
    assert results.figures[f"{FEW_STEPS}fp32, s"] == {way: [1.0, 1.0] for way in WAYS}
    assert len(results.products[f"{FEW_STEPS}fp32, s"]) == 3


def test_few_steps_are_all_or_added():
    assert parse(["--few-steps"]).only == []
    assert parse(["--few-steps", "--only", "step"]).only == ["step"]


@pytest.mark.slow
def test_a_whole_benchmark(checkpoint, tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = ["--only", "step", "--alone", "--runs", "2", "--device", "cpu", "--dtypes", "fp32"]
    assert main([*flags, "--checkpoint", str(checkpoint), "--json", str(path)]) == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    assert f"| {MEASURES['step']} | sd fp32 |" in printed
    assert {who: len(runs) for who, runs in written["figures"]["step"].items()} == {"sd fp32": 2}
    assert len(written["products"]["step"]) == 3  # before, between and after the runs
    assert all(line in printed for line in written["not measured"])


@pytest.mark.slow
def test_a_demo_from_cold(checkpoint, tmp_path):
    write_add_ons(checkpoint, tmp_path)
    results = results_of()
    options = parse(["--runs", "1", "--device", "cpu"])
    from_cold(options, "fp32", checkpoint, str(tmp_path), results)
    whole, rest = results.figures.values()
    (drawing,), (reading,) = whole.values()
    assert rest["sd"] == [drawing - reading]
    assert drawing > reading > 0.2


@pytest.mark.slow
def test_loading_beside_a_loop_of_copies(checkpoint):
    results = results_of()
    convert(parse(["--runs", "1"]), checkpoint, results)
    assert list(results.figures["convert"]) == ["sd bf16", "copies bf16"]
    assert all(0 < seconds < 60 for (seconds,) in results.figures["convert"].values())


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
