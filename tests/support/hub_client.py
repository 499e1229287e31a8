"""Runs Python code with the real client of the hub, in a new process: it reads its settings when it is imported.

The process is a fork of one that has imported torch already, which saves two seconds each time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.support.hub_server import Server

FORKS = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
FORKS.set_forkserver_preload(["sd.checkpoints.hub", "scripts.download", "tqdm"])


@dataclass
class Done:
    """What the code printed, and its exit status."""

    status: int
    out: str
    err: str


def settings(server: Server, cache: Path, **more: str) -> dict[str, str]:
    """This process's environment, with the server in place of the hub."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return mine | hub | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | more


def run_code(code: str, environment: dict[str, str], folder: Path) -> Done:
    """Runs `code` in a new process whose current folder is `folder`."""
    output = [folder / ".stdout", folder / ".stderr"]
    process = FORKS.Process(target=_run, args=(code, environment, folder, output))
    process.start()
    process.join()
    texts = [path.read_text(encoding="utf-8") for path in output]
    for path in output:
        path.unlink()
    return Done(process.exitcode, *texts)


def _run(code: str, environment: dict[str, str], folder: Path, output: list[Path]) -> None:
    assert "huggingface_hub" not in sys.modules
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdout, sys.stderr = (open(path, "w", encoding="utf-8") for path in output)  # noqa: SIM115
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as stop:
        sys.exit(stop.code)  # after the files are flushed
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
