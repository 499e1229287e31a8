"""ControlNets in training: the loss, runs that resume, the file and who reads it, and what cannot be trained on."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

import sd
from scripts import train
from sd.adapters.control import Control
from sd.adapters.controlnet_files import load_controlnet
from sd.checkpoints.files import write_checkpoint
from sd.config import SD_TURBO
from sd.tokenizer import Tokenizer
from sd.training.captions import DataError
from sd.training.control import ControlStage, Steered, control_of, write_controlnet
from sd.training.control_run import ControlRun, read_control_images
from sd.training.loop import TrainingError, load_state
from tests.support.accelerator import accelerator
from tests.support.control import diffusers_config, random_controlnet
from tests.support.marks import slow
from tests.support.synthetic import FEW_LAYERS, INPAINTING_MICRO, MICRO, SD2_MICRO, random_models, random_state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.ckpt"
    write_checkpoint(path, random_state(FEW_LAYERS), FEW_LAYERS.to_dict())
    return path


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with eight captioned pictures of 80 x 64 pixels, and one with edges of the same names."""
    folder = tmp_path_factory.mktemp("mine")
    pictures, edges = folder / "pictures", folder / "edges"
    for each in (pictures, edges):
        each.mkdir()
    for i in range(8):
        picture, edge = Image.new("RGB", (80, 64), (30 * i, 99, 50)), Image.new("L", (80, 64))
        box = (20 + i, 10, 50, 40)
        ImageDraw.Draw(picture).rectangle(box, fill=(250, 200, 9))
        ImageDraw.Draw(edge).rectangle(box, outline=255)
        picture.save(pictures / f"{i}.png")
        edge.save(edges / f"{i}.{'webp' if i else 'png'}")
        (pictures / f"{i}.txt").write_text(f"box {i}", encoding="utf-8")
    return pictures, edges


def stage_of(models, start=None):
    tokens = [Tokenizer()(text) for text in ("a red house", "a tent", "a tree at night")]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    images = torch.rand(3, 3, 64, 64, generator=generator)
    hints = lambda indices, generator: images[indices]  # noqa: E731
    return ControlStage(models, (latents, torch.zeros_like(latents)), tokens, hints, start, batch_size=4)


