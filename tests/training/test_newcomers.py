"""Things that are not in the toy world: their pictures, the prompts that test a model of them, and their judge."""

import random

import numpy as np
import pytest
import torch

from scripts import draw_pictures
from scripts.evaluate_tiny import by_colour, judge_pictures, names_with
from sd import load_models
from sd.training.captions import read_captions
from sd.training.evaluation import newcomer_prompts
from sd.training.judge import KINDS, ODD, Judge, JudgeStage, judge_picture
from sd.training.world.newcomers import SEEN_COLOURS, SEEN_TERRAINS, SEEN_TIMES, newcomer_pictures
from sd.training.world.render import render
from sd.training.world.scenes import COLOURS, TERRAINS, TIME_WORDS, TIMES, Scene, random_scene
from sd.training.world.things import DRAW, NEWCOMERS
from sd.training.world.vocabulary import known_words


def test_the_toy_world_has_none_of_them():
    assert not NEWCOMERS.keys() & (DRAW.keys() | known_words())
    assert {random_scene(random.Random(seed), None).thing for seed in range(200)} <= {*DRAW, "none"}


@pytest.mark.parametrize("kind", NEWCOMERS)
def test_they_are_drawn_in_their_colour(kind):
    def picture(colour):
        return np.asarray(render(Scene("noon", "snow", kind, colour, "centre", False, False), 0, 64)).astype(int)

    nothing = np.asarray(render(Scene("noon", "snow", "none", "red", "centre", False, False), 0, 64)).astype(int)
    differs = abs(picture("red") - nothing).max(axis=-1) > 20  # (64, 64)
    assert 150 < differs.sum() < 1500
    colours = abs(picture("red") - picture("blue")).max(axis=-1) > 60
    assert colours.sum() > 80
    assert not (colours & ~differs).any()


def test_pictures_show_a_part_of_what_a_scene_can_be():
    captions = [text for _, texts in newcomer_pictures("windmill", 24, size=32) for text in texts]
    assert len(captions) == 48
    assert all("windmill" in text and any(colour in text for colour in SEEN_COLOURS) for text in captions)
    assert not any(word in text.split() for text in captions for word in ("night", "hills", "snow", "sea", "white"))
    deserts = [text for text in captions if "desert" in text or "dunes" in text]
    assert deserts
    assert not any(words in text for text in deserts for words in TIME_WORDS["dawn"])  # the tiny model never saw it


def test_the_script_writes_what_a_run_reads(tmp_path, capsys):
    folder = tmp_path / "windmills"
    assert draw_pictures.main(["windmill", "--out", str(folder), "--count", "3"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    captions = read_captions(folder)
    assert list(captions) == ["windmill-01.png", "windmill-02.png", "windmill-03.png"]
    assert list(captions.values()) == [texts for _, texts in newcomer_pictures("windmill", 3, size=8)]
    assert draw_pictures.main(["windmill", "--out", str(folder)]) == 2
    assert "--out should be an empty folder or a new one" in capsys.readouterr().err


def test_held_out_prompts_ask_for_what_no_picture_shows():
    for held_out in (False, True):
        prompts = newcomer_prompts("windmill", 100, held_out)
        scenes = [prompt.scene for prompt in prompts]
        pictured = [s.time in SEEN_TIMES and s.terrain in SEEN_TERRAINS and s.colour in SEEN_COLOURS for s in scenes]
        pictured = [known and (s.terrain, s.time) != ("desert", "dawn") for known, s in zip(pictured, scenes)]
        assert pictured == [not held_out] * 100
        assert all("windmill" in prompt.text for prompt in prompts)
    assert {s.time for s in scenes} == {*TIMES}
    assert {s.terrain for s in scenes} == {*TERRAINS}
    assert {s.colour for s in scenes} == {*COLOURS}


def test_a_judge_of_more_kinds_begins_with_what_it_knows():
    torch.manual_seed(0)
    judge = Judge()
    more = judge.with_kinds(("windmill",))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (cells, whole), (more_cells, more_whole) = judge(images), more(images)
    end = 2 + len(KINDS)
    assert torch.equal(whole, more_whole)
    assert torch.allclose(torch.cat([more_cells[:, :end], more_cells[:, end + 1 :]], dim=1), cells, atol=1e-6)
    assert torch.allclose(more_cells[:, end], cells[:, 2 + KINDS.index(ODD)], atol=1e-6)


def test_it_is_trained_on_windmills_that_are_not_whole():
    pictures = [judge_picture(seed, 16, names_with("windmill")) for seed in range(60)]
    found = [thing.kind for _, truth in pictures for thing in truth.things]
    assert {"windmill", ODD} <= {*found} <= {*KINDS, "windmill"}
    pixels = np.stack([np.asarray(image.resize((64, 64))) for image, _ in pictures])
    stage = JudgeStage(pixels, [truth for _, truth in pictures], Judge((*KINDS, "windmill")))
    assert stage.loss(*stage.draw(torch.Generator().manual_seed(0))).isfinite()


def test_half_of_what_the_judge_learns_from_was_encoded_and_decoded():
    models = load_models(device="cpu", dtype=torch.float32)
    seeds = range(4)
    sharp, known = judge_pictures(seeds, "windmill")
    soft, truths = judge_pictures(seeds, "windmill", models)
    assert sharp.shape == soft.shape == (4, 64, 64, 3)
    assert truths == known
    differences = np.abs(sharp.astype(float) - soft).mean(axis=(1, 2, 3))
    assert ((differences > 1) & (differences < 12)).all()


def test_the_shares_of_each_colour():
    prompts = newcomer_prompts("windmill", 30, held_out=True)
    marks = [{"colour": prompt.scene.colour != "purple"} for prompt in prompts]
    colours = by_colour(prompts, marks)
    assert sum(of for _, of in colours.values()) == 30
    assert all(right == (0 if colour == "purple" else of) for colour, (right, of) in colours.items())
    assert "purple" in colours
