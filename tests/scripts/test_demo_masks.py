"""The flags of the demo script that make and change masks."""

import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from scripts import demo
from scripts.support.captions import command
from sd.images import fill_transparent
from sd.request import Request
from tests.support.synthetic import MICRO, random_models

LEFT = (slice(None), slice(0, 30))


@pytest.fixture
def files(run_demo):
    """photo.png, its copy erased.png whose left part is transparent, and mask.png and its inverse."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 30, 60))
    photo.save("photo.png")
    mask.save("mask.png")
    ImageOps.invert(mask).save("inverse.png")
    photo.putalpha(ImageOps.invert(mask))
    photo.save("erased.png")


def draw(run_demo, *arguments) -> np.ndarray:
    code, out, errors = run_demo("a cat", "--seed", 3, "--steps", 2, *arguments)
    assert code == 0, errors
    with Image.open(out.split()[0]) as image:
        return np.asarray(image)


def test_an_inverted_mask_is_the_inverse(run_demo, files):
    expected = draw(run_demo, "--image", "photo.png", "--mask", "mask.png")
    inverted = draw(run_demo, "--image", "photo.png", "--mask", "inverse.png", "--invert-mask")
    assert np.array_equal(inverted, expected)


@pytest.mark.slow
def test_a_mask_from_alpha_repaints_what_was_erased(run_demo, files):
    size = ("--width", 96, "--height", 64)
    fill_transparent("erased.png").save("filled.png")
    expected = draw(run_demo, "--image", "filled.png", "--mask", "mask.png", *size)
    erased = draw(run_demo, "--image", "erased.png", "--mask-from-alpha", *size)
    assert np.array_equal(erased, expected)
    kept = draw(run_demo, "--image", "erased.png", "--mask-from-alpha", "--invert-mask", *size)
    assert np.array_equal(kept, draw(run_demo, "--image", "erased.png", "--mask", "inverse.png", *size))


def test_white_does_not_shine_through_where_a_soft_eraser_was_used(run_demo, files):
    dark = Image.new("RGB", (64, 64), (40, 0, 0))
    dark.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))))
    dark.save("dark.png")
    assert np.abs(np.asarray(fill_transparent("dark.png")).astype(int) - (40, 0, 0)).max() <= 3
    dark.putalpha(Image.new("L", dark.size, 255))
    assert np.array_equal(np.asarray(fill_transparent(dark)), np.asarray(dark)[:, :, :3])


def test_only_masked_keeps_the_size_of_the_image(run_demo, files):
    image = draw(run_demo, "--image", "photo.png", "--mask", "mask.png", "--only-masked", "--padding", 4)
    original = np.asarray(Image.open("photo.png"))
    assert image.shape == original.shape == (60, 90, 3)
    assert np.array_equal(image[:, 30:], original[:, 30:])
    assert not np.array_equal(image[LEFT], original[LEFT])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--mask-from-alpha"], "--image should be given with --mask-from-alpha: it is the image to change."),
        (["--image", "photo.png", "--invert-mask"], "--mask or --mask-from-alpha should be given with --invert-mask."),
        (["--image", "photo.png", "--only-masked"], "--mask or --mask-from-alpha should be given with --only-masked."),
        (
            ["--image", "photo.png", "--mask", "mask.png", "--padding", 3],
            "--only-masked should be given with --padding, which is the space around the mask.",
        ),
        (
            ["--image", "erased.png", "--mask", "mask.png", "--mask-from-alpha"],
            "--mask-from-alpha should be given without --mask: it makes the mask from --image itself.",
        ),
        (
            ["--image", "photo.png", "--mask-from-alpha"],
            "--image should have transparent parts to make a mask from: it has none.",
        ),
        (
            ["--image", "photo.png", "--mask", "mask.png", "--only-masked", "--padding", -1],
            "--padding should be a whole number of pixels, 0 to 8192, not -1.",
        ),
    ],
)
def test_flags_that_do_not_fit_together(run_demo, files, arguments, sentence):
    code, out, errors = run_demo("a cat", *arguments)
    assert (code, out, errors) == (2, "", f"demo.py: {sentence}\n")


@pytest.mark.filterwarnings("default:mask_image is")
def test_a_mask_that_repaints_nothing_is_explained_by_flags(run_demo, files):
    Image.new("L", (90, 60), 255).save("white.png")
    _, _, errors = run_demo("a cat", "--image", "photo.png", "--mask", "white.png", "--steps", 1)
    assert (
        "demo.py: --mask is white on 100% of the image, so nearly all is repainted: add --invert-mask if only the dark "
        "part should change.\n"
    ) in errors
    assert errors.count("white on 100%") == 1
    Image.new("L", (90, 60)).save("black.png")
    _, _, errors = run_demo("a cat", "--image", "photo.png", "--mask", "black.png", "--steps", 1)
    assert "demo.py: --mask is black everywhere (transparent counts as black), so nothing is repainted: " in errors


@pytest.mark.filterwarnings("default:mask_image is")
def test_a_mask_that_was_inverted_for_nothing(run_demo, files):
    Image.new("L", (90, 60)).save("black.png")
    _, _, errors = run_demo("a cat", "--image", "photo.png", "--mask", "black.png", "--invert-mask", "--steps", 1)
    assert "so nearly all is repainted: leave out --invert-mask if only the dark part should change.\n" in errors


def test_the_command_repeats_the_flags(tmp_path):
    given = ["a cat", "--image", "a.png", "--mask", "b.png", "--invert-mask", "--only-masked", "--padding", "0"]
    options = demo.parse([*given, "--feather", "0", "--seed", "0"])
    request = Request("a cat", seed=0, width=8, height=8, sampler_name="ddim", n_inference_steps=1, cfg_scale=1.0)
    again = demo.parse(shlex.split(command(options, request, random_models(MICRO)))[2:])
    assert isinstance(again, Namespace)
    for name in ("image", "mask", "invert_mask", "only_masked", "padding", "mask_from_alpha", "feather", "seed"):
        assert getattr(again, name) == getattr(options, name)
    assert again.image == Path("a.png")
