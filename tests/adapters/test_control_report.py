"""Recordings, films and reports of images that a ControlNet steered."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate
from sd.adapters.control import Control, Steering
from sd.inside.film import frames
from sd.inside.recording import record
from sd.inside.report import report
from sd.inside.tracer import Tracer
from sd.pipeline import encode_prompt
from sd.request import Request
from tests.support.control import random_controlnet
from tests.support.pages import Page
from tests.support.synthetic import MICRO, random_models

# One of the two ControlNets here never works, and a warning says so.
pytestmark = pytest.mark.filterwarnings("ignore:control has no effect")

OPTIONS = {"seed": 3, "n_inference_steps": 4, "height": 64, "width": 48}
HINT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.fixture(scope="module")
def control():
    net = random_controlnet(MICRO.unet)
    net.source = "folder/<canny>.pth"
    return [Control(net, HINT, 0.5, end=0.5), Control(random_controlnet(MICRO.unet, 1), HINT, start=0.9)]


@pytest.fixture(scope="module")
def made(models, control):
    with Tracer(models, attention=True) as trace:
        recording = record(Request("a cat", **OPTIONS, control=control), models)
    return recording, report(recording, frames(recording), trace, {"Seed": "3"}, "demo")


def test_a_recording_is_what_generate_makes(models, control, made):
    assert np.array_equal(made[0].image, generate("a cat", models=models, control=control, **OPTIONS))


def test_the_residuals_are_those_of_a_step_in_which_it_worked(models, control, made):
    recording = made[0]
    residuals, nothing = recording.residuals
    assert nothing is None  # the other one never works
    assert residuals.moment.index == 1
    latents, step = residuals.moment.latents, residuals.moment.index
    context, times = encode_prompt(models, "a cat", None), torch.tensor([residuals.moment.timestep])
    strong = Steering([replace(control[0], strength=1)], latents).residuals(latents, context, times, step, 4, False)
    assert len(residuals.maps) == 13
    for kept, full in zip(residuals.maps, strong):
        torch.testing.assert_close(kept, full / 2)


def test_the_page_shows_them(made):
    page = Page(made[1])
    assert [tag for tag, _ in page.elements if tag == "h2"] == ["h2"] * 7
    alts = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert sum(alt.startswith("Residual: for down.") for alt in alts) == 4
    assert sum(alt.startswith("Residual: for the middle") for alt in alts) == 1
    assert any(alt.startswith("<canny>.pth: its image; strength 0.5, from 0% to 50%") for alt in alts)
    assert any(alt.startswith("A ControlNet: ") and alt.endswith("at work in none") for alt in alts)
    assert "<canny>" not in made[1]


def test_a_page_without_a_controlnet_has_no_such_section(models):
    with Tracer(models, attention=True) as trace:
        recording = record(Request("a cat", **OPTIONS), models)
    assert "ControlNet" not in report(recording, frames(recording), trace, {}, "demo")
