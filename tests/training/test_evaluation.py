"""The figures of the evaluation against values computed by hand, and the counting of suns on renders."""

import random

import numpy as np
import pytest
import torch

from sd.training import loop
from sd.training.data import CaptionedImages
from sd.training.evaluation import (
    ABSENT,
    CLASSES,
    JudgeStage,
    count_lights,
    interval,
    judge_accuracy,
    lights_accuracy,
    make_prompts,
    targets,
)
from sd.training.world.render import render
from sd.training.world.scenes import ATTRIBUTES, Scene, is_held_out, random_scene

HOUSE = Scene("noon", "hills", "house", "red", "left", True, False)
EMPTY = Scene("night", "sea", "none", "red", "left", False, True)


class Parrot(torch.nn.Module):
    """A judge whose answer for image i is `answers[i]`."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        one_hot = [torch.nn.functional.one_hot(self.answers[:, i], n) for i, n in enumerate(CLASSES)]
        return torch.cat(one_hot, dim=1).float()


def test_targets_are_the_indices_of_the_values():
    assert targets(HOUSE) == [1, 1, 1, 0, 0, 1, 0]


def test_an_empty_scene_has_no_colour_and_no_position():
    assert targets(EMPTY) == [3, 3, 0, ABSENT, ABSENT, 0, 1]


def test_accuracy_counts_what_was_asked_for():
    wanted = torch.tensor([targets(HOUSE), targets(HOUSE), targets(EMPTY)])
    answers = wanted.clamp(min=0)
    answers[1, 3] = 4  # the second house is purple
    shares = judge_accuracy(Parrot(answers), torch.zeros(3, 3, 8, 8), wanted)
    assert shares["colour"] == 0.5
    assert all(shares[name] == 1 for name in ATTRIBUTES if name != "colour")
    assert shares["mean"] == pytest.approx(6.5 / 7)
    assert shares["all"] == pytest.approx(2 / 3)


def test_the_judges_loss_does_not_depend_on_the_number_of_cores(tmp_path, monkeypatch):
    """One part of the batch may have fewer scenes with a colour than another, or none."""
    monkeypatch.setattr(loop.os, "cpu_count", lambda: 2)
    torch.manual_seed(0)
    scenes = [HOUSE, EMPTY, EMPTY, EMPTY]
    stage = JudgeStage(CaptionedImages(np.zeros((4, 64, 64, 3), np.uint8), [[""]] * 4), scenes)
    training = loop.Training(stage, tmp_path, torch.device("cpu"), 1.0, 5, seed=0)
    batch = torch.randn(64, 3, 64, 64), torch.tensor([targets(scene) for scene in scenes]).repeat_interleave(16, dim=0)
    parts = zip(*(tensor.chunk(training.workers) for tensor in batch))
    with torch.no_grad():
        shares = sum(stage.loss(*part).item() * len(part[0]) / 64 for part in parts)
        assert shares == pytest.approx(stage.loss(*batch).item(), rel=1e-4)


def lights_of_a_render(scene, seed, mirror=False):
    image = torch.from_numpy(np.asarray(render(scene, seed)).copy()).permute(2, 0, 1).float() / 127.5 - 1
    left = image[:, :, :64]  # where the sun is if there is no thing
    return count_lights(torch.cat([left, left.flip(-1)], dim=-1) if mirror else image, scene.time)


def test_suns_and_moons_are_counted():
    rng = random.Random(0)
    for seed in range(150):
        scene = random_scene(rng, held_out=None)
        assert lights_of_a_render(scene, seed) == scene.light


@pytest.mark.parametrize("time", ATTRIBUTES["time"])
def test_two_suns_are_counted_as_two(time):
    scene = Scene(time, "sea", "none", "red", "left", light=True, clouds=False)
    assert lights_of_a_render(scene, 0, mirror=True) == 2


def test_the_share_with_the_right_number_of_lights():
    scenes = [Scene("noon", "sea", "none", "red", "left", light, False) for light in (True, True, False, False)]
    black = torch.full((4, 3, 128, 128), -1.0)
    assert lights_accuracy(black, scenes) == 0.5


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_held_out_or_not_as_requested(held_out):
    scenes, prompts = make_prompts(20, held_out)
    assert len(prompts) == 20
    assert all(is_held_out(scene) == held_out for scene in scenes)
    assert (scenes, prompts) == make_prompts(20, held_out)


def test_the_interval_is_under_three_points():
    assert interval(0.95, 400) < 0.03
    assert interval(1.0, 400) > 0
    assert interval(0.5, 100) == pytest.approx(0.0962, abs=1e-3)
