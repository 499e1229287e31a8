"""The processes of the benchmark: workers, each with one library, and commands that run once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A process that runs one library. `ask` sends it a command and waits for the answer."""

    def __init__(
        self, library: str, dtype: str, device: str, path: Path, compiled: bool = False, folder: Path | None = None
    ):
        """`path` is the checkpoint, `folder` what `load` reads besides."""
        how = ["compiled"] if compiled else []
        self.library, self.folder = library, folder
        self.name = " ".join([library, dtype, *how])
        command = [sys.executable, ROOT / "scripts/benchmarks/worker.py", library, dtype, device, path, *how]
        self.started, pipe = time.perf_counter(), subprocess.PIPE
        # A new session, so that Ctrl-C reaches only this process, which then ends the workers.
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

    def ask(self, *command: object) -> dict[str, float]:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"{self.name} ended during {command[0]}: see above.")
        answer = json.loads(answer)
        if command[0] == "load" and answer["seconds"] == math.inf:
            raise ChildProcessError(f"{self.name} does not fit into memory with the others: choose fewer --dtypes.")
        return answer

    def load(self) -> float:
        """Seconds."""
        return self.ask("load", *([] if self.folder is None else [str(self.folder)]))["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def workers(contestants: list[tuple]) -> Iterator[list[Worker]]:
    """Starts all workers at once. Idle workers cost only memory."""
    started = [Worker(*contestant) for contestant in contestants]
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


def run(*command: object) -> str:
    """The output of a command. Raises ChildProcessError if it fails."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(map(str, command[:3]))} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
