"""The prompts of the evaluation, and the marks for hand-made images, against values computed by hand."""

from dataclasses import replace

import pytest

from sd.training.evaluation import (
    MARKS,
    PROMPTS,
    Prompt,
    called_right,
    interval,
    make_prompts,
    marks,
    shares,
)
from sd.training.judge import MIXED, ODD, Found, Seen
from sd.training.world.scenes import ATTRIBUTES, SECOND_COLOUR, Scene, Thing, is_held_out

HOUSE = Scene("noon", "hills", "house", "red", "left", True, False)
EMPTY = replace(HOUSE, thing="none")
BOTH = replace(HOUSE, second=Thing("tree", "green", "right"))
RED_HOUSE, GREEN_TREE = Found("house", "red", 30, 115), Found("tree", "green", 97, 115)
SUN = Found("light", "white", 64, 20)
COLOURED = frozenset({"thing", "colour", SECOND_COLOUR, "position"})


def seen(*found, time="noon", terrain="hills", clouds=False):
    return Seen(time, terrain, clouds, tuple(sorted(found, key=lambda each: each.x)))


def given(scene, mention, *found, **rest):
    """The marks that are wrong, and the number of marks."""
    result = marks(Prompt("", scene, frozenset(mention)), seen(*found, **rest))
    assert set(result) <= set(MARKS)
    return {name for name, right in result.items() if not right}, len(result)


def test_an_image_as_asked_for_is_all_right():
    assert given(HOUSE, ATTRIBUTES, RED_HOUSE, SUN) == (set(), 9)
    assert given(BOTH, COLOURED | set(ATTRIBUTES), RED_HOUSE, GREEN_TREE, SUN) == (set(), 9)
    assert given(EMPTY, {"thing", "time"}) == (set(), 3)


@pytest.mark.parametrize(
    "found, rest, wrong",
    [
        ([RED_HOUSE, SUN], {"time": "dawn"}, {"time"}),
        ([RED_HOUSE, SUN], {"terrain": "sea", "clouds": True}, {"terrain", "clouds"}),
        ([RED_HOUSE], {}, {"light"}),
        ([RED_HOUSE, SUN, replace(SUN, x=20)], {}, {"light"}),
        ([SUN], {}, {"thing", "colour", "position", "number", "whole"}),
        ([RED_HOUSE, replace(RED_HOUSE, x=97), SUN], {}, {"number", "whole"}),
        ([replace(RED_HOUSE, kind=ODD), SUN], {}, {"thing", "colour", "position", "whole"}),
        ([replace(RED_HOUSE, colour=MIXED), SUN], {}, {"colour", "whole"}),
        ([replace(RED_HOUSE, colour="blue"), SUN], {}, {"colour"}),
        ([replace(RED_HOUSE, x=64), SUN], {}, {"position"}),
    ],
)
def test_one_thing(found, rest, wrong):
    assert given(HOUSE, ATTRIBUTES, *found, **rest)[0] == wrong


@pytest.mark.parametrize(
    "found, wrong",
    [
        ([replace(RED_HOUSE, colour="green"), replace(GREEN_TREE, colour="red")], {"colour", "position"}),
        ([replace(RED_HOUSE, x=97), replace(GREEN_TREE, x=30)], {"position"}),
        ([RED_HOUSE], {"thing", "colour", "position", "number", "whole"}),
        ([RED_HOUSE, replace(RED_HOUSE, x=97)], {"thing", "colour", "position"}),
        ([RED_HOUSE, GREEN_TREE, replace(GREEN_TREE, x=64, kind=ODD)], {"number", "whole"}),
    ],
)
def test_two_things(found, wrong):
    assert given(BOTH, COLOURED, *found)[0] == wrong


def test_what_is_not_mentioned_is_free():
    assert given(HOUSE, {"thing"}, replace(RED_HOUSE, colour="blue", x=97), time="night", clouds=True) == (set(), 4)
    other = seen(replace(RED_HOUSE, colour="white"), GREEN_TREE)
    assert all(marks(Prompt("", BOTH, frozenset({"thing", SECOND_COLOUR})), other).values())
    assert not all(marks(Prompt("", BOTH, frozenset({"thing", "colour"})), other).values())


def test_what_is_free_is_there_once_at_most():
    assert given(HOUSE, {"thing"}, RED_HOUSE, SUN) == (set(), 4)
    assert given(HOUSE, {"thing"}, RED_HOUSE, SUN, replace(SUN, x=20))[0] == {"light"}
    assert given(HOUSE, {"time"}, RED_HOUSE, GREEN_TREE)[0] == {"number"}


