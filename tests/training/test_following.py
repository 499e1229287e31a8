"""How well a ControlNet is followed, measured on pictures of which it is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts import evaluate_tiny
from sd.config import TINY
from sd.images import from_uint8
from sd.training import following
from sd.training.following import FIRST_SEED, WITHIN, measure_following, measure_renders, scenes_in_other_words
from sd.training.world.render import render
from sd.training.world.scenes import is_held_out

COUNT = 4


def measure(monkeypatch, kind, draw):
    monkeypatch.setattr(following, "draw_steered", lambda models, control, hints, *rest: draw(hints))
    models = SimpleNamespace(config=TINY)
    return measure_following(models, None, evaluate_tiny.load_judge(), kind, COUNT, "ddim", 2, 5.0)


def test_the_prompts_change_colour_and_time_only():
    pictures, prompts = scenes_in_other_words(COUNT, 32)
    assert pictures.shape == (COUNT, 3, 32, 32)
    assert not any(is_held_out(prompt.scene) for prompt in prompts)
    for prompt in prompts:
        assert prompt.scene.colour in prompt.text
        assert len(prompt.scene.things) == 1


@pytest.mark.parametrize("kind", WITHIN)
def test_the_scenes_themselves_have_all_lines_but_other_colours_and_times(monkeypatch, kind):
    pictures, _ = scenes_in_other_words(COUNT, TINY.image_size)
    rows, drawn = measure(monkeypatch, kind, lambda hints: pictures)
    assert torch.equal(drawn, pictures)
    assert rows["found"] == (1, COUNT)
    assert rows["given"][0] > (0.999 if kind == "outlines" else 0.95)
    assert rows["thing"] == rows["position"] == (1, COUNT)
    assert rows["colour"] == rows["time"] == (0, COUNT)


def test_plain_pictures_have_no_line(monkeypatch):
    rows, _ = measure(monkeypatch, "outlines", lambda hints: torch.zeros(len(hints), 3, 128, 128))
    assert rows["given"] == (0, COUNT)


def test_mirrored_pictures_have_other_lines(monkeypatch):
    pictures, _ = scenes_in_other_words(COUNT, TINY.image_size)
    rows, _ = measure(monkeypatch, "outlines", lambda hints: pictures.flip(3))
    assert rows["given"][0] < 0.5 > rows["found"][0]


def test_the_renders_of_other_times_are_measured_alike(monkeypatch):
    """They are what a picture would be that follows the toy world and not the lines."""
    _, prompts = scenes_in_other_words(COUNT, TINY.image_size)
    pictures = [np.asarray(render(prompt.scene, FIRST_SEED + i, TINY.image_size)) for i, prompt in enumerate(prompts)]
    drawn = from_uint8(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
    rows, _ = measure(monkeypatch, "scribbles", lambda hints: drawn)
    assert rows["colour"] == rows["time"] == (1, COUNT)
    assert measure_renders("scribbles", COUNT, TINY.image_size) == {name: rows[name] for name in ("given", "found")}
    assert 0.3 < rows["given"][0] < 0.95
