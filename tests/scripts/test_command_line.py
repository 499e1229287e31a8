"""All scripts print one line and no traceback after Ctrl-C, after bad input, and if packages are missing."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts import benchmark, evaluate_tiny, make_gallery, train_tiny
from scripts.benchmarks import synthetic_checkpoint
from scripts.support.command_line import exit_status
from sd import files
from tests import ROOT

ENTRIES = ["demo", "download", "train_tiny", "evaluate_tiny", "make_gallery", "benchmark"]
ENTRIES += ["benchmarks/synthetic_checkpoint"]


def name_of(script):
    """How a script's errors begin: demo.py, benchmarks/synthetic_checkpoint.py."""
    return Path(script.__file__).relative_to(ROOT / "scripts").as_posix()


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "error, status, line",
    [
        (KeyboardInterrupt(), 130, "x.py: interrupted.\n"),
        (ValueError("This cannot be."), 2, "x.py: This cannot be.\n"),
        (ChildProcessError("It ended."), 2, "x.py: It ended.\n"),
        (MemoryError("Too little."), 2, "x.py: Too little.\n"),
    ],
)
def test_errors_are_one_line(capsys, error, status, line):
    def work():
        raise error

    assert exit_status("x.py", work, "interrupted.") == status
    assert capsys.readouterr().err == line


def test_success_prints_nothing(capsys):
    assert exit_status("x.py", lambda: "a result", "interrupted.") == 0
    assert capsys.readouterr() == ("", "")


def test_an_interruption_while_torch_is_imported_counts_afterwards(tmp_path, monkeypatch, capsys):
    """torch imports numpy from C and ignores errors there."""
    code = """
        import contextlib, signal
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    """
    (tmp_path / "torch.py").write_text(textwrap.dedent(code))
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGINT is ignored in a background run
    try:
        assert exit_status("x.py", lambda: pytest.fail("went on"), "interrupted.") == 130
        assert capsys.readouterr().err == "x.py: interrupted.\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)


def test_bugs_are_not_hidden():
    with pytest.raises(KeyError):
        exit_status("x.py", lambda: {}["nothing"], "interrupted.")


@pytest.mark.parametrize(
    "script, function, arguments",
    [
        (train_tiny, "train", []),
        (evaluate_tiny, "evaluate", []),
        (make_gallery, "prompts_sheet", ["--out", "gallery"]),
        (benchmark, "benchmark", []),
        (synthetic_checkpoint, "random_state", ["new/weights.safetensors"]),
    ],
)
def test_an_interruption_is_one_line_and_status_130(tmp_path, monkeypatch, capsys, script, function, arguments):
    monkeypatch.chdir(tmp_path)
    for name in ("steps_sheet", "changes_sheet"):
        monkeypatch.setattr(make_gallery, name, lambda models: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(script, function, interrupt)
    assert script.main(arguments) == 130
    error = capsys.readouterr().err
    assert error.startswith(f"{name_of(script)}: interrupted; ")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.rglob("*.*")} <= {"steps.png", "changes.png"}


def test_a_checkpoint_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic_checkpoint, "random_state", lambda *_: {"a": torch.zeros(9)})
    monkeypatch.setattr(files.os, "fsync", interrupt)
    assert synthetic_checkpoint.main([str(tmp_path / "a.safetensors")]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_a_python_without_packages_says_where_there_is_one(name, tmp_path):
    arguments = [tmp_path / "new.ckpt"] if name.endswith("synthetic_checkpoint") else []
    command = [sys.executable, "-I", "-S", ROOT / f"scripts/{name}.py", *arguments]  # without site-packages
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        f"{name}.py: this Python lacks torch, numpy, PIL, tqdm, regex, ftfy: run `sh scripts/demo.sh` once to install "
        f"them into .venv, then `.venv/bin/python scripts/{name}.py`.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_help_needs_no_packages(name):
    command = [sys.executable, "-I", "-S", ROOT / f"scripts/{name}.py", "--help"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith(f"usage: {name}.py")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no process groups")
def test_ctrl_c_reaches_all_processes_and_is_one_line(tmp_path):
    """A terminal sends Ctrl-C to the script and to the processes that draw scenes for it."""
    command = [sys.executable, ROOT / "scripts/train_tiny.py", "vae", "--out", tmp_path / "out"]
    log = tmp_path / "log"

    def heed_ctrl_c() -> None:  # a test run in the background of a shell ignores SIGINT, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with open(log, "w") as opened:
        process = subprocess.Popen(command, stderr=opened, start_new_session=True, preexec_fn=heed_ctrl_c)
    try:
        for _ in range(1000):
            if "drawing scenes:   0%" in log.read_text() and "/30000" in log.read_text():
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert "Traceback" not in said
    assert (
        said.splitlines()[-1]
        == "train_tiny.py: interrupted; run the same command again to resume from the last saved state."
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "script, arguments, sentence",
    [
        (evaluate_tiny, ["--steps", "5000"], "--steps should be a whole number from 1 to 1000, not 5000."),
        (evaluate_tiny, ["--deep-cache", "5000"], "--deep-cache should be a whole number from 1 to 1000, not 5000."),
        (evaluate_tiny, ["--cfg-scales", "5", "nan"], "--cfg-scales should be a number; 1 to 14 is usual, not nan."),
        (evaluate_tiny, ["--samplers", "ddpm", "magic"], "--samplers should be one of ddpm, "),
        (evaluate_tiny, ["--device", "abacus"], "--device should be one that torch can use here, such as 'cpu', not"),
        (evaluate_tiny, ["--checkpoint", "no.ckpt"], "There is no checkpoint no.ckpt: "),
        (evaluate_tiny, ["--out", "exists.png"], "--out should be a folder, but exists.png is a file, or is inside"),
        (evaluate_tiny, ["--out", "exists.png/in"], "--out should be a folder, but exists.png/in is a file, or is"),
        (
            make_gallery,
            ["--out", "exists.png"],
            "--out should be a folder, but exists.png is a file, or is inside one.",
        ),
        (make_gallery, ["--out", ".", "--earlier", "no.ckpt"], "There is no checkpoint no.ckpt: "),
        (train_tiny, ["--scenes", "4"], "The number of training images should be at least 8, not 4."),
        (train_tiny, ["--seed", "-1"], "--seed should be a whole number from 0 to 2**63 - 1, not -1."),
        (synthetic_checkpoint, ["new/a.png"], "The name of new/a.png should end in .safetensors, .ckpt, .pt, .pth."),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(tmp_path, monkeypatch, capsys, script, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("exists.png").write_text("kept")
    monkeypatch.setattr(evaluate_tiny, "train_judge", lambda *_: pytest.fail("trained before checking"))
    monkeypatch.setattr(make_gallery, "steps_sheet", lambda *_: pytest.fail("drawn before checking"))
    try:
        status = script.main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"{name_of(script)}: {sentence}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["exists.png"]
    assert Path("exists.png").read_text() == "kept"
