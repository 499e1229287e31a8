"""The settings in pictures: written and read as the AUTOMATIC1111 web UI does, and drawn again by --from."""

import re
import struct
import time
import zlib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from scripts.support.saved_settings import PAIR as OUR_PAIR
from scripts.support.saved_settings import SAMPLER_NAMES, _take_sampler, parameters, parse, quote, read
from sd.images import write_image
from sd.samplers import SAMPLERS
from tests.scripts.test_captions import made_with
from tests.scripts.test_demo_prompts import said
from tests.support.demo_results import prompt_and_seed

# How the web UI splits the last line.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
WEB_UI = (
    "a red house, (tiled roof:1.2)\nBREAK on [green] hills\nNegative prompt: blurry,\nlow quality\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
    'Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Lora hashes: "a: 1b2c, d: 3e4f", Version: v1.10.1'
)
NAMES = ["plain", "my model, v2: final", "b, Seed: 999, c", "a\nb", 'the "best"', '"', "a\\", "ä 模型", " x ", "a\r"]
BLACK = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_as_they_were(name):
    options, request, _ = made_with(["x", "--checkpoint", f"folder/{name}.ckpt", "--vae", f"{name}.pt"], "a house")
    text = parameters(options, request)
    pairs = parse(text).pairs
    assert (pairs["Model"], pairs["VAE"], pairs["Seed"], pairs["Size"]) == (name, name, "7", "768x512")
    theirs = dict(PAIR.findall(text.strip().split("\n")[-1]))
    assert theirs["Seed"] == "7"
    assert theirs["Model"].strip() == quote(name)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_value_comes_back(value):
    assert parse(f"x\nSteps: 1, Name: {quote(value)}, Seed: 2").pairs == {"Steps": "1", "Name": value, "Seed": "2"}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
@example("Negative prompt:", "a\n Negative prompt: b")
def test_any_prompts_come_back(prompt, negative):
    options, request, _ = made_with(["x"], prompt)
    found = parse(parameters(options, replace(request, uncond_prompt=negative)))
    colons = [re.sub(r"(?m)^(\s*Negative prompt):", r"\1\\:", text) for text in (prompt, negative)]  # \: is a colon
    assert [found.prompt, found.negative] == [text.replace("\r\n", "\n").strip() for text in colons]
    assert found.pairs["Seed"] == "7"


def test_a_prompt_that_looks_like_a_negative_prompt():
    options, request, _ = made_with(["x"], "a\nNegative prompt: b")
    found = parse(parameters(options, request))
    assert (found.prompt, found.negative) == ("a\nNegative prompt\\: b", "")  # \: is a colon
    assert parameters(*made_with(["x"], "a Negative prompt: b")[:2]).startswith("a Negative prompt: b\n")


def test_what_the_web_ui_writes():
    found = parse(WEB_UI)
    assert found.prompt == "a red house, (tiled roof:1.2)\nBREAK on [green] hills"
    assert found.negative == "blurry,\nlow quality"
    assert found.pairs["Schedule type"] == "Karras"
    assert found.pairs["Lora hashes"] == "a: 1b2c, d: 3e4f"
    assert parse(WEB_UI.replace("\n", "\r\n")) == found


def test_a_text_without_settings_is_a_prompt():
    assert parse("a house: red, at noon: yes").pairs == {}
    assert parse("a house: red, at noon: yes").prompt == "a house: red, at noon: yes"


@given(st.text('ab1 -/:,"\\\t.é'))
def test_a_line_is_split_as_in_the_web_ui(line):
    assert OUR_PAIR.findall(line) == PAIR.findall(line)


