"""scripts/sample.py on several ranks: the store, the queue, torchrun, and ranks that are killed."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.distributed import HashStore

from scripts import sample
from scripts.support.work_queue import DictStore, Ranks, Refused, connect

SCRIPT = Path(sample.__file__)
FLAGS = ["--wait", "100", "--width", "32", "--height", "40", "--device", "cpu", "--dtype", "fp32"]


def ranks(count, wait=5.0, store=None):
    """Ranks with one store, and the lines that they print."""
    store, said = store or HashStore(), []
    return [Ranks(store, rank, count, wait, said.append) for rank in range(count)], said


def all_at_once(work, given):
    """Calls `work` with each of `given` in threads. Returns what they returned or raised."""
    results = [None] * len(given)

    def one(i):
        try:
            results[i] = work(given[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_agree():
    both, said = ranks(2)
    seen = []
    assert all_at_once(lambda one: one.agree("a", {"rank": one.rank}, seen.extend), both) == [None, None]
    assert seen == [{"rank": 0}, {"rank": 1}]
    assert said == []


def test_ranks_that_disagree_are_refused_and_one_says_why():
    def work(one):
        one.agree("a", {"problem": "", "arguments": {"--steps": one.rank + 2}}, sample.find_problem)

    both, said = ranks(3)
    assert [type(result) for result in all_at_once(work, both)] == [Refused] * 3
    assert said == ["all ranks should have the same arguments: --steps is 2 on rank 0 and 3 on rank 1."]


def test_ranks_start_again_with_the_same_store():
    """As torchrun does after a failure."""
    store, seen = HashStore(), []
    for start in range(3):
        both, _ = ranks(2, store=store)
        all_at_once(lambda one, start=start: one.agree("a", {"start": start, "rank": one.rank}, seen.append), both)
        assert seen.pop() == [{"start": start, "rank": 0}, {"start": start, "rank": 1}]
        assert [one.take() for one in both] == [0, 1]
        assert both[1].finish(5) == 5


def test_a_problem_of_one_rank():
    one, other = ({"problem": problem, "arguments": {}} for problem in ("", "the disk is full."))
    assert sample.find_problem([one, one]) is None
    assert sample.find_problem([one, other]) == "rank 1: the disk is full."
    assert sample.find_problem([other, other]) == "the disk is full."


def test_a_rank_that_never_comes():
    (first, second, _), said = ranks(3, wait=0.2)
    results = all_at_once(lambda one: one.agree("a", {}, lambda said: None), [first, second])
    assert [type(result) for result in results] == [Refused, Refused]
    assert said == ["rank 2 did not come within 0.2 s (--wait): see what stopped it."]
    (_, second), said = ranks(2, wait=0.2)
    with pytest.raises(TimeoutError, match=r"rank 0 did not come within 0.4 s \(--wait\)"):
        second.agree("a", {}, lambda said: None)


def test_each_piece_is_taken_once():
    many, _ = ranks(4)

    def work(one):
        one.agree("begin", {}, lambda said: None)
        taken = []
        while (number := one.take()) < 50:
            taken.append(number)
            one.finish(2)
        return taken

    results = all_at_once(work, many)
    assert sorted(number for taken in results for number in taken) == list(range(50))
    seen = []
    many[0].wait_for(100, seen.append)
    assert seen == [100]


def test_rank_0_does_not_wait_for_ever():
    (first, _), _ = ranks(2, wait=0.2)
    first.finish(3)
    with pytest.raises(TimeoutError, match="2 pictures are missing, and no rank finished one for 0.2 s"):
        first.wait_for(5, lambda finished: None)


def test_a_store_that_is_gone():
    class Gone(DictStore):
        def add(self, key, amount):
            raise RuntimeError("Broken pipe.\nException raised from sendBytes at Utils.hpp:645")

    (first,), _ = ranks(1, store=Gone())
    with pytest.raises(ConnectionError, match=r"^the store of torchrun cannot be reached \(Broken pipe\)\.$"):
        first.take()


def test_no_free_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in environment(0, 2, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=rf"store of torchrun at 127\.0\.0\.1:{port} cannot be reached"):
            connect(2, print)


def environment(rank, count, port):
    """What torchrun sets for a rank, apart from what it needs to restart them."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in known.items()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(checkpoint, *more):
    return [str(part) for part in ("--prompts", "p.txt", *FLAGS, "--checkpoint", checkpoint, *more)]


