"""scripts/train_tiny.py under torchrun: one model for any number of ranks, restarts, and errors of one sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import train_tiny
from sd.checkpoints.files import read_checkpoint, write_checkpoint
from sd.config import SamplingConfig
from sd.training.loop import load_state
from tests.scripts.test_sample_ranks import environment, needs_proc
from tests.support.ranks import free_port
from tests.support.synthetic import FEW_LAYERS, random_state

SCRIPT = Path(train_tiny.__file__)
TEACHER = replace(FEW_LAYERS, sampling=SamplingConfig(steps=2, cfg_scale=3.0))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    write_checkpoint(path, random_state(TEACHER), TEACHER.to_dict())
    return path


def arguments(start, out, *more):
    flags = ["lcm", "--start", start, "--out", out, "--scenes", 8, "--device", "cpu", "--wait", 100, *more]
    return [str(flag) for flag in flags]


def torchrun(given, *flags):
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    # Without "--", torchrun takes --start for its own --start-method.
    program += ["--rdzv-endpoint", "localhost:0", *flags, "--", str(SCRIPT), *given]
    return subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process):
    """The lines of the script on standard error, its output, and the exit status."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()
    return [line for line in err.splitlines() if line.startswith("train_tiny.py: ")], out, process.returncode


def same_weights(one, other):
    one, other = (read_checkpoint(path).state for path in (one, other))
    return all((one[name] - other[name]).abs().max() < 1e-3 for name in one)


def test_two_ranks_write_the_file_of_one_process(start, tmp_path):
    assert train_tiny.main(arguments(start, tmp_path / "one", "--steps", 3)) == 0
    path = tmp_path / "two/lcm.safetensors"
    assert said(torchrun(arguments(start, tmp_path / "two", "--steps", 3))) == ([], f"{path}\n", 0)
    assert same_weights(tmp_path / "one/lcm.safetensors", path)
    names = {file.name for file in path.parent.iterdir()}
    assert names == {file.name for file in (tmp_path / "one").iterdir()}


def test_accumulation_and_recomputation_change_nothing(start, tmp_path):
    assert train_tiny.main(arguments(start, tmp_path / "one", "--steps", 2)) == 0
    assert train_tiny.main(arguments(start, tmp_path / "two", "--steps", 2, "--accumulate", 4, "--recompute")) == 0
    assert same_weights(tmp_path / "one/lcm.safetensors", tmp_path / "two/lcm.safetensors")


@needs_proc
def test_torchrun_restarts_ranks_from_the_last_state(start, tmp_path):
    given = arguments(start, tmp_path / "o", "--steps", 12, "--save-every", 0.0001)
    process, state = torchrun(given, "--max-restarts", "3"), tmp_path / "o/lcm.state"
    for step in (2, 5):
        while not state.exists() or load_state(state)["step"] < step:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
    lines, _, status = said(process)
    assert status == 0, lines
    assert train_tiny.main(arguments(start, tmp_path / "whole", "--steps", 12)) == 0
    assert load_state(state)["step"] == 12
    assert same_weights(tmp_path / "whole/lcm.safetensors", tmp_path / "o/lcm.safetensors")


def ranks_of(process):
    """The processes of the script that torchrun has started, or waits until there are two."""
    children, found = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
    while len(found) < 2:
        found = [int(pid) for pid in children.read_text().split() if SCRIPT.name in command_line(pid)]
    return found


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    "more, wrong",
    [
        (["--steps", "0"], r"--steps should be a number above 0, not 0\."),
        (["--lamp", "1"], "unrecognized arguments: --lamp 1"),
        (
            ["--batch", "8", "--accumulate", "5"],
            r"rank [01]: The batch of stage lcm should have at least 10 rows, .*not 8\.",
        ),
        (["--scenes", "4"], r"rank [01]: The number of prompts should be at least 8, not 4\."),
    ],
)
def test_one_sentence_of_all_ranks(start, tmp_path, more, wrong):
    lines, out, status = said(torchrun(arguments(start, tmp_path / "out", *more)))
    assert len(lines) == 1
    assert re.fullmatch(f"train_tiny.py: {wrong}", lines[0])
    assert (out, status) == ("", 1)  # 1 is torchrun's own


def by_hand(rank, port, given):
    program = [sys.executable, str(SCRIPT), *given]
    return subprocess.Popen(
        program, env=os.environ | environment(rank, 2, port), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_ranks_with_different_flags(start, tmp_path):
    port = free_port()
    processes = [by_hand(rank, port, arguments(start, tmp_path / "o", "--steps", rank + 2)) for rank in range(2)]
    results = [said(process) for process in processes]
    wrong = "train_tiny.py: all ranks should have the same arguments: --steps is 2 on rank 0 and 3 on rank 1."
    assert results == [([wrong], "", 2), ([], "", 2)]
    assert not (tmp_path / "o").exists()


def test_one_line_after_an_interruption(start, tmp_path):
    port, given = free_port(), arguments(start, tmp_path / "o", "--steps", 1000, "--save-every", 0.0001)
    processes = [by_hand(rank, port, given) for rank in range(2)]
    while not (tmp_path / "o/lcm.state").exists():
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGINT)
    results = [said(process) for process in processes]
    line = "train_tiny.py: interrupted; run the same command again to resume from the last saved state."
    assert results[0] == ([line], "", 130)
    assert results[1][:2] == ([], "")
    assert results[1][2] in (2, 130)


def test_a_rank_that_never_comes(start, tmp_path):
    lines, _, status = said(by_hand(0, free_port(), arguments(start, tmp_path / "o", "--steps", 2, "--wait", 2)))
    assert len(lines) == 1
    assert status == 2
    assert lines[0].endswith("not all ranks came within 2 s (--wait): see what stopped the others.")
    assert not (tmp_path / "o").exists()


def test_a_port_that_is_taken(start, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        lines, _, status = said(by_hand(0, port, arguments(start, tmp_path / "o", "--wait", 2)))
    assert status == 2
    assert len(lines) == 1
    assert f"the store of torchrun at 127.0.0.1:{port} cannot be reached" in lines[0]


def test_a_folder_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").touch()
    lines, _, status = said(torchrun(arguments(start, tmp_path / "file/o", "--steps", 2)))
    assert len(lines) == 1
    assert lines[0].endswith("cannot be created: it or a parent of it is a file.")
    assert status == 1