@pytest.mark.parametrize("part", ["a", " ", "-/", "a b-", "ab:,", 'ab:"', 'ab:"\\",'])
def test_a_long_line_is_quick(part):
    """A picture can hold a million characters. A quadratic time would be hours."""
    began = time.process_time()
    parse(part * (1_000_000 // len(part)))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
@pytest.mark.parametrize("text", [WEB_UI, WEB_UI.replace("red", "röd 红 😀")])
def test_every_format_keeps_them(tmp_path, suffix, text):
    path = tmp_path / f"a{suffix}"
    write_image(path, BLACK, text)
    assert read(path) == parse(text)


def with_comment(path: Path, comment: bytes, order: str = "<") -> None:
    """A JPEG file whose EXIF data has this UserComment."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    first = struct.pack(f"{order}HHHIII", 1, 0x8769, 4, 1, 26, 0)
    second = struct.pack(f"{order}HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0" + head + first + second + comment)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + WEB_UI.encode("utf-16-be"),
        b"UNICODE\0" + WEB_UI.encode("utf-16-le"),
        b"ASCII\0\0\0" + WEB_UI.encode(),
        bytes(8) + WEB_UI.encode(),
        WEB_UI.encode(),
    ],
)
def test_comments_of_other_tools(tmp_path, comment, order):
    with_comment(tmp_path / "a.jpg", comment, order)
    assert read(tmp_path / "a.jpg") == parse(WEB_UI)


def test_ours_has_the_type_that_other_tools_expect(tmp_path):
    write_image(tmp_path / "a.jpg", BLACK, WEB_UI)
    with_comment(tmp_path / "b.jpg", b"UNICODE\0" + WEB_UI.encode("utf-16-be"), ">")
    assert Image.open(tmp_path / "a.jpg").info["exif"] == Image.open(tmp_path / "b.jpg").info["exif"]


def test_a_chunk_behind_the_picture(tmp_path):
    write_image(tmp_path / "a.png", BLACK)
    content = (tmp_path / "a.png").read_bytes()
    chunk = b"tEXtparameters\0" + WEB_UI.encode()
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = content.index(b"IEND") - 4
    (tmp_path / "b.png").write_bytes(content[:end] + chunk + content[end:])
    assert read(tmp_path / "b.png") == parse(WEB_UI)


def test_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text(WEB_UI, encoding="utf-8-sig")
    assert read(tmp_path / "a.txt") == parse(WEB_UI)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.png", None, "--from should be a picture with settings from this tool or the"),
        ("a.png", b"text", "--from should be a PNG, JPEG or WebP picture, and "),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "--from "),
        ("a.txt", b"a house", "--from should be a picture with settings"),
        ("a.txt", b"a house: red, at noon: yes, with a sun: no", "--from should be a picture with settings"),
        ("a.txt", b"\xff\xfea", "--from should be a picture or a text file in UTF-8"),
    ],
)
def test_files_without_settings(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content) if content else write_image(path, BLACK)
    with pytest.raises(ValueError, match=sentence) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_comment_that_is_too_long_for_jpeg_is_cut(tmp_path):
    write_image(tmp_path / "a.jpg", BLACK, "ä" * 50_000)
    with Image.open(tmp_path / "a.jpg") as image:
        assert len(image.getexif().get_ifd(0x8769)[0x9286]) == 64_008


WITH_UNUSED = (
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


def written(name):
    with Image.open(name) as image:
        return image.text["parameters"].split("\n")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_is_drawn_again(draw, suffix):
    first = ["a (red:1.3) \\{cat\\} BREAK\nby \\(x\\)", "--negative", "a dog,\nNegative prompt: b", "--seed", 5]
    draw(*first, "--steps", 2, "--width", 32, "--height", 40, "--sampler", "heun_karras", "--out", "a.png")
    draw(*first, "--steps", 2, "--width", 32, "--height", 40, "--sampler", "heun_karras", "--out", f"b{suffix}")
    assert draw("--from", f"b{suffix}", "--out", "again.png") == []
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("again.png")))
    assert written("a.png") == written("again.png")


def test_flags_override(draw):
    draw("a cat", "--negative", "b", "--steps", 2, "--seed", 5, "--cfg-scale", 3, "--out", "a.png")
    draw("a {red|blue} dog", "--from", "a.png", "--seed", 7, "--negative", "", "--steps", 1, "--width", 32)
    assert prompt_and_seed("picture-2.png") == ("a blue dog", 7)
    assert written("picture.png")[1].startswith("Steps: 1, Sampler: DPM++ 2M, CFG scale: 3, Seed: 7, Size: 32x64, ")
    draw("--from", "a.png", "--seed", -1, "--steps", 1, "--out", "b.png")
    assert prompt_and_seed("b.png")[1] != 5


def test_a_picture_of_the_web_ui(draw):
    write_image("a.jpg", np.zeros((8, 8, 3), np.uint8), WITH_UNUSED)
    lines = draw("--from", "a.jpg")
    assert lines == [
        "a.jpg was made with the model 'other, model', not 'micro'; --checkpoint chooses another.",
        "these settings in a.jpg are not used: Model hash.",
    ]
    assert written("picture.png") == [
        "a (red:1.2) house,",
        "{{tiled}} [roof]",
        "Negative prompt: blurry, {b|c}",
        "Steps: 3, Sampler: Euler Karras, CFG scale: 6.5, Seed: 99, Size: 48x40, Model: micro, Clip skip: 2, "
        "Hires upscale: 2, Hires upscaler: Lanczos, Hires strength: 0.7",
    ]
    assert Image.open("picture.png").size == (96, 80)


def test_a_second_pass_and_freeu_are_read_back(draw):
    flags = ["--hires", 1.5, "--hires-strength", 0.5, "--hires-latents", "--freeu", 1.5, 1.6, 0.9, 0.2]
    draw("a cat", *flags, "--steps", 2, "--width", 32, "--height", 32, "--seed", 3, "--out", "a.png")
    assert draw("--from", "a.png", "--out", "b.png") == []
    assert written("a.png")[-1].endswith(
        "FreeU: 1.5 1.6 0.9 0.2, Hires upscale: 1.5, Hires upscaler: Latent, Hires strength: 0.5"
    )
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert draw("--from", "a.png", "--film", "a.webp", "--out", "c.png") == [
        "these settings in a.png are not used: Hires upscale, Hires upscaler, Hires strength."
    ]


def test_the_guided_part_is_read_back(draw):
    flags = ["--cfg-interval", 0, 0.5, "--width", 32, "--height", 32, "--seed", 3]
    draw("a cat", *flags, "--out", "a.png")
    assert draw("--from", "a.png", "--out", "b.png") == []
    assert written("a.png")[-1].endswith("CFG interval: 0 0.5")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_the_spacing_is_read_back(draw):
    flags = ["--sampler", "euler_a", "--spacing", "trailing", "--steps", 1]
    draw("a cat", *flags, "--width", 32, "--height", 32, "--seed", 3, "--out", "a.png")
    assert draw("--from", "a.png", "--out", "b.png") == []
    assert written("a.png")[-1].endswith("Timestep spacing: trailing")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_the_strength_counts_with_an_image(draw):
    write_image("a.jpg", np.zeros((40, 48, 3), np.uint8), WITH_UNUSED)
    assert "Denoising" not in draw("--from", "a.jpg", "--image", "a.jpg")[1]
    assert written("picture.png")[-1].endswith("Denoising strength: 0.7, Clip skip: 2")


def test_a_report_has_no_deep_cache(draw):
    """It shows every stage at every step."""
    draw("a cat", "--deep-cache", 2, "--steps", 2, "--width", 32, "--height", 32, "--out", "a.png")
    assert draw("--from", "a.png", "--out", "b.png") == []
    assert "Deep cache: 2" in written("b.png")[-1]
    assert draw("--from", "a.png", "--report", "a.html") == ["these settings in a.png are not used: Deep cache."]
    assert "Deep cache" not in written("picture.png")[-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_read_back(draw, monkeypatch, sampler):
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
    assert draw("--from", "a.png") == [f"these settings in a.png are not used: {unused}."]
    assert f"Sampler: {ours}, " in written("picture.png")[-1]


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
