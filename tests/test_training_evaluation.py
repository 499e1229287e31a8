"""The judge's arithmetic, on answers worked out by hand."""

import pytest
import torch

from sd.training.evaluation import ABSENT, CLASSES, interval, judge_accuracy, make_prompts, targets
from sd.training.scenes import ATTRIBUTES, Scene, is_held_out

HOUSE = Scene("noon", "hills", "house", "red", "left", True, False)
EMPTY = Scene("night", "sea", "none", "red", "left", False, True)


class Parrot(torch.nn.Module):
    """A judge that sees in picture i what `answers[i]` says."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        one_hot = [torch.nn.functional.one_hot(self.answers[:, i], n) for i, n in enumerate(CLASSES)]
        return torch.cat(one_hot, dim=1).float()


def test_targets_are_the_numbers_of_the_values():
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


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_of_the_kind_asked_for(held_out):
    scenes, prompts = make_prompts(20, held_out)
    assert len(prompts) == 20
    assert all(is_held_out(scene) == held_out for scene in scenes)
    assert (scenes, prompts) == make_prompts(20, held_out)


def test_the_interval_is_under_three_points():
    assert interval(0.95, 400) < 0.03
    assert interval(1.0, 400) > 0
    assert interval(0.5, 100) == pytest.approx(0.0962, abs=1e-3)