def test_nothing_is_nothing():
    assert given(EMPTY, {"thing", "terrain"}, RED_HOUSE)[0] == {"number"}


def test_in_front_is_lower_in_the_image():
    scene = replace(BOTH, second=replace(BOTH.second, position="behind"))
    front, back = replace(RED_HOUSE, x=50), replace(GREEN_TREE, x=78, y=98)
    assert given(scene, COLOURED, front, back)[0] == set()
    assert given(scene, COLOURED, replace(front, y=98), replace(back, y=115))[0] == {"position"}
    assert given(scene, COLOURED, replace(front, x=36), replace(back, x=100))[0] == {"position"}  # side by side


def test_a_sun_by_day_is_not_the_moon():
    night = replace(HOUSE, time="night")
    assert given(night, {"thing", "light"}, RED_HOUSE, SUN, time="night")[0] == set()
    assert given(night, {"thing", "light"}, RED_HOUSE, SUN, time="noon")[0] == {"light"}
    assert given(HOUSE, {"thing", "light"}, RED_HOUSE, SUN, time="night")[0] == {"light"}


def test_two_equal_things_have_no_order():
    scene = replace(HOUSE, second=Thing("house", "red", "right"))
    twice = RED_HOUSE, replace(RED_HOUSE, x=97)
    assert given(scene, COLOURED, *twice) == (set(), 5)
    assert given(scene, {"thing"}, twice[0], replace(twice[1], colour="blue"))[0] == set()
    assert given(scene, COLOURED, RED_HOUSE)[0] == {"thing", "colour", "number", "whole"}


def test_the_judge_is_right_if_it_calls_everything_by_its_name():
    truth = seen(RED_HOUSE, replace(GREEN_TREE, kind=ODD), SUN)
    assert called_right(truth, seen(replace(RED_HOUSE, x=31), replace(GREEN_TREE, kind=ODD, colour="blue"), SUN))
    assert not called_right(truth, seen(RED_HOUSE, GREEN_TREE, SUN))
    assert not called_right(truth, seen(RED_HOUSE, replace(GREEN_TREE, kind=ODD)))
    assert not called_right(truth, seen(RED_HOUSE, SUN))


def test_shares_count_where_a_mark_was_given():
    result = shares([{"time": True, "light": True}, {"light": False}, {"time": True, "light": True}])
    assert result == {"time": (1, 2), "light": (2 / 3, 3), "mean": (pytest.approx(5 / 6), 3), "all": (2 / 3, 3)}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_held_out_or_not_as_requested(kind, held_out):
    prompts = make_prompts(kind, 20, held_out)
    assert len(prompts) == 20
    assert all(is_held_out(prompt.scene) == held_out for prompt in prompts)
    assert all(is_held_out(prompt.scene, prompt.mention) == held_out for prompt in prompts)
    assert prompts == make_prompts(kind, 20, held_out)


def test_the_kinds_of_prompts():
    prompts = {kind: make_prompts(kind, 60, False) for kind in PROMPTS}
    assert all(len(prompt.scene.things) == 1 for prompt in prompts["full"])
    assert {len(prompt.mention) for prompt in prompts["short"]} == {1, 2, 3, 4, 5, 6}
    assert all("thing" in prompt.mention and len(prompt.scene.things) == 1 for prompt in prompts["short"])
    assert all(" and " in prompt.text for prompt in prompts["two"])
    assert all("two " in prompt.text for prompt in prompts["twice"])
    words = ("left of", "right of", "in front of", "behind")
    assert all(any(word in prompt.text for word in words) for prompt in prompts["relation"])
    assert all(not prompt.scene.things for prompt in prompts["none"])


def test_the_words_of_a_prompt_are_what_it_is_marked_for():
    for prompt in make_prompts("short", 60, False):
        assert (prompt.scene.colour in prompt.text.replace("green hill", "").replace("green meadow", "")) == (
            "colour" in prompt.mention
        )
        assert ("cloud" in prompt.text or "clear" in prompt.text) == ("clouds" in prompt.mention)


@pytest.mark.parametrize(
    "share, count, low, high",
    [(0.993, 400, 0.9785, 0.9978), (1, 32, 0.8928, 1), (0.95, 32, 0.8164, 0.9883), (0.5, 100, 0.4038, 0.5962)],
)
def test_the_interval_of_a_share(share, count, low, high):
    """As in tables of Wilson's interval; it is not symmetric."""
    assert interval(share, count) == pytest.approx((low, high), abs=1e-3)
