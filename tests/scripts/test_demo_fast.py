"""--fast: the tiny model in four steps, with the LoRA that was distilled from it."""

from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from scripts import demo
from scripts.support.fast import SETTINGS, use_fast
from scripts.support.loras import find
from sd.files import DATA
from sd.prompts.other_tools import LoraTag
from sd.samplers import SAMPLERS


@pytest.fixture
def draw(monkeypatch, tmp_path, capsys):
    """Runs the demo in an empty folder, without a checkpoint. Returns the exit code and standard error."""
    monkeypatch.chdir(tmp_path)

    def draw(*arguments):
        monkeypatch.setattr("sys.argv", ["demo.py", *map(str, arguments)])
        return demo.main(), capsys.readouterr().err

    return draw


def test_a_fast_picture_and_the_same_again(draw):
    assert draw("a red house", "--fast", "--seed", 7, "--out", "a.png")[0] == 0
    lines = Image.open("a.png").text["parameters"].split("\n")
    assert lines[0] == "a red house <lora:tiny-lcm:1>"
    assert lines[1].startswith(
        "Steps: 4, Sampler: LCM, CFG scale: 1, Seed: 7, Size: 128x128, Model: tiny, Lora hashes: "
    )
    for number, more in enumerate([[], ["--fast"]]):  # the file names the LoRA, and so may the flag
        code, errors = draw("--from", "a.png", *more, "--out", f"{number}.png")
        assert code == 0
        assert "left out" not in errors
        assert Path(f"{number}.png").read_bytes() == Path("a.png").read_bytes()


def options(**given):
    return Namespace(
        **{"fast": True, "checkpoint": None, "lora": None, "negative": None, **dict.fromkeys(SETTINGS)} | given
    )


def test_other_flags_override_it():
    given = options(steps=1, lora=["style.safetensors"], sampler="tcd")
    use_fast(given)
    assert (given.steps, given.sampler, given.cfg_scale) == (1, "tcd", 1.0)
    assert given.lora == [str(DATA / "tiny-lcm.safetensors"), "style.safetensors"]
    guided = options(cfg_scale=2.0, negative="clouds")
    use_fast(guided)
    assert guided.cfg_scale == 2


def test_without_it_nothing_changes():
    plain = options(fast=False)
    use_fast(plain)
    assert vars(plain) == vars(options(fast=False))


def test_its_settings_are_those_of_the_sampler():
    assert SETTINGS["sampler"] in SAMPLERS
    assert SAMPLERS[SETTINGS["sampler"]].default_steps == SETTINGS["steps"]


def test_a_prompt_may_name_the_lora():
    (path, unet, text), *others = find([LoraTag("<lora:tiny-lcm:0.5>", "tiny-lcm", 0.5, 0.5)], [])[0]
    assert path == DATA / "tiny-lcm.safetensors"
    assert (unet, text, others) == (0.5, 0.5, [])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--checkpoint", "sd15.ckpt"], "--fast should be used without --checkpoint: its LoRA is the tiny model's."),
        (["--negative", "clouds"], "--negative should be used without --fast, which draws without guidance."),
    ],
)
def test_errors_are_one_sentence(draw, arguments, sentence):
    code, error = draw("a cat", "--fast", *arguments)
    assert code == 2
    assert error.startswith(f"demo.py: {sentence}")
    assert not list(Path().iterdir())


def test_a_missing_lora_is_named(draw, monkeypatch, tmp_path):
    monkeypatch.setattr("sd.files.DATA", tmp_path)
    code, error = draw("a cat", "--fast")
    assert code == 2
    assert error.startswith(f"demo.py: --fast needs {tmp_path / 'tiny-lcm.safetensors'}, which is missing: ")
