"""The settings in pictures: written and read as the AUTOMATIC1111 web UI does."""

import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scripts.support.captions import parameters
from scripts.support.saved_settings import parse, protect, quote, read
from sd.images import write_image
from tests.scripts.test_captions import made_with

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
def test_any_prompts_come_back(prompt, negative):
    options, request, _ = made_with(["x"], prompt)
    found = parse(parameters(options, replace(request, uncond_prompt=negative)))
    assert (found.prompt, found.negative) == tuple(text.replace("\r\n", "\n").strip() for text in (prompt, negative))
    assert found.pairs["Seed"] == "7"


def test_a_prompt_that_looks_like_a_negative_prompt():
    options, request, _ = made_with(["x"], "a\nNegative prompt: b")
    found = parse(parameters(options, request))
    assert (found.prompt, found.negative) == ("a\nNegative prompt\\: b", "")  # \: is a colon
    assert protect("a Negative prompt: b") == "a Negative prompt: b"


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
        ("a.png", None, "--from should be a picture with its settings, as this tool"),
        ("a.png", b"text", "--from should be a PNG, JPEG or WebP picture, and "),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "--from "),
        ("a.txt", b"a house", "--from should be a picture with its settings"),
        ("a.txt", b"a house: red, at noon: yes, with a sun: no", "--from should be a picture with its settings"),
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
