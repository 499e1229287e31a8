"""`--from`: the settings in a picture, of this tool or the AUTOMATIC1111 web UI, and flags that override them."""

import numpy as np
import pytest
from PIL import Image

from scripts.support.captions import SAMPLER_NAMES
from sd.images import write_image
from sd.samplers import SAMPLERS
from tests.scripts.test_demo_prompts import said
from tests.support.demo_results import prompt_and_seed

WEB_UI = (
    "a (red:1.2) house,\n{{tiled}} [roof]\nNegative prompt: blurry, {b|c}\n"
    "Steps: 3, Sampler: Euler, Schedule type: Karras, CFG scale: 6.5, Seed: 99, Size: 48x40, "
    'Model hash: 6ce0161689, Model: "other, model", Denoising strength: 0.7, Clip skip: 2, Hires upscale: 2'
)


@pytest.fixture
def draw(monkeypatch, capsys, run_demo, demo_checkpoint):
    """Runs the demo with nothing given but the model. Returns what it says."""
    from scripts import demo

    def draw(*arguments):
        given = ["demo.py", *map(str, arguments), "--checkpoint", str(demo_checkpoint), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", given)
        assert demo.main() == 0
        return said(capsys.readouterr().err)

    return draw


def settings(name):
    with Image.open(name) as image:
        return image.text["parameters"].split("\n")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_is_drawn_again(draw, suffix):
    first = ["a (red:1.3) \\{cat\\} BREAK\nby \\(x\\)", "--negative", "a dog,\nNegative prompt: b", "--seed", 5]
    draw(*first, "--steps", 2, "--width", 32, "--height", 40, "--sampler", "heun_karras", "--out", "a.png")
    draw(*first, "--steps", 2, "--width", 32, "--height", 40, "--sampler", "heun_karras", "--out", f"b{suffix}")
    assert draw("--from", f"b{suffix}", "--out", "again.png") == []
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("again.png")))
    assert settings("a.png") == settings("again.png")


def test_flags_override(draw):
    draw("a cat", "--negative", "b", "--steps", 2, "--seed", 5, "--cfg-scale", 3, "--out", "a.png")
    draw("a {red|blue} dog", "--from", "a.png", "--seed", 7, "--negative", "", "--steps", 1, "--width", 32)
    assert prompt_and_seed("picture-2.png") == ("a blue dog", 7)
    assert settings("picture.png")[1].startswith("Steps: 1, Sampler: DPM++ 2M, CFG scale: 3, Seed: 7, Size: 32x64, ")
    draw("--from", "a.png", "--seed", -1, "--steps", 1, "--out", "b.png")
    assert prompt_and_seed("b.png")[1] != 5


def test_a_picture_of_the_web_ui(draw):
    write_image("a.jpg", np.zeros((8, 8, 3), np.uint8), WEB_UI)
    lines = draw("--from", "a.jpg")
    assert lines == [
        "a.jpg was made with the model 'other, model', not 'micro'; --checkpoint chooses another.",
        "of the settings in a.jpg, these are not used: Model hash, Denoising strength, Clip skip, Hires upscale.",
    ]
    assert settings("picture.png") == [
        "a (red:1.2) house,",
        "{{tiled}} [roof]",
        "Negative prompt: blurry, {b|c}",
        "Steps: 3, Sampler: Euler Karras, CFG scale: 6.5, Seed: 99, Size: 48x40, Model: micro",
    ]


def test_the_strength_counts_with_an_image(draw):
    write_image("a.jpg", np.zeros((40, 48, 3), np.uint8), WEB_UI)
    assert "Denoising" not in draw("--from", "a.jpg", "--image", "a.jpg")[1]
    assert settings("picture.png")[-1].endswith("Denoising strength: 0.7")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_read_back(draw, monkeypatch, sampler):
    from argparse import Namespace

    from scripts.support.from_picture import _take_sampler

    base, karras, _ = sampler.partition("_karras")
    for pairs in (
        {"Sampler": SAMPLER_NAMES[base] + (" Karras" if karras else "")},
        {"Sampler": SAMPLER_NAMES[base], "Schedule type": "Karras" if karras else "Automatic"},
    ):
        options = Namespace(sampler=None)
        _take_sampler(options, pairs)
        assert (options.sampler, pairs) == (sampler, {})


@pytest.mark.parametrize(
    "sampler, unused, ours",
    [
        ("Sampler: UniPC", "Sampler", "DPM++ 2M"),
        ("Sampler: DPM++ 2M, Schedule type: Exponential", "Schedule type", "DPM++ 2M"),
        ("Sampler: DDIM Karras", "Schedule type", "DDIM"),
    ],
)
def test_a_sampler_that_does_not_exist_here_is_named(draw, sampler, unused, ours):
    write_image("a.png", np.zeros((8, 8, 3), np.uint8), f"a\nSteps: 2, {sampler}, Seed: 1, Size: 32x32")
    assert draw("--from", "a.png") == [f"of the settings in a.png, these are not used: {unused}."]
    assert f"Sampler: {ours}, " in settings("picture.png")[-1]


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("Steps: many", "a.png: Steps should be a whole number, not 'many'."),
        ("Steps: 5000", "--steps should be a whole number from 1 to 1000, not 5000."),
        ("CFG scale: high", "a.png: CFG scale should be a number, not 'high'."),
        ("Size: 512", "a.png: Size should be a width and a height, such as 512x768, not '512'."),
        ("Size: 100x100", "--height should be a multiple of 8 pixels, not 100."),
    ],
)
def test_bad_settings_are_one_sentence(run_demo, monkeypatch, capsys, setting, sentence):
    from scripts import demo

    write_image("a.png", np.zeros((8, 8, 3), np.uint8), f"a\n{setting}, Seed: 1, Hires steps: 0, Version: x")
    monkeypatch.setattr("sys.argv", ["demo.py", "--from", "a.png"])
    assert demo.main() == 2
    assert capsys.readouterr().err == f"demo.py: {sentence}\n"
