"""The demo script, as a person runs it. Its grids, films and reports are tested in test_demo_other_files.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import demo
from scripts.support import checks
from sd.checkpoints import hub
from tests import ROOT
from tests.support.demo_results import names, prompt_and_seed


def test_writes_a_picture_and_says_where(run_demo):
    code, out, _ = run_demo("a cat", "--negative", "a dog", "--seed", 5, "--cfg-scale", 3)
    assert code == 0
    path, _, seed, seconds, _ = out.split()
    assert (path, seed) == ("picture.png", "5")
    assert 0 <= float(seconds) < 100
    with Image.open("picture.png") as picture:
        assert picture.size == (32, 40)
        assert picture.text["parameters"] == (
            "a cat\nNegative prompt: a dog\n"
            "Steps: 2, Sampler: DPM++ 2M, CFG scale: 3, Seed: 5, Size: 32x40, Model: micro"
        )
    assert names() == ["picture.png"]


def test_never_overwrites_by_itself(run_demo):
    for expected in (["picture.png"], ["picture-2.png", "picture.png"]):
        assert run_demo("a cat")[0] == 0
        assert names() == expected


def test_several_pictures_are_those_of_their_seeds(run_demo):
    run_demo("a cat", "--n", 3, "--seed", 7, "--out", "cat.png")
    assert names() == ["cat-2.png", "cat-3.png", "cat.png"]
    run_demo("a cat", "--seed", 8, "--out", "alone.png")
    alone, second = (np.asarray(Image.open(name)) for name in ("alone.png", "cat-2.png"))
    assert np.array_equal(alone, second)


def test_out_may_be_a_folder(run_demo):
    assert run_demo("a cat", "--out", "new/folder")[0] == 0
    assert Path("new/folder/picture.png").exists()
    assert run_demo("a cat", "--out", "new")[0] == 0
    assert Path("new/picture.png").exists()


def test_an_empty_out_is_the_default(run_demo):
    assert run_demo("a cat", "--steps", 1, "--out", "")[0] == 0
    assert Path("picture.png").exists()


def test_overwrite_only_when_told(run_demo):
    Path("cat.png").write_text("precious")
    code, _, err = run_demo("a cat", "--out", "cat.png")
    assert code == 2
    assert "cat.png already exists" in err
    assert Path("cat.png").read_text() == "precious"
    assert run_demo("a cat", "--out", "cat.png", "--overwrite")[0] == 0
    assert Image.open("cat.png").size == (32, 40)


def test_another_vae(run_demo, demo_checkpoint):
    assert run_demo("a cat", "--vae", demo_checkpoint)[0] == 0
    with Image.open("picture.png") as picture:
        assert "Model: micro, VAE: micro" in picture.text["parameters"]


def test_a_picture_that_loses_much_is_a_line(run_demo):
    Image.new("RGB", (90, 30)).save("wide.png")
    Image.new("RGB", (64, 82)).save("nearly.png")
    assert (
        "wide.png, 90 x 30, is cropped around its centre to the shape of 32 x 40"
        in run_demo("a", "--image", "wide.png")[2]
    )
    assert "cropped" not in run_demo("a", "--image", "nearly.png")[2]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_the_suffix_chooses_the_format(run_demo, suffix):
    code, out, _ = run_demo("a cat", "--n", 2, "--grid", "--out", f"cat{suffix}")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [f"cat{suffix}", f"cat-2{suffix}", f"cat-grid{suffix}"]
    for name in names():
        with Image.open(name) as picture:
            assert picture.format == ("WEBP" if suffix == ".webp" else "JPEG")


@pytest.mark.parametrize("out", ["pics.v1/", "pics.v1"])
def test_a_folder_with_a_dot(run_demo, out):
    if not out.endswith("/"):
        Path(out).mkdir()
    assert run_demo("a cat", "--out", out)[0] == 0
    assert Path("pics.v1/picture.png").exists()


def test_a_random_seed(run_demo):
    seeds = [int(run_demo("a cat", "--seed", -1)[1].split()[2]) for _ in range(2)]
    assert len({*seeds, -1}) == 3


def test_an_image_keeps_its_own_shape(run_demo, demo_checkpoint):
    Image.new("RGB", (900, 600), "red").save("wide.png")
    for given, size in (([], (72, 48)), (["--width", 48], (48, 32)), (["--height", 48], (72, 48))):
        sys.argv = ["demo.py", "a", "--steps", "1", "--device", "cpu", "--checkpoint", str(demo_checkpoint)]
        sys.argv += ["--image", "wide.png", "--out", "out.png", "--overwrite", *map(str, given)]
        assert demo.main() == 0
        assert Image.open("out.png").size == size


def test_a_size_far_above_the_models_is_a_line(run_demo):
    line = "96 x 96 is 2.25 times the 64 x 64 pixels that the model was trained on: expect repeated objects, and steps"
    assert line in run_demo("a", "--width", 96, "--height", 96)[2]
    assert "times the" not in run_demo("a", "--width", 64, "--height", 96)[2]


def test_a_mask_of_another_shape_is_named_by_its_flags(run_demo):
    Image.new("RGB", (32, 40), "red").save("red.png")
    Image.new("L", (40, 40)).save("mask.png")
    code, _, err = run_demo("a", "--image", "red.png", "--mask", "mask.png")
    assert code == 2
    assert err == "demo.py: --mask should have the shape of --image, 32 x 40, not 40 x 40 pixels.\n"


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("flag", ["--image", "--from"])
def test_a_file_that_is_read_is_never_written(run_demo, flag, link):
    run_demo("a cat", "--out", "cat.png")
    content = Path("cat.png").read_bytes()
    if link:
        link("cat.png", "other.png")
    out = "other.png" if link else "cat.png"
    code, _, err = run_demo("a", flag, "./cat.png", "--out", out, "--overwrite")
    assert code == 2
    assert err == f"demo.py: --out should be a different file from {flag}, not {out} for both.\n"
    assert Path("cat.png").read_bytes() == content


def test_a_sampler_that_is_added_to_the_registry(run_demo, monkeypatch):
    from sd.samplers import SAMPLERS

    monkeypatch.setitem(SAMPLERS, "mine", type("MySampler", (SAMPLERS["euler"],), {}))
    assert run_demo("a cat", "--sampler", "mine", "--seed", 1)[0] == 0
    assert "Sampler: mine, " in Image.open("picture.png").text["parameters"]
    assert run_demo("--from", "picture.png", "--out", "again.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open("picture.png")), np.asarray(Image.open("again.png")))


@pytest.mark.slow
def test_letters_that_the_terminal_has_not(tmp_path):
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "capture_output": True}
    ran = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "ein Häuschen", "b", "--steps", "1"], **settings, check=False
    )
    assert (ran.returncode, len(list(tmp_path.glob("*.png")))) == (0, 2)


def test_image_to_image(run_demo):
    Image.new("RGB", (50, 30), "red").save("red.jpg")
    assert run_demo("a cat", "--image", "red.jpg", "--strength", 0.5, "--out", "cat.png")[0] == 0
    with Image.open("cat.png") as picture:
        assert picture.text["parameters"].endswith("Denoising strength: 0.5")


def test_inpainting(run_demo):
    Image.new("RGB", (32, 40), "red").save("red.png")
    mask = Image.new("L", (32, 40))
    mask.paste(255, (0, 0, 32, 20))
    mask.save("mask.png")
    assert run_demo("a cat", "--image", "red.png", "--mask", "mask.png", "--out", "cat.png")[0] == 0
    pixels = np.asarray(Image.open("cat.png"))
    assert (pixels[20:] == (255, 0, 0)).all()
    assert (pixels[:18] != (255, 0, 0)).any()


def test_every_prompt_with_every_seed(run_demo):
    code, out, _ = run_demo("a {red|blue} cat", "--n", 2, "a dog", "--seed", 5)  # a prompt may stand behind a flag
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("picture.png  seed 5  ")
    assert lines[0].endswith("  a red cat")
    found = [prompt_and_seed(line.split()[0]) for line in lines]
    assert found == [(prompt, seed) for prompt in ("a red cat", "a blue cat", "a dog") for seed in (5, 6)]
    assert len(names()) == 6
    run_demo("a blue cat", "--seed", 6, "--out", "alone.png")
    alone, fourth = (np.asarray(Image.open(name)) for name in ("alone.png", "picture-4.png"))
    assert np.array_equal(alone, fourth)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--steps", 0], "--steps should be a whole number from 1 to 1000, not 0."),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--width", 100], "--width should be a multiple of 8 pixels, not 100."),
        (["--image", "text.png", "--strength", 2], "--strength should be a number above 0 and at most 1, not 2.0."),
        (["--cfg-scale", "nan"], "--cfg-scale should be a number; 1 to 14 is usual, not nan."),
        (["--sampler", "magic"], "--sampler should be one of ddpm, "),
        (["--seed", -2], "--seed should be a whole number from 0 to 2**63 - 1, not -2."),
        (["--n", 0], "--n should be from 1 to 10000, not 0."),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--device", "gpu"], "--device should be one that torch can use here, such as 'cpu', not 'gpu'."),
        (["--image", "none.png"], "--image should be a file: there is none at none.png."),
        (["--image", "text.png"], "text.png is not an image that can be read"),
        (["--mask", "text.png"], "--image should be given with --mask: it is the image to change."),
        (["--strength", 0.3], "--image should be given with --strength: it is the image to change."),
        (["--feather", 3], "--mask or --mask-from-alpha should be given with --feather."),
        (
            ["--image", "text.png", "--mask", "text.png", "--feather", -1],
            "--feather should be a number of pixels, 0 or more, not -1.0.",
        ),
        (
            ["--checkpoint", "none.ckpt"],
            "--checkpoint should be a file or a folder: there is none at none.ckpt; `sh scripts",
        ),
        (["--checkpoint", "none/none.ckpt"], "--checkpoint should be a file or a folder: there is none at none/none."),
        (["--checkpoint", "a/b/c"], "--checkpoint should be a file or a folder: there is none at a/b/c; `sh"),
        (["--vae", "none.pt"], "--vae should be a file or a folder: there is none at none.pt."),
        (["--prediction-type", "x_0"], "--prediction-type should be one of epsilon, v_prediction, not 'x_0'."),
        (["--checkpoint", "page.ckpt"], "web page (HTML)"),
        (["--out", "picture.bmp"], "--out should be a .png, .jpg, .jpeg or .webp file, or a folder, not picture.bmp"),
        (["--out", "folder.v1"], "to make a folder of that name, add a slash: folder.v1/."),
        (["--out", "a.png", "--out", "b.png"], "--out should be given once, not twice."),
        (["--out", "cat.webp", "--film", "CAT.webp"], "--film should be a different file from --out, not CAT.webp"),
        (["--from", "text.png"], "--from should be a PNG, JPEG or WebP picture, and text.png is none of these."),
        (["--from", "none.png"], "--from should be a file: there is none at none.png."),
        (["--prompts-file", "none.txt"], "--prompts-file should be a file: there is none at none.txt."),
        (["-cat"], "unrecognized arguments: -cat; a prompt that begins with a dash goes at the end, after --"),
        (["-hat"], "a prompt that begins with a dash goes at the end, after --"),
        (["--film", "cat.mp4"], "--film should be a .webp or .gif file, not cat.mp4."),
        (["--report", "cat.pdf"], "--report should be a .html file, not cat.pdf."),
        (["--report", "text.png/cat.html"], "text.png is a file."),
        (["--film", "text.png/new/cat.gif"], "--film should be in a folder that you can write to: "),
        (["--out", "text.png/cat.png"], "--out should be in a folder that you can write to: "),
        (["--film", "folder"], "--film should be a .webp or .gif file, not folder."),
        (
            ["a {red|blue cat"],
            "prompt should have its alternatives in single braces, as in a {red|blue} house, not 'a {",
        ),
        (["{a|b}" * 20], "prompt should stand for at most 1000 prompts, not 1048576."),
        (["--magic"], "unrecognized arguments: --magic"),
    ],
)
def test_bad_input_is_one_sentence(run_demo, arguments, sentence):
    Path("text.png").write_text("not a picture")
    Path("page.ckpt").write_text("<!DOCTYPE html><html></html>")
    code, out, err = run_demo("a cat", *arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.startswith("demo.py: ")
    assert err.count("\n") == 1
    assert names() == ["page.ckpt", "text.png"]


@pytest.mark.filterwarnings("default")
def test_long_prompts_and_weights_simply_work(run_demo):
    code, _, err = run_demo("a (cat:1.3) " * 50, "--negative", "[dog]")
    assert code == 0
    assert names() == ["picture.png"]
    assert "demo.py" not in err


def test_a_bracket_that_is_not_closed_is_refused_before_any_weight_is_loaded(run_demo, monkeypatch):
    from sd import model_loader

    monkeypatch.setattr(model_loader, "load_models", lambda *_: pytest.fail("loaded before checking"))
    code, _, err = run_demo("a cat", "--negative", "a (dog")
    assert code == 2
    assert err.startswith("demo.py: --negative should have its brackets in pairs: nothing closes the '(' of '(dog'")
    assert err.count("\n") == 1


def test_interruption_leaves_nothing_half_written(run_demo, monkeypatch):
    from sd import pipeline

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "decode_latents", interrupt)
    code, out, err = run_demo("a cat")
    assert code == 130
    assert out == ""
    assert "interrupted" in err
    assert names() == []


def test_help_and_errors_do_not_wait_for_torch():
    code = "import sys, scripts.demo as d; d.parse(['a cat']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_without_any_weights_it_says_where_to_get_them(monkeypatch, tmp_path, capsys):
    from sd import model_loader

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_loader, "TINY_CHECKPOINT", tmp_path / "tiny.ckpt")
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 2
    assert "sh scripts/download.sh" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path, may_be",
    [
        ("owner/name", True),
        ("owner/name:file.ckpt", True),
        ("owner/name:folder/file.ckpt", True),
        ("owner/name@branch:folder/file.ckpt", True),
        ("folder/file.ckpt", False),
        ("a/b/c", False),
        ("name", False),
    ],
)
def test_names_on_the_hub_are_known_without_torch(path, may_be):
    assert checks.may_be_on_hub(Path(path)) == may_be
    assert (checks.HUB_NAME, set(checks.WEIGHT_SUFFIXES)) == (hub.NAME, set(hub.FILE_SUFFIXES))
