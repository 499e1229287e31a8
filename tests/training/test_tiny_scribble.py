"""The shipped ControlNet is followed, says the measure of `sd.training.following`."""

import pytest
import torch

import sd
from sd.adapters.controlnet_files import load_controlnet
from sd.files import DATA
from sd.training.following import measure_following
from sd.training.judge import load_judge
from tests import ROOT

FILE = DATA / "tiny-scribble.safetensors"


@pytest.fixture(scope="module")
def models():
    return sd.load_models(device="cpu", dtype=torch.float32)


def follow(models, kind, count, *settings):
    judge = load_judge(ROOT / "tests" / "support" / "judge.safetensors")
    shares, _ = measure_following(models, load_controlnet(FILE, models), judge, kind, count, *settings)
    return {name: share for name, (share, _) in shares.items()}


def test_it_is_small_and_fits_the_tiny_model(models):
    assert FILE.stat().st_size <= 6.6e6
    assert load_controlnet(FILE, models).config == models.config.unet


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["outlines", "scribbles"])
@pytest.mark.parametrize("fast", [False, True], ids=["20 steps", "4 steps"])
def test_scenes_are_drawn_again_along_their_lines(models, kind, fast):
    if fast:
        shares = follow(models.with_loras([DATA / "tiny-lcm.safetensors"]), kind, 25, "lcm", 4, 1.0)
    else:
        shares = follow(models, kind, 25, "dpm++2m", 20, 5.0)
    assert shares["given"] > 0.81  # of 25 scenes; of 200, see sd/training/README.md
    assert shares["found"] > 0.84
    assert min(shares[name] for name in ("thing", "position", "colour")) > 0.95
