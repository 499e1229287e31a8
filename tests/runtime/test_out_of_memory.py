"""Memory does not leak from image to image, and after running out of it the process can go on."""

import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from sd import generate
from sd.runtime.out_of_memory import OutOfMemory, explain_out_of_memory
from tests import ROOT
from tests.support.synthetic import MICRO, random_models

QUICK = {"seed": 1, "n_inference_steps": 2, "height": 32, "width": 32}
ERRORS = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)."),
    "mps, one tensor": RuntimeError("Invalid buffer size: 12.00 GB"),
    "python": MemoryError(),
}


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.mark.parametrize("network", ["clip", "encoder", "diffusion", "decoder"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_running_out_of_memory_ends_with_advice_and_the_process_goes_on(models, monkeypatch, network, error):
    picture = np.zeros((32, 32, 3), np.uint8)
    expected = generate("a cat", input_image=picture, models=models, **QUICK)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(getattr(models, network), "forward", fail)
        with pytest.raises(
            OutOfMemory, match=r"^There is not enough memory \(.+\): ask for a smaller height"
        ) as caught:
            generate("a cat", input_image=picture, models=models, **QUICK)
    message = str(caught.value)
    assert all(word in message for word in ("width", "fewer prompts", "dtype=torch.float16", "idle_device='cpu'"))
    assert "\n" not in message
    assert np.array_equal(generate("a cat", input_image=picture, models=models, **QUICK), expected)


def test_a_network_that_did_not_fit_goes_back_completely(models, monkeypatch):
    moves = []

    def to(device):
        moves.append(str(device))
        if len(moves) == 1:
            raise ERRORS["cuda"]

    monkeypatch.setattr(models.diffusion, "to", to)
    with pytest.raises(OutOfMemory):
        generate("a cat", models=models, idle_device="cpu:0", **QUICK)
    assert moves == ["cpu", "cpu:0"]


def test_networks_go_back_to_the_idle_device(models, monkeypatch):
    moves = []
    monkeypatch.setattr(models.diffusion, "to", lambda device: moves.append(str(device)))
    monkeypatch.setattr(models.diffusion, "forward", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(OutOfMemory):
        generate("a cat", models=models, idle_device="cpu:0", **QUICK)
    assert moves == ["cpu", "cpu:0"]


def test_the_tensors_of_the_work_are_freed_while_the_error_is_still_held():
    kept = []

    def work():
        tensor = torch.zeros(1000)
        kept.append(weakref.ref(tensor))
        raise ERRORS["cpu"]

    with pytest.raises(OutOfMemory) as caught:
        explain_out_of_memory()(work)()
    assert caught.value
    assert kept[0]() is None


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), KeyError(1)]
)
def test_other_errors_are_unchanged(error):
    with pytest.raises(type(error)) as caught, explain_out_of_memory():
        raise error
    assert caught.value is error


FOR_REAL = """
import resource
import numpy as np, torch
from sd import generate
from sd.runtime.out_of_memory import OutOfMemory
from tests.support.synthetic import MICRO, random_models

models = random_models(MICRO)
quick = {"seed": 1, "n_inference_steps": 1, "input_image": np.zeros((32, 32, 3), np.uint8)}
before = generate("a cat", models=models, height=32, width=32, **quick)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (800 << 20),) * 2)
try:
    generate("a cat", models=models, height=4096, width=4096, **quick)
except OutOfMemory as error:
    print(error)
after = generate("a cat", models=models, height=32, width=32, **quick)
print((before == after).all())
"""

PICTURES = """
import resource, sys
from sd import generate
from tests.support.synthetic import MICRO, random_models

models, sizes = random_models(MICRO), []
for i in range(int(sys.argv[1])):
    generate(f"cat number {i}", models=models, seed=i, n_inference_steps=2, height=64, width=64)
    sizes.append(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
print((sizes[-1] - sizes[9]) / 1e6)
"""


def run(code, *arguments):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux, which reports the memory of a process")
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_running_out_of_memory_for_real():
    """The process may use 800 MB more, and the encoder's first feature map of 4096 x 4096 pixels takes 1 GB."""
    message, same = run(FOR_REAL).splitlines()
    assert message.startswith("There is not enough memory (")
    assert "can't allocate memory" in message
    assert same == "True"


@pytest.mark.slow
@pytest.mark.parametrize("count", [100])
def test_pictures_leave_no_memory_behind(count):
    """After the last picture, the process is at most 50 MB larger than after the tenth."""
    megabytes = float(run(PICTURES, count))
    print(f"{count} pictures: {megabytes:+.1f} MB")
    assert megabytes < 50
