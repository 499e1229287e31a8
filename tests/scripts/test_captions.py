"""Captions: the command that repeats an image gives the same options again, for any prompt."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.demo import parse
from scripts.support.captions import command, details, parameters
from sd.prompts.alternatives import expand
from sd.samplers import SAMPLERS


def made_with(arguments: list[str]):
    """Options, and the rest of what `command` and `details` take, for models in bfloat16."""
    diffusion = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    more = {"n_inference_steps": 20, "sampler_name": "dpm++2m", "strength": 0.8, "deep_cache": 1}
    options = parse(arguments)
    more["strength"] = options.strength or more["strength"]
    more["cfg_scale"] = 7.5 if options.cfg_scale is None else options.cfg_scale
    return options, {"models": SimpleNamespace(diffusion=diffusion), **more}


def again(prompt: str, arguments: list[str]):
    options, more = made_with([*arguments, "x"])
    python, script, *rest = shlex.split(command(options, prompt, more, 7, (512, 768, 3)))
    assert (python, script) == ("python", "scripts/demo.py")
    return parse(rest)


def check_prompt(prompt):
    (typed,) = again(prompt, []).prompts
    (meant,) = expand(typed)
    assert meant == (" ".join(prompt.split()) if prompt.startswith("-") else prompt)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}\0"))
beginnings = pytest.mark.parametrize("first", ["", "-", "--seed", "#", "'", "$(x)`y`\\"])


@settings(max_examples=20)
@given(texts)
@beginnings
def test_any_prompt(first, text):
    check_prompt(first + text)


@pytest.mark.slow
@settings(max_examples=200)
@given(texts)
@beginnings
def test_hundreds_of_prompts(first, text):
    check_prompt(first + text)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_the_name_that_other_tools_use(name):
    options, more = made_with(["x"])
    text = parameters(options, "x", more | {"sampler_name": name}, 7, (8, 8, 3))
    assert re.search("Sampler: (DDPM|DDIM|PLMS|LMS|Euler|Euler a|Heun|DPM[+][+] 2M( SDE)?)( Karras)?,", text)
    assert ("karras" in name) == ("Karras," in text)


def test_defaults_are_spelled_out():
    options, more = made_with(["a cat"])
    assert command(options, "a cat", more, 7, (512, 768, 3)) == (
        "python scripts/demo.py 'a cat' --steps 20 --cfg-scale 7.5 --sampler dpm++2m --seed 7 --width 768 --height 512 "
        "--device cpu --dtype bf16"
    )


def test_every_setting_that_matters_is_there():
    given = ["--image", "a b.png", "--mask=-m.png", "--feather", "3", "--strength", "0.65", "--checkpoint", "x.ckpt"]
    found = again("a cat", [*given, "--negative=--n 'quoted'", "--cfg-scale", "-1.5"])
    assert (found.image, found.mask, found.checkpoint) == (Path("a b.png"), Path("-m.png"), Path("x.ckpt"))
    assert (found.feather, found.strength, found.negative, found.cfg_scale) == (3, 0.65, "--n 'quoted'", -1.5)
    assert (found.seed, found.width, found.height, found.steps) == (7, 768, 512, 20)
    assert (found.device, found.dtype, found.sampler, found.n) == ("cpu", "bf16", "dpm++2m", 1)


def test_the_command_sd_repeats_its_own_images(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/sd", "x"])
    options, more = made_with(["a cat"])
    assert command(options, "a cat", more, 7, (512, 768, 3)).startswith("sd 'a cat' --steps 20 ")


def test_details_are_texts_and_none_is_empty():
    options, more = made_with(["a cat"])
    pairs = details(options, "a cat", more, 7, (512, 768, 3))
    assert all(isinstance(value, str) and value for value in pairs.values())
    assert pairs["Prompt"] == "a cat"
    assert pairs["Size"] == "768x512"
    assert pairs["Precision"] == "bfloat16"
    assert not pairs.keys() & {"Image", "Mask", "Negative prompt", "Feather"}
    assert {"Python", "torch", "numpy", "pillow", "Machine"} <= pairs.keys()
