"""The toy world: a seed always gives the same image and captions, and every value can be seen and is mentioned."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sd.tokenizer import Tokenizer
from sd.training.world.render import render
from sd.training.world.scenes import ATTRIBUTES, HELD_OUT, Scene, caption, is_held_out, random_scene, scene_and_captions

HOUSE = Scene("noon", "hills", "house", "red", "left", True, False)
EVERYTHING = frozenset(ATTRIBUTES)


def test_a_seed_fixes_picture_and_captions():
    scene, captions = scene_and_captions(7)
    assert (scene, captions) == scene_and_captions(7)
    assert np.array_equal(np.asarray(render(scene, 7)), np.asarray(render(scene, 7)))
    assert not np.array_equal(np.asarray(render(scene, 7)), np.asarray(render(scene, 8)))


def test_pictures_have_the_size_asked_for():
    assert render(HOUSE, 0).size == (128, 128)
    assert render(HOUSE, 0, 64).size == (64, 64)


def test_every_value_of_every_attribute_occurs():
    scenes = [scene_and_captions(seed, 0)[0] for seed in range(400)]
    for name, values in ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(values)
        assert min(counts.values()) > 5


def test_training_never_shows_a_held_out_pair():
    scenes = [scene_and_captions(seed, 0)[0] for seed in range(2000)]
    assert not any(is_held_out(scene) for scene in scenes)


def test_held_out_scenes_can_be_requested():
    rng = random.Random(0)
    assert all(is_held_out(random_scene(rng, held_out=True)) for _ in range(50))
    assert {is_held_out(random_scene(rng, held_out=None)) for _ in range(200)} == {False, True}


@pytest.mark.parametrize("first, x, second, y", HELD_OUT)
def test_each_held_out_pair_is_one_of_known_values(first, x, second, y):
    assert x in ATTRIBUTES[first]
    assert y in ATTRIBUTES[second]
    assert is_held_out(replace(HOUSE, **{first: x, second: y}))


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name not in ("light", "clouds")])
def test_each_value_looks_different(name):
    pictures = [np.asarray(render(replace(HOUSE, **{name: v}), 3)).astype(float) for v in ATTRIBUTES[name]]
    for i, picture in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(picture - other).mean() > 1.5


@pytest.mark.parametrize("name", ["light", "clouds"])
def test_sun_and_clouds_can_be_seen(name):
    without, with_it = (np.asarray(render(replace(HOUSE, **{name: v}), 3)).astype(float) for v in (False, True))
    assert np.abs(without - with_it).max() > 60


@pytest.mark.parametrize("terrain", ATTRIBUTES["terrain"])
@pytest.mark.parametrize("time", ATTRIBUTES["time"])
def test_nothing_hides_the_sun(time, terrain):
    for seed in range(8):
        scene = Scene(time, terrain, "balloon", "red", "centre", light=True, clouds=True)
        assert light_in_the_sky(scene, seed).sum() > 150  # of the 314 pixels of its disc


def light_in_the_sky(scene, seed):
    """The pixels (70, 128) that the sun or moon changes, above its reflection on water."""
    with_it, without = (np.asarray(render(replace(scene, light=light), seed)).astype(int) for light in (True, False))
    return np.abs(with_it - without)[:70].max(axis=2) > 25


@pytest.mark.parametrize(
    "thing, position, left", [("tent", "left", False), ("tent", "right", True), ("none", "left", True)]
)
def test_the_sun_keeps_to_one_side(thing, position, left):
    scene = replace(HOUSE, thing=thing, position=position, clouds=False)
    columns = [light_in_the_sky(scene, seed).nonzero()[1].mean() for seed in range(20)]
    assert np.ptp(columns) < 26
    assert all((column < 64) == left for column in columns)


@pytest.mark.parametrize("time", ATTRIBUTES["time"])
def test_a_white_lighthouse_has_darker_bands_at_every_hour(time):
    picture = render(replace(HOUSE, thing="lighthouse", colour="white", time=time, position="centre"), 4)
    tower = np.asarray(picture.convert("L")).astype(int)[70:100, 60:68].mean(axis=1)
    assert tower.max() - tower.min() > 25


@pytest.mark.parametrize("position, middle", [("left", 31), ("centre", 64), ("right", 97)])
def test_the_thing_stands_where_it_should(position, middle):
    scene = replace(HOUSE, position=position, thing="tent")
    red, green, blue = np.asarray(render(scene, 5)).astype(int).transpose(2, 0, 1)
    columns = np.nonzero((red > 180) & (green < 90) & (blue < 90))[1]
    assert abs(columns.mean() - middle) < 9


def test_a_full_caption_mentions_every_attribute():
    rng = random.Random(1)
    for _ in range(50):
        text = caption(HOUSE, rng, EVERYTHING)
        assert "red" in text
        assert "left" in text
        assert any(word in text for word in ("house", "cottage"))
        assert any(word in text for word in ("hill", "meadow"))
        assert any(word in text for word in ("noon", "day"))
        assert "sun" in text
        assert any(word in text for word in ("clear", "clouds"))


def test_a_caption_mentions_nothing_else():
    rng = random.Random(2)
    for _ in range(50):
        text = caption(HOUSE, rng, frozenset({"time"}))
        assert not any(word in text for word in ("red", "left", "house", "cottage", "hill", "sun", "cloud", "sky"))


def test_an_empty_scene_has_no_colour_to_mention():
    rng = random.Random(3)
    empty = replace(HOUSE, thing="none")
    texts = [caption(empty, rng, EVERYTHING) for _ in range(50)]
    assert not any("red" in text or "left" in text for text in texts)
    assert caption(empty, rng, frozenset({"colour"}))  # never an empty caption


def test_captions_vary_and_fit_the_context():
    texts = [text for seed in range(300) for text in scene_and_captions(seed)[1]]
    assert len(set(texts)) > 0.8 * len(texts)
    assert all(texts)
    ends = (Tokenizer()(texts) == 49407).int().argmax(dim=1)
    assert ends.max() < 60  # no caption is cut off
