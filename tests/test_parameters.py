"""Random values for every argument of `generate` and every flag of the demo: an image of the right size, or one
sentence that says what is wrong.

The slow tests do the same with many more values.
"""

import inspect
import sys
import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts import demo
from scripts.benchmarks.synthetic_checkpoint import random_state
from sd import generate, model_loader
from sd.adapters.control import Control
from sd.checkpoints.files import write_checkpoint
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer
from tests.support.control import random_controlnet
from tests.support.synthetic import MICRO, random_models

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
MASK = Image.new("L", (40, 24), 100)
MASK.paste(200, (4, 6, 18, 20))
pytestmark = pytest.mark.filterwarnings(
    "ignore:With 1 step this sampler starts", "ignore:feather is wider", "ignore:control has no effect"
)

TOKENIZER = Tokenizer()
NET = random_controlnet(MICRO.unet)

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="()[]\\:&"), max_size=20)
prompts = plain | st.sampled_from(["a (red:1.3) house", "[a] BREAK (b)", r"\(c\)", "cat, " * 90, ""])
sizes = st.sampled_from([8, 16, 24, 40]) | st.sampled_from([np.int64(16), np.uint8(24)])
unit = st.floats(0, 1)
VALID = {
    "strength": st.floats(0, 1, exclude_min=True) | st.sampled_from([1, np.float32(0.5), Fraction(1, 3)]),
    "do_cfg": st.sampled_from([True, False, np.True_]),
    "cfg_scale": st.none()
    | st.floats(-20, 20)
    | st.sampled_from([0, 1, np.float64(7.5), np.float16(3), Fraction(15, 2)]),
    "sampler_name": st.sampled_from([None, *SAMPLERS]),
    "timestep_spacing": st.sampled_from([None, "leading", "trailing", "linspace"]),
    "n_inference_steps": st.sampled_from([1, 2, 3, np.int64(2), np.uint8(1)]),
    "seed": st.none() | st.integers(0, 2**63 - 1) | st.sampled_from([np.uint8(255), np.int64(2**63 - 1)]),
    "device": st.sampled_from([None, "cpu", torch.device("cpu")]),
    "idle_device": st.sampled_from([None, "cpu"]),
    "tokenizer": st.sampled_from([None, TOKENIZER]),
    "feather": st.floats(0, 20) | st.sampled_from([1000, np.float32(2), Fraction(1, 2)]),
    "cfg_rescale": unit | st.sampled_from([np.float64(0.7), Fraction(1, 2)]),
    "cfg_interval": st.none() | st.tuples(unit, unit).map(sorted) | st.just((0, Fraction(1, 2))),
    "deep_cache": st.integers(1, 1000) | st.sampled_from([np.int64(2), np.uint8(3)]),
    "clip_skip": st.sampled_from([1, 2, np.uint8(2)]),
    "freeu": st.none() | st.tuples(*[st.floats(0, 2)] * 4) | st.just([1, np.float32(1.5), Fraction(1, 2), 0]),
    "hires_scale": st.sampled_from([1, 1, 1.5, 2, np.float32(1.25)]),
    "hires_strength": st.floats(0, 1, exclude_min=True) | st.just(1),
    "hires_latents": st.booleans() | st.just(np.True_),
    "control": st.none()
    | st.lists(
        st.builds(
            lambda *values: Control(NET, PICTURE, *values),
            st.floats(0, 10) | st.sampled_from([1, np.float32(0.5), Fraction(1, 3)]),
            st.floats(0, 0.5),
            st.floats(0.5, 1, exclude_min=True) | st.just(np.float16(1)),
            st.booleans(),
        ),
        max_size=2,
    ),
}
no_number = st.sampled_from(["7", "", None, float("nan"), float("inf"), -float("inf"), True, 1j, [1], 10**400, b"1"])
no_count = no_number.filter(lambda value: value is not None) | st.sampled_from([0, -1, 2.0, 1.5, 2**70, np.float32(8)])
nothing = st.sampled_from([3, 2.5, object(), [1], {}])
INVALID = {
    "prompt": st.sampled_from(
        [None, 3, b"a cat", [], [None], ["a", 1], "(a", "a]", "\ud83d", "x" * 10_001, "(a:1.2.3)"]
    ),
    "uncond_prompt": st.sampled_from([3, [], [None], ["a", "b"], [1], "((a)", "\udc80 b", "[" * 10_001]),
    "input_image": nothing,
    "mask_image": nothing | st.just(PICTURE),
    "strength": no_number | st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True),
    "do_cfg": st.sampled_from([0, 1, "yes", None, 2.0]),
    "cfg_scale": no_number.filter(lambda value: value is not None)
    | st.floats(min_value=1001)
    | st.integers(max_value=-1001),
    "sampler_name": st.sampled_from(["", "DDPM", "magic", 3, ["ddpm"], {}]),
    "timestep_spacing": st.sampled_from(["", "Trailing", "karras", 3, ["trailing"], {}, b"trailing"]),
    "n_inference_steps": no_count | st.integers(min_value=1001) | st.integers(max_value=0),
    "models": nothing,
    "seed": no_count.filter(lambda value: type(value) is not int or not 0 <= value < 2**63)
    | st.integers(min_value=2**63),
    "device": st.sampled_from(["gpu", "", 1.5, [], 10**30, "cpu:x", "meta"]),
    "idle_device": st.sampled_from(["gpu", "", 1.5, [], 10**30, "meta"]),
    "tokenizer": nothing,
    "height": no_count
    | st.integers(1, 10**6).map(lambda n: 8 * n + 3)
    | st.integers(min_value=1025).map(lambda n: 8 * n),
    "width": no_count | st.integers(max_value=0) | st.integers(min_value=1025).map(lambda n: 8 * n),
    "feather": no_number | st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1001),
    "padding_mask_crop": no_count.filter(lambda value: value != 0) | st.integers(min_value=8193),
    "cfg_rescale": no_number | st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1, exclude_min=True),
    "cfg_interval": nothing | st.just("01") | st.sampled_from([[0], [0, 1, 1], (1, 0.5), (0, 2), (-0.1, 1), (0, True)]),
    "deep_cache": no_number | no_count | st.integers(min_value=1001) | st.integers(max_value=0),
    "clip_skip": no_number | no_count | st.integers(min_value=25),
    "freeu": nothing | st.just("1111") | st.lists(st.floats(0, 2), max_size=3) | st.just([1, 1, 1, 11]),
    "hires_scale": no_number | st.floats(min_value=8, exclude_min=True) | st.floats(max_value=1, exclude_max=True),
    "hires_strength": no_number | st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True),
    "hires_latents": st.sampled_from([0, 1, "yes", None, 2.0]),
    "control": nothing
    | st.sampled_from(["net.pth", [None], [3], [Control(NET, PICTURE)] * 11, Control(NET, PICTURE)])
    | st.builds(lambda value: [Control(value, PICTURE)], nothing)
    | st.builds(lambda value: [Control(NET, value)], nothing)
    | st.builds(lambda value: [Control(NET, PICTURE, value)], no_number | st.floats(min_value=10, exclude_min=True))
    | st.builds(lambda value: [Control(NET, PICTURE, 1, value)], no_number | st.floats(min_value=1))
    | st.builds(lambda value: [Control(NET, PICTURE, 1, 0, value)], no_number | st.floats(max_value=0))
    | st.builds(lambda value: [Control(NET, PICTURE, guess_mode=value)], st.sampled_from([0, 1, "yes", None])),
}


