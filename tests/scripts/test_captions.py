"""Captions: the command that repeats an image gives the same options again, for any prompt."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.demo import parse
from scripts.support.captions import command, details
from scripts.support.command_line import VENV_PYTHON
from scripts.support.saved_settings import parameters
from sd.prompts.alternatives import expand
from sd.request import Request
from sd.samplers import SAMPLERS
from tests import ROOT


def made_with(arguments: list[str], prompt: str = "x"):
    """Options, the request that demo.py makes of them, and models in bfloat16."""
    options = parse(arguments)
    request = Request(
        prompt,
        options.negative,
        strength=options.strength or 0.8,
        cfg_scale=7.5 if options.cfg_scale is None else options.cfg_scale,
        sampler_name="dpm++2m",
        n_inference_steps=20,
        seed=7,
        height=512,
        width=768,
    )
    return options, request, SimpleNamespace(diffusion=torch.nn.Linear(1, 1, dtype=torch.bfloat16), loras=())


def again(prompt: str, arguments: list[str]):
    python, script, *rest = shlex.split(command(*made_with([*arguments, "x"], prompt)))
    assert script == "scripts/demo.py"
    assert python in ("python", VENV_PYTHON)
    return parse(rest)


def check_prompt(prompt):
    (typed,) = again(prompt, []).prompts
    (meant,) = expand(typed)
    same = re.sub(r"(?s)\\(.)", lambda match: match[1] if match[1] in "{}" else match[0], prompt)  # \{ means {
    assert meant == (" ".join(same.split()) if prompt.startswith("-") else same)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from("{}|\\"))
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
    options, request, _ = made_with(["x"])
    text = parameters(options, replace(request, sampler_name=name))
    assert re.search("Sampler: (DDPM|DDIM|PLMS|LMS|Euler|Euler a|Heun|DPM[+][+] 2M( SDE)?|LCM|TCD)( Karras)?,", text)
    assert ("karras" in name) == ("Karras," in text)


def test_a_sampler_of_your_own_keeps_its_name():
    options, request, _ = made_with(["x"])
    assert "Sampler: mine Karras," in parameters(options, replace(request, sampler_name="mine_karras"))


def test_defaults_are_spelled_out(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert command(*made_with(["a cat"], "a cat")) == (
        "python scripts/demo.py 'a cat' --steps 20 --cfg-scale 7.5 --sampler dpm++2m --seed 7 --width 768 --height 512 "
        "--device cpu --dtype bf16"
    )


def test_the_environment_of_the_shell_scripts_is_named(monkeypatch):
    """Elsewhere, there may be no `python`, or one without torch."""
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert command(*made_with(["a cat"], "a cat")).startswith(f"{VENV_PYTHON} scripts/demo.py 'a cat' --steps 20 ")


def test_every_setting_that_matters_is_there():
    given = ["--image", "a b.png", "--mask=-m.png", "--feather", "3", "--strength", "0.65", "--checkpoint", "x.ckpt"]
    found = again("a cat", [*given, "--negative=--n 'quoted'", "--cfg-scale", "-1.5"])
    assert (found.image, found.mask, found.checkpoint) == (Path("a b.png"), Path("-m.png"), Path("x.ckpt"))
    assert (found.feather, found.strength, found.negative, found.cfg_scale) == (3, 0.65, "--n 'quoted'", -1.5)
    assert (found.seed, found.width, found.height, found.steps) == (7, 768, 512, 20)
    assert (found.device, found.dtype, found.sampler, found.n) == ("cpu", "bf16", "dpm++2m", 1)


def test_the_command_sd_repeats_its_own_images(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/sd", "x"])
    assert command(*made_with(["a cat"], "a cat")).startswith("sd 'a cat' --steps 20 ")


def test_details_are_texts_and_none_is_empty():
    pairs = details(*made_with(["a cat"], "a cat"))
    assert all(isinstance(value, str) and value for value in pairs.values())
    assert pairs["Prompt"] == "a cat"
    assert pairs["Size"] == "768x512"
    assert pairs["Precision"] == "bfloat16"
    assert not pairs.keys() & {"Image", "Mask", "Negative prompt", "Feather"}
    assert {"Python", "torch", "numpy", "pillow", "Machine"} <= pairs.keys()