def test_the_loss_is_that_of_the_steered_unet():
    """2302.05543, eq. 5, image by image; with the noise of diffusers' scheduler if that is installed."""
    models = random_models(FEW_LAYERS)
    stage = stage_of(models, random_controlnet(FEW_LAYERS.unet))
    latents, tokens, hints, timesteps, noise = stage.draw(torch.Generator().manual_seed(3))
    with torch.no_grad():
        loss = stage.loss(latents, tokens, hints, timesteps, noise)
        control, losses = stage.networks["control"], []
        for z, token, hint, t, e in zip(latents, tokens, hints, timesteps, noise):
            a = stage.alphas_cumprod[t]
            x, context, t = a.sqrt() * z[None] + (1 - a).sqrt() * e[None], models.clip(token[None]), t[None]
            residuals = control(x, context, t, control.hint(hint[None]))
            error = (models.diffusion(x, context, t, residuals) - e).square().mean()
            losses.append(error * min(5.0, a / (1 - a)) / (a / (1 - a)))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_at_the_start_it_is_the_unet_alone_and_only_zero_convolutions_learn():
    models = random_models(FEW_LAYERS)
    stage = stage_of(models)
    x, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.tensor([3, 900])
    steered = Steered(models.diffusion, stage.networks["control"], torch.randn(1, 16, 8, 8))
    with torch.no_grad():
        assert torch.equal(steered(x, context, t), models.diffusion(x, context, t))
    names = [name for name, _ in stage.networks.named_parameters()]
    loss = stage.loss(*stage.draw(torch.Generator().manual_seed(0)))
    gradients = dict(zip(names, torch.autograd.grad(loss, list(stage.networks.parameters()))))
    learning = {name for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    # Behind a zero convolution, gradients are 0 until its first step (the paper's section 3.1).
    assert learning == {name for name in names if "zero_" in name}
    assert not any(x.requires_grad for x in models.diffusion.parameters())


def test_a_third_of_the_captions_is_empty():
    stage = stage_of(random_models(FEW_LAYERS))
    stage.batch_size = 600
    tokens = stage.draw(torch.Generator().manual_seed(0))[1]
    assert (tokens == stage.empty).all(dim=1).float().mean() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("config", [MICRO, SD2_MICRO], ids=["1.x", "2.x"])
def test_the_file_is_the_same_network_here_and_in_diffusers(config, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    write_controlnet(tmp_path / "control.safetensors", random_controlnet(config.unet), random_models(config))
    ours = load_controlnet(tmp_path / "control.safetensors", random_models(config))
    (tmp_path / "config.json").write_text(json.dumps(diffusers_config(config.unet)))
    theirs = diffusers.ControlNetModel.from_single_file(tmp_path / "control.safetensors", config=str(tmp_path))
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    hint, t = torch.rand(2, 3, 64, 64, generator=generator), torch.tensor([10, 700])
    with torch.no_grad():
        down, middle = theirs.eval()(x, t, context, hint, return_dict=False)
        residuals = ours(x, context, t, ours.hint(hint))
    assert len(residuals) == len(down) + 1
    for actual, expected in zip(residuals, [*down, middle]):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def run(checkpoint, out, *more):
    """Runs the script for a very small model."""
    arguments = ["control", "--checkpoint", checkpoint, "--out", out, "--batch", "2", "--device", "cpu", *more]
    return train.main([str(argument) for argument in arguments])


def test_it_learns_and_its_file_steers(checkpoint, mine, tmp_path, capsys):
    pictures, edges = mine
    assert run(checkpoint, tmp_path / "out", "--pictures", pictures, "--steps", "1") == 0
    path = tmp_path / "out" / "control.safetensors"
    assert capsys.readouterr().out == f"{path}\n"
    assert (tmp_path / "out" / "control.png").exists()
    models = sd.load_models(checkpoint, "cpu")
    settings = {"models": models, "seed": 0, "n_inference_steps": 2, "do_cfg": False}
    steered = sd.generate("box", control=[Control(path, edges / "0.png")], **settings)
    assert not (steered == sd.generate("box", **settings)).all()


@pytest.mark.slow
def test_further_training_on_scribbles_and_on_given_images(checkpoint, mine, tmp_path):
    pictures, edges = mine
    start = tmp_path / "start.safetensors"
    models = random_models(FEW_LAYERS)
    write_controlnet(start, control_of(models), models)
    options = {"pictures": pictures, "start": start, "batch_size": 2, "device": "cpu"}
    for name, more in {"a": {"kind": "scribbles"}, "b": {"control_images": edges}}.items():
        run = ControlRun(tmp_path / name, checkpoint, **options, **more)
        run.train(1, steps=1)
        assert load_controlnet(run.write(), models).config == models.config.unet


@pytest.mark.slow
def test_scenes_and_a_run_that_resumes(checkpoint, tmp_path, monkeypatch):
    def make(name, **options):
        return ControlRun(tmp_path / name, checkpoint, "scribbles", scenes=8, batch_size=2, device="cpu", **options)

    def interrupt(*_):
        raise KeyboardInterrupt

    make("whole").train(1, steps=2)
    monkeypatch.setattr(ControlRun, "_show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make("halves", save_every=0).train(1, steps=2)
    monkeypatch.undo()
    assert load_state(tmp_path / "halves" / "control.state")["step"] == 1
    for _ in range(2):  # the second time, it is finished
        make("halves").train(1, steps=2)
    one, other = (load_state(tmp_path / name / "control.state")["average"] for name in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_on_a_simulated_gpu(checkpoint, mine, tmp_path):
    with accelerator("cuda:0"):
        run = ControlRun(tmp_path, checkpoint, pictures=mine[0], batch_size=2, device="cuda:0")
        run.train(1, steps=1)
        assert run.write().exists()


def test_control_images_are_found_by_name_and_cropped_as_their_pictures(mine, tmp_path):
    pictures, edges = mine
    images = read_control_images(edges, pictures, 64)
    assert images.shape == (8, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert (images[0, :, 10:41, 20 - 8] > 200).all()  # the left side of the box, 8 columns of the picture cut off


def replaced(edges, tmp_path, name, image):
    """A copy of the folder of edges with one file replaced, or left out."""
    folder = tmp_path / "edges"
    folder.mkdir()
    for path in edges.iterdir():
        if path.stem != name:
            (folder / path.name).write_bytes(path.read_bytes())
    if image:
        image.save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    "image, reason",
    [
        (None, "There is no control image for .*3.png: .*edges should have one of its name."),
        (Image.new("L", (64, 64)), "3.png should have the shape of its picture, 80 x 64 pixels or .*, not 64 x 64."),
    ],
)
def test_control_images_that_do_not_belong_to_their_pictures(image, reason, mine, tmp_path):
    folder = replaced(mine[1], tmp_path, "3", image)
    with pytest.raises(DataError, match=reason):
        read_control_images(folder, mine[0], 64)


def test_a_damaged_control_image_is_named(mine, tmp_path):
    folder = replaced(mine[1], tmp_path, "3", None)
    (folder / "3.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match="3.png"):
        read_control_images(folder, mine[0], 64)


def test_a_larger_control_image_or_a_photograph_is_allowed(mine, tmp_path):
    folder = replaced(mine[1], tmp_path, "3", Image.effect_noise((160, 128), 50).convert("RGB"))
    assert read_control_images(folder, mine[0], 64).shape == (8, 3, 64, 64)


def test_control_images_that_show_nothing(checkpoint, mine, tmp_path, capsys):
    for i in range(8):
        Image.new("L", (80, 64)).save(tmp_path / f"{i}.png")
    out = tmp_path / "out"
    assert run(checkpoint, out, "--pictures", mine[0], "--control-images", tmp_path, "--steps", "1") == 2
    assert "The control images should have something in them, but each is of one colour." in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "config, reason",
    [
        (INPAINTING_MICRO, "is an inpainting model: train on the one that it was made from."),
        (
            replace(FEW_LAYERS, sampling=SD_TURBO.sampling),
            "draws in a few steps: train on the model that it was made from.",
        ),
    ],
)
def test_models_that_no_controlnet_is_trained_for(config, reason, tmp_path, capsys):
    path = tmp_path / "start.ckpt"
    write_checkpoint(path, random_state(config), config.to_dict())
    assert run(path, tmp_path / "out") == 2
    assert capsys.readouterr().err == f"train.py: {path} {reason}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--scenes", "4"], "The number of scenes should be at least 8, not 4."),
        (["--scenes", "-1"], "The number of scenes should be at least 8, not -1."),
        (["--kind", "poses"], "invalid choice: 'poses'"),
        (["--control-images", "."], "--control-images should be given with --pictures"),
        (["--pictures", "."], ". has no captioned images: add some"),
        (["--pictures", "none"], "There is no folder none"),
        (["--start", "none.safetensors"], "none.safetensors"),
        (["--checkpoint", "none.ckpt"], "There is no checkpoint none.ckpt"),
        (["--kind", "outlines", "--control-images", ".", "--pictures", "."], "--kind should be used without"),
        (["--scenes", "9", "--pictures", "."], "--scenes should be used without --pictures."),
    ],
)
def test_bad_input_is_one_sentence(more, reason, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = run(checkpoint, tmp_path / "out", *more)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["lora", slow("sd2"), slow("a_inpaint")])
def test_a_start_that_does_not_fit(start, checkpoint, tmp_path, capsys):
    path = tmp_path / f"{start}.safetensors"
    if start == "lora":
        write_checkpoint(path, {"lora_unet_a.lora_up.weight": torch.zeros(2, 2)})
    else:
        config = SD2_MICRO if start == "sd2" else FEW_LAYERS
        write_controlnet(path, random_controlnet(config.unet), random_models(config))
    assert run(checkpoint, tmp_path / "out", "--start", path) == 2
    assert "ControlNet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"kind": "scribbles"}, slow({"batch_size": 3}), slow({"seed": 1}), slow({"control_images": True})]
)
def test_another_run_is_not_resumed(change, checkpoint, mine, tmp_path, monkeypatch):
    settings = {"pictures": mine[0], "batch_size": 2, "device": "cpu"}
    if "control_images" in change:
        change = {"control_images": mine[1]}
    record = ControlRun(tmp_path, checkpoint, **settings).record
    torch.save({"record": record}, tmp_path / "control.state")
    with pytest.raises(TrainingError, match="choose another --out"):
        ControlRun(tmp_path, checkpoint, **(settings | change))


def test_a_controlnet_from_elsewhere_is_not_replaced(checkpoint, mine, tmp_path, capsys):
    path = tmp_path / "control.safetensors"
    path.write_bytes(b"mine")
    assert run(checkpoint, tmp_path, "--pictures", mine[0], "--steps", "1") == 2
    assert "was not trained in this folder and would be overwritten: choose another --out." in capsys.readouterr().err
    assert path.read_bytes() == b"mine"