@cache
def models():
    return random_models(MICRO)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "micro.ckpt"
    write_checkpoint(path, random_state(MICRO), MICRO.to_dict())
    return str(path)


def check_valid(data):
    arguments = data.draw(st.fixed_dictionaries({"height": sizes, "width": sizes}, optional=VALID))
    arguments.setdefault("n_inference_steps", 2)
    texts = data.draw(prompts | st.lists(prompts, min_size=1, max_size=2))
    if data.draw(st.booleans()):
        arguments["uncond_prompt"] = (
            data.draw(prompts) if isinstance(texts, str) else [data.draw(prompts) for _ in texts]
        )
    if data.draw(st.booleans()):
        arguments["input_image"] = data.draw(st.sampled_from([PICTURE, Image.fromarray(PICTURE)]))
        arguments["mask_image"] = data.draw(st.sampled_from([None, MASK]))
        if arguments["mask_image"] and data.draw(st.booleans()):
            arguments["padding_mask_crop"] = data.draw(st.sampled_from([0, 5, 8192, np.uint8(3)]))
    if arguments.get("mask_image"):
        arguments.pop("hires_scale", None)
    image = generate(texts, models=models(), **arguments)
    size = *(enlarged(arguments[side], arguments.get("hires_scale", 1)) for side in ("height", "width")), 3
    size = PICTURE.shape if "padding_mask_crop" in arguments else size
    assert image.shape == (size if isinstance(texts, str) else (len(texts), *size))
    assert image.dtype == np.uint8


