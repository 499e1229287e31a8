"""Warnings of sd name the line of the caller, so that it is the one that a user sees and a filter can match."""

import inspect

import numpy as np
import pytest
import torch

from sd import generate, load_models, pipeline
from sd.samplers.ddim import DDIMSampler
from tests import ROOT

SMALL = {"height": 32, "width": 32, "n_inference_steps": 1, "seed": 0}


@pytest.fixture(scope="module")
def tiny():
    return load_models(device="cpu", dtype=torch.float32)


def draw_without_guidance(models):
    generate("a house", "fog", models=models, cfg_scale=1, sampler_name="lcm", **SMALL)


def draw_from_late_timesteps(models):
    generate("a house", models=models, sampler_name="ddim", **SMALL)


def draw_nothing_in_a_black_mask(models):
    image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    generate("a house", input_image=image, mask_image=mask, models=models, sampler_name="lcm", **SMALL)


def encode_a_long_text(models):
    pipeline.encode_prompt(models, "word " * 100, plain=True)


def make_a_sampler(models):
    DDIMSampler().set_inference_timesteps(501)


@pytest.mark.parametrize(
    "call, text",
    [
        (draw_without_guidance, "uncond_prompt has no effect"),
        (draw_from_late_timesteps, "With 1 step this sampler starts"),
        (draw_nothing_in_a_black_mask, "mask_image is black everywhere"),
        (encode_a_long_text, "Only 75 of"),
        (make_a_sampler, "With 501 steps"),
    ],
)
def test_a_warning_names_the_line_that_called(tiny, call, text):
    with pytest.warns(UserWarning, match=f"^{text}") as caught:
        call(tiny)
    lines, first = inspect.getsourcelines(call)
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, first + len(lines) - 1)]


def test_every_module_warns_that_way():
    files = (ROOT / "sd").rglob("*.py")
    found = [file for file in files if "warnings.warn(" in file.read_text(encoding="utf-8")]
    assert found == [ROOT / "sd/runtime/__init__.py"]
