"""--control and its flags, --preview, and a tiny autoencoder as --vae, on the command line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from scripts.demo import parse
from scripts.support import control as flags
from scripts.support.saved_settings import read, use_saved
from sd.adapters import control
from sd.adapters.controlnet_files import load_controlnet
from sd.checkpoints.files import write_checkpoint
from tests.scripts.test_captions import again
from tests.support.control import cldm_state, random_controlnet
from tests.support.synthetic import FEW_LAYERS
from tests.support.tiny_autoencoders import random_tiny_autoencoder, write_published


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("control") / "control_canny.pth"
    write_checkpoint(path, cldm_state(random_controlnet(FEW_LAYERS.unet)))
    return path


@pytest.fixture(scope="module")
def edges(tmp_path_factory):
    path = tmp_path_factory.mktemp("edges") / "edges.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("taesd"), random_tiny_autoencoder())


def pixels(name):
    return np.asarray(Image.open(name))


def test_it_steers_and_is_saved(run_demo, net, edges):
    control = ["--control", net, "--control-image", edges]
    assert run_demo("a cat", "--seed", 3, "--out", "plain.png")[0] == 0
    more = ["--control-strength", 0.5, "--control-end", 0.5]
    code, _, errors = run_demo("a cat", "--seed", 3, "--out", "steered.png", *control, *more)
    assert code == 0, errors
    assert not np.array_equal(pixels("plain.png"), pixels("steered.png"))
    settings = "Module: none, Model: control_canny, Weight: 0.5, Guidance Start: 0, Guidance End: 0.5"
    assert read_pairs("steered.png")["ControlNet 0"] == f"{settings}, Control Mode: Balanced"
    code, _, errors = run_demo("--from", "steered.png", "--out", "again.png", *control)
    assert code == 0
    assert np.array_equal(pixels("again.png"), pixels("steered.png"))
    code, _, errors = run_demo("--from", "steered.png", "--out", "without.png")
    assert "steered.png was made with 'control_canny'; --control and --control-image give a ControlNet." in errors
    assert np.array_equal(pixels("without.png"), pixels("plain.png"))


def read_pairs(name):
    return read(Path(name)).pairs


def test_two_at_once_and_a_report(run_demo, net, edges, taesd):
    control = ["--control", net, "--control-image", edges] * 2
    more = ["--control-strength", 0.5, "--control-strength", 1, "--guess-mode", "--control-start", 0]
    films = ["--film", "a.webp", "--report", "a.html", "--preview", taesd]
    code, _, errors = run_demo("a cat", "--out", "a.png", *control, *more, *films)
    assert code == 0, errors
    pairs = read_pairs("a.png")
    assert "Weight: 0.5" in pairs["ControlNet 0"]
    rest = "Weight: 1, Guidance Start: 0, Guidance End: 1, Control Mode: ControlNet is more important"
    assert pairs["ControlNet 1"].endswith(rest)
    page = Path("a.html").read_text(encoding="utf-8")
    assert page.count("control_canny.pth</bdi>") == 2
    assert "A smaller decoder made the expected images" in page
    assert f"--control-image {edges}" in page.replace('<span class="flag">', "").replace("</span>", "")


def test_the_picture_has_the_shape_of_the_control_image(monkeypatch, tmp_path, net, demo_checkpoint, capsys):
    from scripts import demo

    Image.new("RGB", (96, 48), "white").save(tmp_path / "wide.png")
    monkeypatch.chdir(tmp_path)
    arguments = ["a cat", "--checkpoint", demo_checkpoint, "--steps", 2, "--device", "cpu", "--dtype", "fp32"]
    arguments += ["--control", net, "--control-image", "wide.png", "--out", "a.png"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
    assert demo.main() == 0, capsys.readouterr().err
    width, height = Image.open("a.png").size
    assert width == 2 * height


def test_a_tiny_autoencoder_as_vae(run_demo, taesd):
    code, _, errors = run_demo("a cat", "--seed", 3, "--out", "a.png", "--vae", taesd)
    assert code == 0, errors
    assert run_demo("a cat", "--seed", 3, "--out", "b.png")[0] == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


def test_edges_by_opencv(monkeypatch, run_demo, net, edges):
    """With the package, or a stand-in for it: Canny gets the image in the size of the result."""
    seen = []

    def canny(image, low, high):
        seen.append((image.shape, image.dtype, low, high))
        return (image[:, :, 0] > 127).astype(np.uint8) * 255

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(Canny=canny, __spec__=True))
    control = ["--control", net, "--control-image", edges, "--control-from", "canny"]
    code, _, errors = run_demo("a cat", "--seed", 3, "--out", "a.png", *control)
    assert code == 0, errors
    assert seen == [((40, 32, 3), np.uint8, 100, 200)]
    assert read_pairs("a.png")["ControlNet 0"].startswith("Module: canny, ")
    options = parse(["--from", "a.png", "--control", str(net), "--control-image", str(edges)])
    use_saved(options)
    assert options.control_from == ["canny"]


def test_one_controlnet_with_two_images_is_loaded_once(monkeypatch, run_demo, net, edges):
    loaded = []
    monkeypatch.setattr(control, "load_controlnet", lambda *given: loaded.append(given[0]) or load_controlnet(*given))
    more = ["--control", net, "--control-image", edges] * 2
    assert run_demo("a cat", "a dog", "--steps", 1, "--seed", 3, *more)[0] == 0
    assert loaded == [net]


def test_an_image_with_erased_parts(run_demo, net, edges, tmp_path):
    path = tmp_path / "control_inpaint.pth"
    path.symlink_to(net)
    erased = Image.open(edges).convert("RGBA")
    erased.paste((0, 0, 0, 0), (8, 8, 24, 24))
    erased.save("erased.png")
    given = ["a cat", "--seed", 3, "--control", path, "--control-image"]
    code, _, errors = run_demo(*given, edges)
    assert code == 2
    assert errors.splitlines()[-1].startswith(
        "demo.py: --control-image should be transparent where control_inpaint.pth"
    )
    given += ["erased.png", "--image", "erased.png", "--mask-from-alpha", "--report", "a.html"]
    assert run_demo(*given)[0] == 0


def test_real_edges():
    pytest.importorskip("cv2")
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = 255
    made = flags.canny(image)
    assert made.shape == (32, 32)
    assert set(np.unique(made)) == {0, 255}
    assert 40 < (made == 255).sum() < 80  # around the square


def test_without_opencv(monkeypatch, run_demo, net, edges):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    code, _, errors = run_demo("a", "--control", net, "--control-image", edges, "--control-from", "canny")
    assert code == 2
    assert errors == (
        "demo.py: --control-from canny needs the package opencv-python-headless: pip install -r "
        "requirements-control.txt\n"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--control", "NET"], "--control-image should be given once for each --control, not 0 --control-image for 1"),
        (["--control-image", "EDGES"], "--control-image should be given once for each --control, not 1 --control-"),
        (["--control-strength", "1"], "--control and --control-image should be given with --control-strength."),
        (["--guess-mode"], "--control and --control-image should be given with --guess-mode."),
        (["--control-from", "canny"], "--control and --control-image should be given with --control-from."),
        (
            ["--control", "NET", "--control-image", "none.png"],
            "--control-image should be a file: there is none at none",
        ),
        (
            ["--control", "none.pth", "--control-image", "EDGES"],
            "--control should be a file or a folder: there is none",
        ),
        (
            ["--control", "NET", "--control-image", "EDGES", *["--control-end", "1"] * 2],
            "--control-end should be given once, or once for each of 1 --control, not 2.",
        ),
        (
            ["--control", "NET", "--control-image", "EDGES", "--control-strength", "11"],
            "--control-strength should be a number from 0 to 10, not 11.0.",
        ),
        (
            ["--control", "NET", "--control-image", "EDGES", "--control-start", "0.7", "--control-end", "0.5"],
            "--control-start should be less than the end, 0.5, not 0.7.",
        ),
        (["--film", "a.webp", "--preview", "NET"], "--preview: NET: This file has no tiny autoencoder: give taesd_enc"),
        (
            ["--vae", "NET"],
            "vae: NET: This file is a ControlNet, which steers a model: give it as --control; give a VAE",
        ),
        (["--preview", "NET"], "--film or --report should be given with --preview"),
        (["--control", "EDGES", "--control-image", "EDGES"], "control: EDGES is a PNG image"),
    ],
)
def test_mistakes_are_one_sentence(run_demo, net, edges, arguments, message):
    places = {"NET": str(net), "EDGES": str(edges)}
    code, _, errors = run_demo("a cat", *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    expected = message.replace("EDGES", str(edges)).replace("NET", str(net))
    last = errors.strip().split("\n")[-1]
    assert last.startswith("demo.py: " + expected), last


def test_outputs_never_replace_what_is_read(run_demo, net, edges):
    control = ["--control", net, "--control-image", edges]
    code, _, errors = run_demo("a", *control, "--out", edges, "--overwrite")
    assert code == 2
    assert "--out should be a different file from --control-image" in errors


def test_given_as_a_checkpoint_it_is_named(run_demo, net):
    code, _, errors = run_demo("a", "--checkpoint", net)
    assert code == 2
    assert "This file is a ControlNet, which steers a model: give it as --control" in errors


def test_the_command_of_a_report_gives_the_same_flags():
    arguments = ["--control", "a", "--control", "b b", "--control-image", "c.png", "--control-image", "d.png"]
    arguments += ["--control-strength", "0.5", "--control-end", "1.0", "--control-end", "0.25", "--guess-mode"]
    options = again("x", arguments)
    assert [str(path) for path in options.control] == ["a", "b b"]
    assert [str(path) for path in options.control_image] == ["c.png", "d.png"]
    assert (options.control_strength, options.control_start, options.control_end) == ([0.5], None, [1.0, 0.25])
    assert options.guess_mode
