"""Runs the fuzzer in a separate process, and checks its report."""

import json
import subprocess
import sys
from pathlib import Path

from tests import ROOT


def fuzz(folder: Path, first: int, **counts: int) -> dict:
    """The report on `counts` cases of each kind.

    Asserts that each was read, or refused in one clear sentence, with under two seconds of processor time, under a
    gigabyte of memory and no other effect.
    """
    arguments = [str(folder), str(first), *(f"{what}={count}" for what, count in counts.items())]
    command = [sys.executable, "-m", "tests.support.fuzzer", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # a crash, or a hang of a minute
    report = json.loads(result.stdout)
    print(counts, report)
    assert report["wrong"] == {}
    assert sum(report["outcomes"].values()) == sum(counts.values())
    assert report["slowest"][0] < 2
    assert report["memory"] < 1 << 30
    return report
