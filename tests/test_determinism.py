"""The same seed, the same bytes: from run to run, and from process to process."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from sd import generate
from sd.samplers import SAMPLERS
from tests import ROOT
from tests.support.synthetic import MICRO, random_models

CODE = """
import sys
from tests.test_determinism import draw
sys.stdout.buffer.write(draw(sys.argv[1:]).tobytes())
"""


def draw(samplers, **models):
    """Two 64 x 64 pictures by each sampler -> uint8 (2 N, 64, 64, 3). The second starts from the first."""
    models = models.get("models") or random_models(MICRO)
    pictures = []
    for sampler in samplers:
        settings = {"models": models, "sampler_name": sampler, "n_inference_steps": 5, "seed": 7}
        pictures.append(generate("a (red:1.3) house, at noon", "blurry", **settings))
        pictures.append(generate("a cat", input_image=pictures[-1], strength=0.6, **settings))
    return np.stack(pictures)


def draw_elsewhere(samplers, threads=1):
    """The same in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", CODE, *samplers]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr.decode()
    return np.frombuffer(result.stdout, np.uint8).reshape(2 * len(samplers), 64, 64, 3)


def test_the_same_bytes_from_run_to_run():
    models = random_models(MICRO)
    first = draw(["dpm++2m", "ddpm"], models=models)
    assert np.array_equal(first, draw(["dpm++2m", "ddpm"], models=models))
    assert first.std() > 10


def test_the_same_bytes_from_process_to_process():
    first, second = (draw_elsewhere(["dpm++2m", "euler_a"]) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bytes_from_every_sampler(threads):
    runs = [draw_elsewhere(list(SAMPLERS), threads) for _ in range(3)]
    print(f"{threads} threads:", {hashlib.sha256(run).hexdigest()[:16] for run in runs})
    assert all(np.array_equal(runs[0], run) for run in runs)


@pytest.mark.slow
def test_another_number_of_threads_changes_pixels_by_rounding_only():
    one, two = (draw_elsewhere(list(SAMPLERS), threads).astype(int) for threads in (1, 2))
    difference = np.abs(one - two)
    print(f"1 and 2 threads: {(difference > 0).mean():.2%} of the values differ, by {difference.max()} at most")
    assert difference.max() <= 2
