"""The `--slow` option, settings for the libraries that the tests use, and fixtures that several files share."""

import os
import sys

import pytest
from hypothesis import settings

# Keep the reference libraries off the network. Set before they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# Tests are small. On a busy machine, threads that wait for each other cost more time than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No time limit per example: a test should not fail because the machine is busy.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects slow tests, unless `--slow`, `-m` or a node id selects them."""
    named = any("::" in argument for argument in config.invocation_params.args)
    if config.getoption("--slow") or config.getoption("-m") or named:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory):
    """A checkpoint of a very small model with random weights, and few layers: loading builds each of them."""
    from sd.checkpoints.files import write_checkpoint
    from tests.support.synthetic import FEW_LAYERS, random_state

    path = tmp_path_factory.mktemp("weights") / "micro.ckpt"
    write_checkpoint(path, random_state(FEW_LAYERS), FEW_LAYERS.to_dict())
    return path


@pytest.fixture
def run_demo(monkeypatch, tmp_path, capsys, demo_checkpoint):
    """Runs the demo in an empty folder. Returns the exit code, standard output and standard error."""
    from scripts import demo

    quick = ["--steps", "2", "--width", "32", "--height", "40", "--device", "cpu", "--dtype", "fp32"]
    monkeypatch.chdir(tmp_path)

    def run_demo(*arguments):
        given = [*quick, "--checkpoint", demo_checkpoint, *arguments]
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, given)])
        try:
            code = demo.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_demo
