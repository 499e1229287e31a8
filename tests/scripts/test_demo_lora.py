"""LoRAs in the demo: --lora, <lora:name:0.8> in a prompt, the settings in the picture, and the report."""

import hashlib
import html
import re
import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.support import loras
from scripts.support.loras import find, flag_value, given_loras, hash_notes, hashes, titles
from sd.prompts.other_tools import take_loras
from tests.scripts.test_demo_prompts import said
from tests.support.demo_results import names

LAYERS = {"unet": "lora_unet_mid_block_attentions_0_proj_in", "te": "lora_te_text_model_encoder_layers_0_mlp_fc2"}


def write(path, seed=0, ins=(32, 128), metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, width in zip(LAYERS.values(), ins):
        state[f"{name}.lora_up.weight"] = torch.randn(32, 4, generator=generator)
        state[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator)
    save_file(state, path, metadata)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in the place of data/loras, with two LoRAs."""
    folder = tmp_path / "data" / "loras"
    write(folder / "style.safetensors")
    write(folder / "more" / "detail.safetensors", seed=1)
    monkeypatch.setattr(loras, "folder", lambda: folder)
    return folder


def pixels(name):
    return np.asarray(Image.open(name)).astype(int)


def written(name):
    with Image.open(name) as image:
        return image.text["parameters"].split("\n")


def differ(one, other):
    return not np.array_equal(pixels(one), pixels(other))


@pytest.mark.slow
def test_a_file_and_a_name_give_the_same_picture(run_demo, folder):
    quick = ["--seed", 3]
    style = folder / "style.safetensors"
    assert run_demo("a cat", *quick, "--out", "without.png")[0] == 0
    assert run_demo("a cat <lora:style:0.8>", *quick, "--out", "name.png")[0] == 0
    assert run_demo("a cat", *quick, "--lora", f"{style}:0.8", "--out", "flag.png")[0] == 0
    assert not differ("name.png", "flag.png")
    assert differ("name.png", "without.png")
    assert written("name.png") == written("flag.png")
    assert written("name.png")[0] == "a cat <lora:style:0.8>"
    digest = re.search(r'Lora hashes: "style: ([0-9a-f]{12})"', written("name.png")[-1])[1]
    data = style.read_bytes()
    assert hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest().startswith(digest)
    assert "Lora" not in written("without.png")[-1]


@pytest.mark.slow
def test_strengths_of_each_network(run_demo, folder):
    style = folder / "style.safetensors"
    for number, given in enumerate(["0.5", "0.5:0", "0:0.5", "0.5:0.5"]):
        assert run_demo("a cat", "--seed", 3, "--lora", f"{style}:{given}", "--out", f"{number}.png")[0] == 0
    assert not differ("0.png", "3.png")
    assert differ("0.png", "1.png")
    assert differ("1.png", "2.png")
    assert written("1.png")[0] == "a cat <lora:style:unet=0.5:te=0>"
    assert run_demo("--from", "1.png", "--out", "again.png")[0] == 0
    assert not differ("1.png", "again.png")


def test_a_picture_is_drawn_again(run_demo, folder):
    prompt = r"a \{red\} cat <lora:style:0.8> <lora:detail:-0.5>"
    assert run_demo(prompt, "--seed", 3, "--out", "a.png")[0] == 0
    code, _, err = run_demo("--from", "a.png", "--out", "again.png")
    assert (code, said(err)) == (0, [])
    assert not differ("a.png", "again.png")
    assert written("a.png") == written("again.png")


@pytest.mark.slow
def test_a_picture_whose_lora_is_elsewhere(run_demo, folder, tmp_path):
    assert run_demo("a cat <lora:style:0.8>", "--seed", 3, "--out", "a.png")[0] == 0
    moved = folder.rename(tmp_path / "elsewhere") / "style.safetensors"
    code, _, err = run_demo("--from", "a.png", "--out", "without.png")
    assert code == 0
    assert said(err) == [
        f"<lora:style:0.8> is left out: there is no 'style' in {folder}, which has none; --lora gives a file elsewhere."
    ]
    assert run_demo("--from", "a.png", "--lora", moved, "--out", "again.png")[0] == 0
    assert not differ("a.png", "again.png")
    other = write(tmp_path / "other" / "style.safetensors", seed=9)
    _, _, err = run_demo("--from", "a.png", "--lora", other, "--out", "other.png")
    assert said(err) == [f"{other} is not the LoRA of that name that a.png was made with: its tensors differ."]


@pytest.mark.slow
def test_each_prompt_has_its_own(run_demo, folder):
    assert run_demo("a cat {<lora:style:0.8>|<lora:detail:1>|}", "--seed", 3)[0] == 0
    assert [written(name)[0] for name in ("picture.png", "picture-2.png", "picture-3.png")] == [
        "a cat <lora:style:0.8>",
        "a cat <lora:detail:1>",
        "a cat",
    ]
    assert run_demo("a cat", "--seed", 3, "--out", "without.png")[0] == 0
    assert run_demo("a cat <lora:detail>", "--seed", 3, "--out", "detail.png")[0] == 0
    assert not differ("picture-3.png", "without.png")
    assert not differ("picture-2.png", "detail.png")
    assert differ("picture.png", "picture-2.png")


def test_the_report(run_demo, folder):
    style = folder / "style.safetensors"
    given = ["a cat <lora:detail:0.5>", "--lora", f"{style}:1:0.25", "--seed", 3]
    assert run_demo(*given, "--report", "a.html")[0] == 0
    page = Path("a.html").read_text(encoding="utf-8")
    line = "style.safetensors (1 in the U-Net, 0.25 in the text encoder), detail.safetensors (0.5)"
    assert f"<dt>LoRA</dt><dd><bdi>{line}</bdi></dd>" in page
    assert "LoRAs at work: <bdi>style.safetensors (1 in the U-Net, 0.25 in the text encoder)</bdi>, <bdi>" in page
    (code,) = re.findall(r"<code>(.*?)</code>", page)
    command = html.unescape(re.sub(r"<[^>]+>", "", code))
    assert run_demo(*shlex.split(command)[2:], "--out", "again.png")[0] == 0
    assert not differ("picture.png", "again.png")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["a", "--lora", "none.safetensors:0.8"],
            "--lora should be FILE, FILE:STRENGTH or FILE:UNET:TEXT: 'none.safetensors' is not a file here.",
        ),
        (
            ["a", "--lora", "style.safetensors:much"],
            "--lora should be FILE, FILE:STRENGTH or FILE:UNET:TEXT, with numbers such as 0.8, not 'style.safetensors:",
        ),
        (
            ["a", "--lora", "style.safetensors:1:1:1"],
            "FILE:UNET:TEXT, with numbers such as 0.8, not 'style.safetensors:1",
        ),
        (
            ["a", "--lora", "style.safetensors:nan"],
            "FILE:UNET:TEXT, with numbers such as 0.8, not 'style.safetensors:nan",
        ),
        (["a", "--lora", ":0.5"], "--lora should be FILE, FILE:STRENGTH or FILE:UNET:TEXT: '' is not a file here."),
        (["a", "--lora", "data:0.5"], "FILE:UNET:TEXT: 'data' is a folder: give the file in it."),
        (["a", "--lora", "style.safetensors:200"], "The strength of style.safetensors should be a number from -100 to"),
        (["a", "--lora", "wide.safetensors"], "wide.safetensors does not fit this model: another shape or rank: "),
        (["a <lora:style>", "b <lora:wide>"], "wide.safetensors does not fit this model: another shape or rank: "),
        (["a <lora:style:x>"], "prompt should have LoRAs like <lora:name:0.8> or <lora:name:unet="),
        (["a", "--lora", "picture.png", "--out", "picture.png"], "--lora should be"),
    ],
)
def test_errors_are_one_sentence(run_demo, folder, arguments, sentence):
    write(Path("style.safetensors"))
    write(Path("wide.safetensors"), ins=(48, 128))
    write(folder / "wide.safetensors", ins=(48, 128))
    before = names()
    code, out, err = run_demo(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err.splitlines()[-1]
    assert names() == before


def test_tags_that_have_no_effect(run_demo, folder):
    _, _, err = run_demo("a cat <lora:stile:1>", "--negative", "blurry <lora:style:1>", "--steps", 1)
    assert said(err) == [
        f"<lora:stile:1> is left out: there is no 'stile' in {folder}, which has detail, style; --lora gives a file "
        "elsewhere.",
        "<lora:style:1> in --negative is left out: a LoRA belongs in the prompt.",
    ]
    assert written("picture.png")[:2] == ["a cat", "Negative prompt: blurry"]


@pytest.mark.parametrize(
    "text, path, unet, te",
    [
        ("a.safetensors", "a.safetensors", None, None),
        ("a.safetensors:0.8", "a.safetensors", 0.8, 0.8),
        ("a.safetensors:-1:.5", "a.safetensors", -1, 0.5),
        ("a.safetensors:0:1", "a.safetensors", 0, 1),
        ("a.safetensors:1e-3", "a.safetensors", 0.001, 0.001),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", None, None),
        (r"C:\loras\a.safetensors:0.8", r"C:\loras\a.safetensors", 0.8, 0.8),
        (r"C:a.safetensors:0.8:0.6", "C:a.safetensors", 0.8, 0.6),
        ("odd:2", "odd:2", None, None),
        ("odd:2:0.5", "odd:2", 0.5, 0.5),
    ],
)
def test_a_path_and_its_strengths(monkeypatch, text, path, unet, te):
    monkeypatch.setattr(Path, "is_file", lambda self: str(self) == path)
    (lora,) = given_loras(Namespace(lora=[text]))
    assert lora == (Path(path), unet, te)
    if unet is not None:
        assert given_loras(Namespace(lora=[flag_value(lora)])) == [lora]


def picked(folder, tag, *given):
    found, notes = find(take_loras(f"a cat {tag}")[1], given)
    assert bool(found) != bool(notes)
    return [(path.relative_to(folder).as_posix(), *strengths) for path, *strengths in found]


def test_names_that_a_tag_may_have(folder):
    write(folder / "people" / "D\u00e9j\u00e0 Vu v1.2.safetensors")
    write(folder / "trained.safetensors", metadata={"ss_output_name": "Ann's Style"})
    for epoch in (1, 2):
        write(folder / f"bob-{epoch}.safetensors", metadata={"ss_output_name": "bob"})
    write(folder / "Style.safetensors")
    (folder / "empty.safetensors").touch()
    for tag, name in {
        "style": "style",
        "Style": "Style",
        "STYLE": "Style",
        "style.safetensors": "style",
        "d\u00c9j\u00e0 vu V1.2": "people/D\u00e9j\u00e0 Vu v1.2",
        "De\u0301ja\u0300 Vu v1.2": "people/D\u00e9j\u00e0 Vu v1.2",
        "people/D\u00e9j\u00e0 Vu v1.2": "people/D\u00e9j\u00e0 Vu v1.2",
        "people\\D\u00e9j\u00e0 Vu v1.2": "people/D\u00e9j\u00e0 Vu v1.2",
        "ann's style": "trained",
    }.items():
        assert picked(folder, f"<lora:{tag}:0.5>") == [(f"{name}.safetensors", 0.5, 0.5)], tag
    for tag in ("bob", "tyle", "le", "other/style", "safetensors"):  # both epochs are called bob
        assert picked(folder, f"<lora:{tag}:0.5>") == [], tag


@pytest.mark.parametrize(
    "header",
    ["", "[]", '{"a": 1}', '{"__metadata__": "ann"}', '{"__metadata__": {"ss_output_name": 1e999}}', "[" * 9**5],
)
def test_damaged_files_have_no_other_name(folder, header):
    for length in (len(header), 2**63):
        (folder / "odd.safetensors").write_bytes(length.to_bytes(8, "little") + header.encode())
        loras._alias.cache_clear()
        assert picked(folder, "<lora:ann>") == []
        assert picked(folder, "<lora:odd>") == [("odd.safetensors", 1, 1)]


def test_a_tag_has_the_strength_if_the_flag_has_none(folder):
    style = write(folder / "a:b.safetensors", metadata={"ss_output_name": "other"})
    for name in ("a_b", "other"):
        for strengths, expected in [((None, None), (0.3, 0.7)), ((1.0, 1.0), (1.0, 1.0)), ((0.0, 2.0), (0.0, 2.0))]:
            found = picked(folder, f"<lora:{name}:unet=0.3:te=0.7>", (style, *strengths))
            assert found == [("a:b.safetensors", *expected)]
    assert picked(folder, "", (style, None, None)) == [("a:b.safetensors", 1.0, 1.0)]


def test_hashes_under_the_name_in_the_metadata(folder):
    path = write(folder / "v2.safetensors", metadata={"ss_output_name": "ann"})
    right = hashes([(path, 1, 1)]).removeprefix("v2: ")
    for saved, notes in [(f"ann: {right}", 0), (f"ann: {right.upper()}", 0), ("ann: 0123456789ab", 1), ("bob: 01", 0)]:
        assert len(hash_notes([(path, 1, 1)], saved, Path("a.png"))) == notes, saved


def test_titles_show_the_loras_that_differ():
    style, detail = (Path("style.safetensors"), 0.8, 0.8), (Path("detail.pt"), 1.0, 0.5)
    own = [(style, detail), (style,), ()]
    tags = ["<lora:style:0.8> <lora:detail:unet=1:te=0.5>", "<lora:style:0.8>"]
    assert titles(["a cat"] * 3, own) == [f"a cat {tags[0]}", f"a cat {tags[1]}", "a cat"]
    assert titles(["a cat", "a dog"], [(style,)] * 2) == ["a cat", "a dog"]


def test_a_grid_is_labelled_with_them(monkeypatch, run_demo, folder):
    from scripts import demo

    labels = []
    grid = demo.grid
    monkeypatch.setattr(demo, "grid", lambda titles, *rest: labels.append(titles) or grid(titles, *rest))
    code, out, _ = run_demo("a cat {<lora:style:0.8>|}", "--grid")
    assert code == 0
    assert labels == [["a cat <lora:style:0.8>", "a cat"]]
    assert [line.endswith("s  a cat <lora:style:0.8>") for line in out.splitlines()] == [True, False, False]
