"""Embeddings in the demo: --embedding, the folder data/embeddings/, and their words in pictures and commands."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts.demo import parse
from scripts.support import embeddings
from scripts.support.checks import note_unknown_words
from scripts.support.embeddings import split_word
from tests.scripts.test_captions import again
from tests.scripts.test_demo_prompts import said
from tests.support.demo_results import names
from tests.support.synthetic_embeddings import vectors, write

QUICK = ("--seed", 3, "--steps", 1)


@pytest.fixture
def folder(monkeypatch, tmp_path_factory):
    """data/embeddings/, empty."""
    folder = tmp_path_factory.mktemp("embeddings")
    monkeypatch.setattr(embeddings, "folder", lambda: folder)
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def saved(name: str = "picture.png") -> str:
    with Image.open(name) as picture:
        return picture.text["parameters"]


def pixels(name: str) -> bytes:
    with Image.open(name) as picture:
        return picture.tobytes()


@pytest.mark.parametrize(
    "given, file, word",
    [
        ("cat.pt", "cat.pt", None),
        ("cat.pt:<S*>", "cat.pt", "<S*>"),
        ("cat.pt:", "cat.pt", ""),
        ("C:\\my files\\cat.pt", "C:\\my files\\cat.pt", None),
        ("C:/cat.pt", "C:/cat.pt", None),
        ("C:cat.pt", "C:cat.pt", None),
        ("C:\\cat.pt:two words", "C:\\cat.pt", "two words"),
        ("data/v1:2/cat.pt", "data/v1:2/cat.pt", None),
        ("a:b:c", "a:b", "c"),
    ],
)
def test_file_and_word(given, file, word):
    assert split_word(given) == (Path(file), word)


def test_a_file_with_a_colon_in_its_name(tmp_path):
    path = write(tmp_path / "cat:2.pt", "web ui")
    assert split_word(str(path)) == (path, None)
    assert split_word(f"{path}:dog") == (path, "dog")
    assert split_word(f"{path}:dog:2/3") == (path, "dog:2/3")
    assert split_word(f"{path}:") == (path, "")


def test_the_embedding_flag(run_demo, folder):
    cat, bad = write(Path("Cat.pt"), "web ui"), write(Path("bad.safetensors"), "emb_params", vectors(2, seed=1))
    code, _, err = run_demo("a (CAT:1.2)", "--embedding", cat, "--embedding", f"{bad}:<B>", "--negative", "<b>", *QUICK)
    assert (code, said(err)) == (0, [])
    assert saved().endswith(f'TI hashes: "<b>: {digest(bad)}, cat: {digest(cat)}"')
    run_demo("a (CAT:1.2)", "--negative", "<b>", *QUICK)
    assert "TI hashes" not in saved("picture-2.png")
    assert pixels("picture.png") != pixels("picture-2.png")


def test_an_embedding_that_no_prompt_names(run_demo, folder):
    cat = write(Path("cat.bin"), "by token")
    code, _, err = run_demo("two cats", "--embedding", cat, *QUICK)
    assert code == 0
    assert said(err) == ["cat.bin has no effect: no prompt has 'cat' or '<my-cat>'."]
    assert "TI hashes" not in saved()


def test_the_folder(run_demo, folder):
    """A file there is used if a prompt names it, in upper or lower case; others are not even read."""
    (folder / "more").mkdir()
    path = write(folder / "more/EasyNegative.safetensors", "emb_params")
    write(folder / "easynegative.pt", "web ui", vectors(3, 99))  # after the safetensors file of the same name
    (folder / "broken.pt").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    report = ("--report", "a.html")
    code, _, err = run_demo("a house, notes", "--negative", "(easynegative:1.3), brokenly", *QUICK, *report)
    assert code == 0
    assert f"easynegative ({path})" in Path("a.html").read_text()
    assert said(err) == [f"'easynegative' is the embedding in {path}."]
    assert saved().endswith(f'TI hashes: "easynegative: {digest(path)}"')


def test_a_file_in_the_folder_that_does_not_fit_is_named(run_demo, folder):
    write(folder / "art.pt", "web ui", vectors(1, 768))
    (folder / "broken.pt").write_bytes(b"")
    code, _, err = run_demo("art, broken", *QUICK)
    assert code == 0
    start = f"'art' is read as text: {folder / 'art.pt'} should have vectors of 32 numbers for these models, not 768"
    assert said(err)[0].startswith(start)
    assert said(err)[1] == f"'broken' is read as text: {folder / 'broken.pt'} is empty; download it again."
    assert "TI hashes" not in saved()


def test_the_flag_comes_before_the_folder(run_demo, folder):
    write(folder / "cat.pt", "web ui", vectors(seed=1))
    cat = write(Path("cat.pt"), "web ui")
    assert said(run_demo("a cat", "--embedding", cat, *QUICK)[2]) == []
    assert digest(cat) in saved()


@pytest.mark.slow
def test_a_picture_is_drawn_again_with_its_embeddings(run_demo, folder):
    path = write(folder / "cat.pt", "web ui")
    run_demo("a cat", "--negative", "dog, cat", "--seed", 3)
    code, _, err = run_demo("--from", "picture.png")
    assert (code, said(err)) == (0, [f"'cat' is the embedding in {path}."])
    assert pixels("picture.png") == pixels("picture-2.png")
    assert saved("picture.png") == saved("picture-2.png")

    path.rename("other.pt")
    code, _, err = run_demo("--from", "picture.png", "--embedding", "other.pt:cat")
    assert (code, said(err)) == (0, [])
    assert pixels("picture.png") == pixels("picture-3.png")


@pytest.mark.slow
def test_a_picture_whose_embeddings_are_missing_or_others(run_demo, folder):
    path = write(folder / "cat.pt", "web ui")
    run_demo("a cat", *QUICK)
    path.unlink()
    _, _, err = run_demo("--from", "picture.png")
    there = f"--embedding gives it, or a file of that name in {folder}."
    assert said(err) == [f"picture.png was made with an embedding for 'cat': {there}"]
    write(path, "web ui", vectors(seed=1))
    _, _, err = run_demo("--from", "picture.png")
    assert said(err)[1:] == ["picture.png was made with another embedding for 'cat'."]


def test_a_picture_of_the_web_ui(run_demo, folder):
    """It writes ten or twelve digits of the file's SHA-256."""
    path = write(folder / "EasyNegative.pt", "web ui")
    text = (
        "a house\nNegative prompt: easynegative, bad\nSteps: 1, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 32x32, "
    )
    Path("a.txt").write_text(
        f'{text}TI hashes: "EasyNegative: {digest(path)[:10]}, bad: 0123456789ab", Version: v1.6.0'
    )
    _, _, err = run_demo("--from", "a.txt")
    lines = said(err)
    assert lines[0] == "these settings in a.txt are not used: Version."
    assert lines[1] == f"'easynegative' is the embedding in {path}."
    assert [line.partition(":")[0] for line in lines[2:]] == ["a.txt was made with an embedding for 'bad'"]


