"""The same seed gives the same bytes, in the same process and in another one."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

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
    """Two 64 x 64 images by each of N samplers, uint8 (2 N, 64, 64, 3). The second image starts from the first."""
    models = models.get("models") or random_models(MICRO)
    pictures = []
    for sampler in samplers:
        settings = {"models": models, "sampler_name": sampler, "n_inference_steps": 5, "seed": 7}
        pictures.append(generate("a (red:1.3) house, at noon", "blurry", **settings))
        pictures.append(generate("a cat", input_image=pictures[-1], strength=0.6, **settings))
    return np.stack(pictures)


def draw_elsewhere(samplers, threads=1):
    """`draw` in another process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", CODE, *samplers]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr.decode()
    return np.frombuffer(result.stdout, np.uint8).reshape(2 * len(samplers), 64, 64, 3)


def test_the_same_bytes_again_and_in_another_process():
    samplers, models = ["dpm++2m", "euler_a"], random_models(MICRO)
    first = draw(samplers, models=models)
    assert np.array_equal(first, draw(samplers, models=models))
    assert np.array_equal(first, draw_elsewhere(samplers, torch.get_num_threads()))
    assert first.std() > 10


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