def records(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.mark.slow
def test_two_ranks(monkeypatch, tmp_path, capsys, demo_checkpoint):
    """This process is rank 0, and one that it starts is rank 1."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("".join(f"house {i}\n" for i in range(12)) + "a (house\n")
    arguments = command(demo_checkpoint, "--steps", "2", "--batch", "2")
    port = free_port()
    program = [sys.executable, str(SCRIPT), *arguments, "--out", "two"]
    other = subprocess.Popen(program, env=os.environ | environment(1, 2, port), stderr=subprocess.PIPE)
    for name, value in environment(0, 2, port).items():
        monkeypatch.setenv(name, value)
    try:
        code = sample.main([*arguments, "--out", "two"])
        assert other.wait(60) == 0
    finally:
        other.kill()
    assert other.stderr.read() == b""
    assert code == 2
    assert capsys.readouterr().err.endswith("sample.py: 1 of 13 pictures failed: two/manifest.jsonl says why.\n")
    for name in environment(0, 2, port):
        monkeypatch.delenv(name)
    assert sample.main([*arguments, "--out", "one"]) == 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert [one["index"] for one in records(tmp_path / "two")] == list(range(13))


def torchrun(arguments, ranks=2, cwd=None, **more):
    flags = [
        "--nproc-per-node",
        str(ranks),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        *more.pop("flags", []),
    ]
    program = [sys.executable, "-m", "torch.distributed.run", *flags, str(SCRIPT), *arguments]
    return subprocess.Popen(program, cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)


def said(process, timeout=120):
    """The lines of sample.py on standard error, and the exit status."""
    try:
        _, err = process.communicate(timeout=timeout)
    finally:
        process.terminate()  # after a time limit; torchrun then stops the ranks
    return [line for line in err.splitlines() if line.startswith("sample.py: ")], process.returncode


@pytest.fixture
def house(tmp_path):
    """A folder with a file of prompts."""
    (tmp_path / "p.txt").write_text("".join(f"house {i} {'of bricks ' * (i % 3)}\n" for i in range(24)))
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_torchrun_makes_the_pictures_of_one_process(house, demo_checkpoint, monkeypatch):
    arguments = command(demo_checkpoint, "--steps", "2")
    process = torchrun([*arguments, "--out", "two", "--batch", "3"], cwd=house)
    assert said(process) == ([], 0)
    monkeypatch.chdir(house)
    assert sample.main([*arguments, "--out", "one", "--batch", "3"]) == 0
    assert sample.main([*arguments, "--out", "alone", "--batch", "1"]) == 0
    made = contents(house / "one")
    assert len(made) == 24
    assert contents(house / "two") == made
    for name in made:
        assert np.abs(pixels(house / "alone" / name) - pixels(house / "one" / name)).max() <= 1
    without = [[one | {"seconds": 0} for one in records(house / folder)] for folder in ("one", "two", "alone")]
    assert without[0] == without[1] == without[2]


@pytest.mark.slow
def test_ranks_with_different_arguments(house, demo_checkpoint):
    """One sentence, and both exit."""
    port, arguments = free_port(), command(demo_checkpoint, "--out", "o", "--steps")
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments, str(rank + 2)],
            cwd=house,
            env=os.environ | environment(rank, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    wrong = "sample.py: all ranks should have the same arguments: --steps is 2 on rank 0 and 3 on rank 1.\n"
    assert errors == [wrong, ""]
    assert [process.returncode for process in processes] == [2, 2]
    assert not (house / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--out", "p.txt/o"], "--out should be a folder, but p.txt/o is a file, or is inside one."),
        (["--out", "o", "--steps", "0"], "--steps should be a whole number from 1 to 1000, not 0."),
        (["--out", "o", "--lamp", "1"], "unrecognized arguments: --lamp 1"),
    ],
)
def test_one_sentence_of_all_ranks(house, demo_checkpoint, flags, wrong):
    lines, status = said(torchrun(command(demo_checkpoint, *flags), cwd=house))
    assert (lines, status) == ([f"sample.py: {wrong}"], 1)  # 1 is torchrun's own


def workers(parent):
    """The processes of sample.py that a process of torchrun has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in children.read_text().split() if SCRIPT.name in Path(f"/proc/{pid}/cmdline").read_text()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")


def kill_a_rank(process, folder, rng, total):
    """Kills a random rank at a random moment after a random number of new pictures, or returns False at the end."""
    wanted = len(contents(folder)) + rng.randrange(1, 5)
    while len(list(folder.glob("*.png"))) < min(wanted, total):
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    time.sleep(rng.random() * 0.2)
    try:
        os.kill(rng.choice(workers(process.pid)), signal.SIGKILL)
    except (OSError, IndexError):
        return False  # they have finished
    return True


@needs_proc
@pytest.mark.slow
def test_ten_kills_lose_nothing_and_make_nothing_twice(house, demo_checkpoint, monkeypatch):
    rng = random.Random(int(os.environ.get("SEED", 0)))
    (house / "p.txt").write_text("".join(f"house {i}\n" for i in range(80)))
    arguments = command(demo_checkpoint, "--steps", "20", "--batch", "2")
    folder, kills, seen = house / "o", 0, {}
    for _ in range(30):
        process = torchrun([*arguments, "--out", "o"], cwd=house)
        killed = kills < 10 and kill_a_rank(process, folder, rng, 80)
        kills += killed
        lines, status = said(process)
        assert len(list(folder.glob(".sd-*.tmp"))) <= 2
        now = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("*.png")}
        assert now.items() >= seen.items(), "a picture was lost or made twice"
        seen = now
        if not killed:
            break
        assert status != 0
    assert (lines, status, len(seen)) == ([], 0, 80)
    assert kills >= 8
    found = records(folder)
    assert [one["index"] for one in found] == list(range(80))
    assert all(one["seconds"] > 0 for one in found)
    monkeypatch.chdir(house)
    assert sample.main([*arguments, "--out", "whole"]) == 0
    assert contents(house / "whole") == contents(folder)
    assert [one | {"seconds": 0} for one in records(house / "whole")] == [one | {"seconds": 0} for one in found]


@needs_proc
@pytest.mark.slow
def test_torchrun_restarts_the_ranks(house, demo_checkpoint):
    arguments = command(demo_checkpoint, "--steps", "20", "--out", "o")
    process = torchrun(arguments, cwd=house, flags=["--max-restarts", "2"])
    assert kill_a_rank(process, house / "o", random.Random(0), 24)
    assert said(process) == ([], 0)
    assert len(contents(house / "o")) == 24
    assert [one["index"] for one in records(house / "o")] == list(range(24))
