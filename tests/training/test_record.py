"""A folder belongs to one run: the same goes on in it, and no other does, whatever else it is on."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts import train_tiny
from sd.checkpoints.files import read_checkpoint, write_checkpoint
from sd.training import stages
from sd.training.data import DataError
from sd.training.loop import TrainingError, load_state, save_atomically
from sd.training.stages import TrainingRun
from tests.support.synthetic import INPAINTING_MICRO, MICRO, random_state

SMALL = MICRO  # its latents are scaled by 0.5: a stage that forgets the factor is found out


def make_folder(path, count=10):
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (80, 60), (25 * i, 0, 0)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"red number {i}", encoding="utf-8")
    return path


def workshop(out, config=SMALL, scenes=12, **options):
    return TrainingRun(out, scenes=scenes, device="cpu", config=config, **options)


def begin(out, name="vae", **options):
    """As much of a run's first state as tells whose it is."""
    save_atomically({"record": workshop(out, **options).record}, out / f"{name}.state")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of one step a stage on 12 scenes."""
    out = tmp_path_factory.mktemp("finished")
    run = workshop(out)
    for name in train_tiny.SHARES:
        run.train(name, minutes=1, steps=1)
    run.write_checkpoint()
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scenes": 13}, "on 12 scenes with seed 0, not on 13 scenes with seed 0: give another --out for another run"),
        ({"seed": 1}, "on 12 scenes with seed 0, not on 12 scenes with seed 1: give another --out"),
        ({"folder": "mine"}, "on 12 scenes with seed 0, not on the 10 pictures of mine with seed 0: give another"),
        ({"start": "tiny.ckpt"}, "not on 12 scenes with seed 0, from .*tiny.ckpt: give another --out"),
    ],
)
def test_another_run_is_refused_before_any_work(out, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "mine")
    if "start" in options:
        options = {"start": out / "tiny.ckpt"}
    if "folder" in options:
        options = {"folder": Path("mine")}
    before = content(out)
    for loader in ("load_scenes", "load_folder"):
        monkeypatch.setattr(stages, loader, lambda *_: pytest.fail("pictures made before checking"))
    with pytest.raises(TrainingError, match=message):
        workshop(out, **options)
    assert content(out) == before


def test_one_stage_is_enough_to_tell(tmp_path):
    begin(tmp_path)
    with pytest.raises(TrainingError, match="on 12 scenes with seed 0, not on 14 scenes"):
        workshop(tmp_path, scenes=14)


def test_train_tiny_says_it_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "runs/tiny")
    make_folder(tmp_path / "my_pictures")
    assert train_tiny.main(["all", "--folder", "my_pictures"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_tiny.py: runs/tiny holds a run on 12 scenes with seed 0, "
        "not on the 10 pictures of my_pictures with seed 0: give another --out for another run."
    )


def test_the_same_run_goes_on_with_more_steps_or_minutes(out):
    run = workshop(out)
    for options in ({"minutes": 5}, {"minutes": 1, "steps": 9}):
        run.train("vae", **options)
    assert load_state(out / "vae.state")["step"] == 1  # its own budget counts


def test_a_finished_stage_is_said_to_be_finished(out, caplog):
    caplog.set_level("INFO")
    workshop(out).train("text", minutes=1, steps=9)
    assert "text is finished, after 1 steps" in caplog.text


def test_the_same_start_goes_on_and_another_does_not(finished, tmp_path):
    start = shutil.copy(finished / "tiny.ckpt", tmp_path / "copy.ckpt")
    begin(tmp_path / "out", "diffusion", start=finished / "tiny.ckpt")
    workshop(tmp_path / "out", start=start)  # the same weights by another name
    with pytest.raises(TrainingError, match=r"with seed 0, from .*tiny.ckpt, not on 12 scenes with seed 0:"):
        workshop(tmp_path / "out")
    other, known = tmp_path / "other.ckpt", read_checkpoint(start)
    known.state["model.diffusion_model.out.2.bias"] += 1
    write_checkpoint(other, known.state, known.config)
    with pytest.raises(TrainingError, match=r"tiny.ckpt, not on 12 scenes with seed 0, from .*other.ckpt"):
        workshop(tmp_path / "out", start=other)


def change_caption(folder):
    (folder / "3.txt").write_text("blue", encoding="utf-8")


def change_picture(folder):
    Image.new("RGB", (80, 60), "blue").save(folder / "3.png")


def exchange_pictures(folder):
    first, second = (folder / "3.png").read_bytes(), (folder / "4.png").read_bytes()
    (folder / "3.png").write_bytes(second)
    (folder / "4.png").write_bytes(first)


@pytest.mark.parametrize("change", [change_caption, change_picture, exchange_pictures])
def test_a_folder_that_has_changed_is_another_training_set(tmp_path, change):
    mine = make_folder(tmp_path / "mine")
    begin(tmp_path / "out", folder=mine)
    workshop(tmp_path / "out", folder=mine)
    change(mine)
    with pytest.raises(TrainingError, match="pictures of .*mine with seed 0, and these have changed since: give anoth"):
        workshop(tmp_path / "out", folder=mine)


def test_a_folder_that_has_moved_is_the_same(tmp_path):
    mine = make_folder(tmp_path / "mine")
    begin(tmp_path / "out", folder=mine)
    workshop(tmp_path / "out", folder=mine.rename(tmp_path / "moved"))


def test_a_state_of_unknown_pictures_is_refused_and_kept(out):
    state = load_state(out / "text.state")
    del state["record"]
    save_atomically(state, out / "text.state")
    before = content(out)
    with pytest.raises(TrainingError, match=r"text\.state does not say what it was trained on: give another --out"):
        workshop(out)
    assert content(out) == before


def test_a_model_of_unknown_origin_is_not_replaced(finished, tmp_path):
    shutil.copy(finished / "tiny.ckpt", tmp_path / "tiny.ckpt")
    with pytest.raises(TrainingError, match=r"tiny\.ckpt is not of a run in this folder, which would replace it: give"):
        workshop(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.ckpt"]


def test_latents_are_of_the_pictures_that_there_are(finished, tmp_path):
    """Also where a run was stopped before its first state."""
    mine, start = make_folder(tmp_path / "mine"), finished / "tiny.ckpt"
    first, _ = workshop(tmp_path / "out", folder=mine, start=start)._latents()
    change_picture(mine)
    second, _ = workshop(tmp_path / "out", folder=mine, start=start)._latents()
    assert not torch.equal(first, second)


def test_latents_are_of_the_autoencoder_that_there_is(out):
    first, state = workshop(out)._latents()[0], load_state(out / "vae.state")
    assert torch.equal(first, workshop(out)._latents()[0])
    for name in state["average"]:
        state["average"][name] = state["average"][name].flip(0)
    save_atomically(state, out / "vae.state")
    assert not torch.equal(first, workshop(out)._latents()[0])


def test_the_unet_begins_alike_whether_or_not_there_are_latents_already(out):
    (out / "latents.state").unlink()
    first, second = (workshop(out)._stage("diffusion").networks.state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_an_inpainting_model_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("paint.ckpt"), random_state(INPAINTING_MICRO), INPAINTING_MICRO.to_dict())
    assert train_tiny.main(["diffusion", "--start", "paint.ckpt", "--out", "out", "--scenes", "12"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_tiny.py: paint.ckpt is an inpainting model, which cannot learn further: give another --start."
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("count", [3, 7])
def test_too_few_pictures_are_refused_before_anything_is_written(tmp_path, count):
    mine = make_folder(tmp_path / "mine", count)
    for options in ({"scenes": count}, {"folder": mine}):
        with pytest.raises(TrainingError, match=f"{count} pictures are too few to train on: 8 are the least"):
            workshop(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_used_leaves_nothing_behind(tmp_path):
    mine = make_folder(tmp_path / "mine")
    (mine / "captions.jsonl").write_text('{"file": "z.png", "caption": "z"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"There is no file .*z\.png"):
        workshop(tmp_path / "out", folder=mine)
    assert not (tmp_path / "out").exists()
