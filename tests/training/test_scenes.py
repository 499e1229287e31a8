"""The toy world: a seed always gives the same image and captions, and every value can be seen and is mentioned."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sd.tokenizer import Tokenizer
from sd.training.world.canvas import Canvas
from sd.training.world.render import draw, render
from sd.training.world.scenes import (
    AND_WORDS,
    ATTRIBUTES,
    BEHIND_WORDS,
    BESIDE_WORDS,
    COLOURS,
    HELD_OUT,
    HELD_OUT_TOGETHER,
    ON_THE_GROUND,
    SECOND_COLOUR,
    THING_WORDS,
    THINGS,
    Scene,
    Thing,
    add_second,
    caption,
    exchange_colours,
    exchange_things,
    is_held_out,
    plural,
    random_scene,
    scene_and_captions,
)

HOUSE = Scene("noon", "hills", "house", "red", "left", True, False)
EVERYTHING = frozenset(ATTRIBUTES)
TREE = Thing("tree", "green", "right")
BOTH = replace(HOUSE, second=TREE)  # a red house and a green tree
ALL_OF_BOTH = EVERYTHING | {SECOND_COLOUR}


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


@pytest.mark.parametrize("terrain", ATTRIBUTES["terrain"])
def test_another_sky_or_colour_changes_nothing_else(terrain, monkeypatch):
    """Land, thing and sun keep their places at night, and without clouds."""
    scene = replace(HOUSE, terrain=terrain, clouds=True)

    def drawing(scene):
        """Where lights and things are, and the corners of all polygons: of the land and the thing."""
        corners = []
        monkeypatch.setattr(Canvas, "polygon", lambda self, points, *rest: corners.append(points))
        drawn = draw(scene, 3)
        return drawn.lights, drawn.spots, corners

    everything = drawing(scene)
    assert drawing(replace(scene, time="night", colour="blue")) == everything
    assert drawing(replace(scene, clouds=False)) == everything
    assert drawing(replace(scene, light=False))[1:] == everything[1:]


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


def test_scenes_have_none_one_or_two_things():
    counts = Counter(len(scene_and_captions(seed, 0)[0].things) for seed in range(1000))
    assert 50 < counts[0] < 150
    assert 350 < counts[1] < 550
    assert 350 < counts[2] < 550


def test_two_things_are_beside_or_behind_each_other_or_equal():
    scenes = [scene_and_captions(seed, 0)[0] for seed in range(1000)]
    two = [scene for scene in scenes if scene.second]
    assert sum(scene.is_behind for scene in two) > 30
    assert sum(scene.is_twice for scene in two) > 30
    for scene in two:
        if scene.is_behind:
            assert scene.position in ("left", "right")
            assert {scene.thing, scene.second.kind} <= set(ON_THE_GROUND)
            assert scene.terrain != "sea"
        else:
            assert [thing.position for thing in scene.things] == ["left", "right"]


@pytest.mark.parametrize("kinds", HELD_OUT_TOGETHER)
def test_two_things_can_be_held_out_together_in_any_order(kinds):
    for first, second in (kinds, kinds[::-1]):
        colours = ["blue" if kind == "house" else "purple" for kind in (first, second)]
        scene = Scene("noon", "desert", first, colours[0], "left", True, False, Thing(second, colours[1], "right"))
        assert is_held_out(scene)
        assert not is_held_out(replace(scene, second=None))
        assert not is_held_out(scene, frozenset({"colour"}))


def test_a_combination_of_the_second_thing_is_held_out_too():
    purple = replace(HOUSE, thing="tree", second=Thing("house", "purple", "right"))
    assert is_held_out(purple)
    assert is_held_out(purple, frozenset({"thing", SECOND_COLOUR}))
    assert not is_held_out(purple, frozenset({"thing", "colour"}))  # the caption mentions only the other's colour


def test_a_caption_without_the_time_mentions_no_held_out_time():
    scene = replace(HOUSE, terrain="desert", time="dawn")
    assert is_held_out(scene)
    assert is_held_out(scene, frozenset({"terrain", "time"}))
    assert not is_held_out(scene, frozenset({"terrain", "thing", "colour"}))


def test_captions_of_two_things_mention_both_in_order():
    rng = random.Random(4)
    for _ in range(40):
        text = caption(BOTH, rng, ALL_OF_BOTH, AND_WORDS)
        assert text.index("red") < min(text.find(w) % 999 for w in ("house", "cottage")) < text.index("green")
        assert " and " in text
        text = caption(BOTH, rng, ALL_OF_BOTH, BESIDE_WORDS)
        house_first = text.index("red") < text.index("green tree")
        assert ("left of" in text) == house_first
        assert ("right of" in text) != house_first


def test_captions_say_what_stands_in_front():
    rng, scene = random.Random(5), replace(BOTH, second=replace(TREE, position="behind"))
    for _ in range(40):
        text = caption(scene, rng, frozenset({"thing", "colour", SECOND_COLOUR, "position"}), BEHIND_WORDS)
        house_first = text.index("red") < text.index("green")
        assert ("in front of" in text) == house_first
        assert ("behind" in text) != house_first


def test_two_equal_things_are_a_plural():
    rng, scene = random.Random(6), replace(HOUSE, second=Thing("house", "red", "right"))
    for _ in range(40):
        text = caption(scene, rng, frozenset({"thing", "colour", SECOND_COLOUR}))
        assert "two red houses" in text or "two red cottages" in text
        assert "two red" not in caption(scene, rng, frozenset({"thing"}))
    assert [plural(words) for words in ("cactus", "hot air balloon")] == ["cacti", "hot air balloons"]


def test_a_caption_of_two_things_never_mentions_only_one():
    for seed in range(300):
        scene, captions = scene_and_captions(seed)
        for text in captions if scene.second else ():
            for thing in scene.things:
                assert any(word.removesuffix("us") in text for word in THING_WORDS[thing.kind]), text  # or "cacti"


def test_an_empty_scene_can_be_asked_for_in_many_ways():
    rng, empty = random.Random(7), replace(HOUSE, thing="none", terrain="desert")
    texts = {caption(empty, rng, frozenset({"thing", "terrain"})) for _ in range(100)}
    assert {"an empty desert", "nothing but a desert", "no house, only the desert"} <= texts
    assert not any(text.startswith(("a photo of no", "a picture of no")) for text in texts)


def test_captions_have_every_length():
    lengths = Counter(len(text.split()) for seed in range(400) for text in scene_and_captions(seed)[1])
    assert sum(lengths[n] for n in (1, 2)) > 60
    assert sum(lengths[n] for n in (3, 4, 5)) > 200
    assert sum(count for n, count in lengths.items() if n > 12) > 500


def test_neighbouring_seeds_show_the_same_two_things_exchanged():
    kinds = set()
    for seed in range(0, 400, 2):
        scene, twin = (scene_and_captions(number, 0)[0] for number in (seed, seed + 1))
        if scene.second and not scene.is_twice and twin in (exchange_colours(scene), exchange_things(scene)):
            kinds.add(twin == exchange_colours(scene))
            assert not is_held_out(twin)
    assert kinds == {True, False}


def test_exchanged_things():
    swapped = exchange_colours(BOTH)
    assert [(thing.kind, thing.colour) for thing in swapped.things] == [("house", "green"), ("tree", "red")]
    swapped = exchange_things(BOTH)
    assert swapped.things == (Thing("tree", "green", "left"), Thing("house", "red", "right"))


def colour_is_seen(image, spot, colour):
    """Whether a region above the foot of a thing, (24, 24) pixels, has enough of its colour."""
    x, y = round(spot.x), round(spot.y - 26 * spot.scale)
    red, green, blue = np.asarray(image).astype(int)[max(0, y - 14) : y + 14, max(0, x - 14) : x + 14].reshape(-1, 3).T
    found = {"red": (red > 150) & (green < 110) & (blue < 110), "blue": (blue > 150) & (red < 110)}[colour]
    return found.sum() > 40


@pytest.mark.parametrize("how", ["beside", "behind"])
def test_two_things_can_both_be_seen(how):
    rng = random.Random(8)
    for seed in range(60):
        scene = add_second(replace(HOUSE, thing=rng.choice(ON_THE_GROUND), light=False), rng, how)
        scene = replace(scene, second=replace(scene.second, colour="blue"))
        drawing = draw(scene, seed)
        for spot, colour in zip(drawing.spots, ("red", "blue")):
            assert colour_is_seen(drawing.image, spot, colour)


def test_two_things_keep_apart():
    rng = random.Random(9)
    for seed in range(100):
        scene = add_second(replace(HOUSE, thing=rng.choice(THINGS[1:])), rng, "beside")
        left, right = draw(scene, seed).spots
        assert right.x - left.x >= 60
        assert max(left.scale, right.scale) < 0.93


def test_the_thing_behind_is_higher_up_and_smaller():
    for seed in range(20):
        front, back = draw(replace(BOTH, second=replace(TREE, position="behind")), seed).spots
        assert back.y < front.y - 8
        assert back.scale < front.scale
        assert 24 < back.x - front.x < 32  # the house is on the left of the middle


@pytest.mark.parametrize("time", ATTRIBUTES["time"])
def test_nothing_hides_the_sun_between_two_things(time):
    rng = random.Random(10)
    for seed in range(30):
        scene = replace(HOUSE, time=time, thing=rng.choice(THINGS[1:]), colour=rng.choice(COLOURS), clouds=True)
        scene = add_second(scene, rng, "beside")
        assert light_in_the_sky(scene, seed).sum() > 150


def test_any_things_and_lights_can_be_drawn_instead():
    here = draw(BOTH, 0)
    things = [(thing, spot) for thing, spot in zip(BOTH.things, here.spots)]
    assert np.array_equal(np.asarray(draw(BOTH, 0, 128, things).image), np.asarray(here.image))
    empty = draw(BOTH, 0, 128, [], [])
    assert not colour_is_seen(empty.image, here.spots[0], "red")
    assert draw(BOTH, 0, 128, [], [(20, 20), (90, 20)]).lights == [(20, 20), (90, 20)]