def enlarged(pixels, scale):
    return 8 * round(float(scale) * (int(pixels) // 8))


def check_invalid(name, value):
    """The error is one sentence that begins with the argument's name, and comes before any weights are loaded."""
    asked = "input_image" if value is PICTURE else name  # a mask needs an image
    extra = {"input_image": PICTURE, "mask_image": MASK} if name == "padding_mask_crop" else {}
    with (
        mock.patch.object(model_loader, "load_models", side_effect=AssertionError("loaded before checking")),
        pytest.raises(ValueError, match=rf"^{asked}(\.\w+)? should ") as error,
    ):
        generate(**({"prompt": "a cat"} | extra | {name: value}))
    message = str(error.value)
    assert message.endswith(".") or "character itself" in message
    assert "\n" not in message
    assert len(message) < 600


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_valid_arguments_give_an_image_of_the_right_size(data):
    check_valid(data)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_thousand_valid_requests(data):
    check_valid(data)


@pytest.mark.parametrize("name", INVALID)
@settings(max_examples=15)
@given(data=st.data())
def test_invalid_arguments_give_one_sentence(name, data):
    check_invalid(name, data.draw(INVALID[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", INVALID)
@settings(max_examples=500)
@given(data=st.data())
def test_thousands_of_invalid_requests(name, data):
    check_invalid(name, data.draw(INVALID[name]))


def test_every_argument_is_covered():
    assert set(INVALID) == set(inspect.signature(generate).parameters)
    others = {"prompt", "uncond_prompt", "input_image", "mask_image", "models", "height", "width", "padding_mask_crop"}
    assert set(INVALID) == set(VALID) | others


# Values for each flag. Whether a value is valid does not depend on the other flags.
FLAGS = {
    "--negative": ["", "a dog", "-7", "(a:1.2)", "(a", "\udcff", "x" * 10_001],
    "--feather": ["0", "3.5", "-1", "nan", "inf", "1e9", "wide", ""],
    "--strength": ["1", "0.01", "1e-9", "0", "1.5", "-inf", "nan", "half"],
    "--steps": ["1", "3", " 2", "٢", "0", "-1", "1001", "2.5", "9" * 30, "9" * 5000, "x"],
    "--cfg-scale": ["7.5", "-3", "0", "1e3", "1e4", "nan", "-inf", "1e999", "big"],
    "--deep-cache": ["1", "2", "1000", "0", "1001", "1.5", "x"],
    "--clip-skip": ["1", "2", "0", "99", "1.5", "x"],
    "--hires": ["1", "1.5", "2", "0.5", "9", "nan", "x"],
    "--sampler": [*SAMPLERS, "DDPM", "", "magic"],
    "--spacing": ["trailing", "leading", "linspace", "", "Trailing"],
    "--seed": ["0", "1_000", str(2**63 - 1), str(2**63), "-1", "1.0", "9" * 5000, "x"],
    "--n": ["1", "2", "0", "-3", "1.5", "x"],
    "--width": ["8", "40", "12", "0", "-8", "8.0", "80000", "9" * 30, "x"],
    "--height": ["16", "24", "17", "-16", "8e1", "16384", "x"],
    "--device": ["cpu", "gpu", "", "cuda:99", "cpu:x"],
    "--dtype": ["fp32", "bf16", "fp8", ""],
    "--out": ["new.png", "folder", "a.jpg", "taken.png", "file.txt/a.png"],
    "--film": ["f.webp", "f.gif", "f.mp4", ""],
    "--image": ["picture.png", "none.png", "file.txt", "."],
    "--mask": ["picture.png", "none.png", "file.txt"],
}
TEXTS = ["a cat", "a {red|blue} cat", "a {red", "((a", "", "\udc80", "x" * 10_001, "&amp;" * 1900 + "é"]


def run_demo(arguments):
    """Returns the exit code, the new images, the lines that demo.py printed, and whether weights were loaded."""
    said = []
    loads = mock.Mock(side_effect=model_loader.load_models)
    before = set(Path().rglob("*.[pj][np]g"))
    with (
        mock.patch.object(sys, "argv", ["demo.py", *arguments]),
        mock.patch.object(model_loader, "load_models", loads),
        mock.patch.object(sys, "stderr", mock.Mock(write=said.append)),
        mock.patch.object(sys, "stdout", mock.Mock()),
    ):
        try:
            code = demo.main()
        except SystemExit as stop:
            code = stop.code
    new = set(Path().rglob("*.[pj][np]g")) - before
    return code, new, [line for line in "".join(said).split("\n") if line.startswith("demo.py: ")], loads.called


def check_flags(checkpoint, monkeypatch, data):
    arguments = {"--width": "8", "--height": "8", "--steps": "2", "--device": "cpu", "--dtype": "fp32"}
    for flag in data.draw(st.lists(st.sampled_from(list(FLAGS)), max_size=4, unique=True)):
        arguments[flag] = data.draw(st.sampled_from(FLAGS[flag]))
    words = [f"{flag}={value}" for flag, value in arguments.items()]
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.chdir(folder)
        Path("file.txt").write_text("no picture")
        for name in ("picture.png", "taken.png"):
            Image.fromarray(PICTURE).save(name)
        code, new, said, loaded = run_demo([data.draw(st.sampled_from(TEXTS)), *words, "--checkpoint", checkpoint])
        if code == 0:
            assert new
            scale = arguments.get("--hires", 1)
            for path in new:
                assert Image.open(path).size == tuple(
                    enlarged(arguments[side], scale) for side in ("--width", "--height")
                )
        else:
            assert (code, len(said)) == (2, 1), said
            assert not new, said
            assert not loaded or "--device" in said[0] or "cannot be written" in said[0], said


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flags_give_images_or_one_sentence(checkpoint, monkeypatch, data):
    check_flags(checkpoint, monkeypatch, data)


@pytest.mark.slow
@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_flags_give_images_or_one_sentence(checkpoint, monkeypatch, data):
    check_flags(checkpoint, monkeypatch, data)