@pytest.mark.parametrize("value", ["", ":", ": 12", "a", " " * 100_000, "x:1," * 100_000, "\ud800: 12, ,:,"])
def test_odd_settings_of_pictures(folder, value):
    options = parse(["a cat"])
    embeddings.take_embeddings(options, {"TI hashes": value})
    assert embeddings._differences(options, ["a cat"]) == []


XL = {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("absent.pt", "--embedding should be a file, or FILE:word: there is none at absent.pt."),
        ("absent.pt:cat", "--embedding should be a file, or FILE:word: there is none at absent.pt."),
        ("cat.pt: ", "--embedding should have a word after the colon, or no colon, not 'cat.pt: '."),
        ("xl.pt", "xl.pt is an embedding for Stable Diffusion XL; give one for 1.x or 2.x."),
        ("wide.pt", "wide.pt should have vectors of 32 numbers for these models, not 768 (Stable Diffusion 1.x)."),
        ("cat.png", "cat.png should be a .safetensors, .pt or .bin file: pictures with embeddings are not read."),
        ("empty.pt:cat", "empty.pt is empty; download it again."),
    ],
)
def test_errors_are_one_line_before_anything_is_drawn(run_demo, folder, given, sentence):
    write(Path("cat.pt"), "web ui")
    write(Path("wide.pt"), "web ui", vectors(1, 768))
    torch.save(XL, "xl.pt")
    Path("cat.png").touch()
    Path("empty.pt").touch()
    before = names()
    code, _, err = run_demo("a cat", "--embedding", given, *QUICK)
    assert (code, said(err)) == (2, [sentence])
    assert names() == before


def test_the_command_of_a_report_has_the_embeddings():
    options = again("a cat", ["--embedding", "my cat.pt", "--embedding", "b.pt:<b>"])
    assert options.embedding == ["my cat.pt", "b.pt:<b>"]
    assert again("a cat", []).embedding is None
    assert parse(["x"]).embedded == {}


def test_the_words_of_embeddings_are_known_to_the_tiny_model(capsys):
    note_unknown_words(["a red house My-Cat", "cat:S*"], ["my-cat", "cat:s*"])
    assert capsys.readouterr().err == ""
    note_unknown_words(["a red house My-Cats"], ["my-cat"])
    assert "was not trained on my, cats: " in capsys.readouterr().err
