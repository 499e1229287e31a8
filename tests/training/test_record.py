"""A folder belongs to one run: the same run resumes in it, and any other run is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts import train_tiny
from sd.checkpoints.files import read_checkpoint, write_checkpoint
from sd.training import record, stages
from sd.training.data import DataError
from sd.training.loop import TrainingError, load_state, save_atomically
from sd.training.stages import TrainingRun
from tests.support.synthetic import FEW_LAYERS, INPAINTING_MICRO, random_state

SMALL = FEW_LAYERS  # its latents are scaled by 0.5, so a stage that forgets the factor fails


def make_folder(path, count=10):
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (80, 60), (25 * i, 0, 0)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"red number {i}", encoding="utf-8")
    return path


def make_run(out, config=SMALL, scenes=12, **options):
    return TrainingRun(out, scenes=scenes, device="cpu", config=config, **options)


def begin(out, name="vae", **options):
    """Write a state with nothing but the record of the run."""
    save_atomically({"record": make_run(out, **options).record}, out / f"{name}.state")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run: 12 scenes, one step per stage."""
    out = tmp_path_factory.mktemp("finished")
    run = make_run(out)
    for name in train_tiny.SHARES:
        run.train(name, minutes=1, steps=1)
    run.write_checkpoint()
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scenes": 13}, "on 12 scenes with seed 0, not on 13 scenes with seed 0: choose another --out"),
        ({"seed": 1}, "on 12 scenes with seed 0, not on 12 scenes with seed 1: choose another --out"),
        ({"folder": "mine"}, "on 12 scenes with seed 0, not on the 10 pictures of mine with seed 0: choose another"),
        ({"start": "tiny.ckpt"}, "not on 12 scenes with seed 0, from .*tiny.ckpt: choose another --out"),
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
        make_run(out, **options)
    assert content(out) == before


def test_the_state_of_one_stage_is_enough_to_refuse_another_run(tmp_path):
    begin(tmp_path)
    with pytest.raises(TrainingError, match="on 12 scenes with seed 0, not on 14 scenes"):
        make_run(tmp_path, scenes=14)


def test_a_run_on_another_version_of_the_toy_world_is_refused(tmp_path, monkeypatch):
    begin(tmp_path)
    monkeypatch.setattr(record, "WORLD", record.WORLD + 1)
    with pytest.raises(TrainingError, match="on 12 scenes with seed 0, which have changed since: choose another --out"):
        make_run(tmp_path)


def test_train_tiny_reports_another_run_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "runs/tiny")
    make_folder(tmp_path / "my_pictures")
    assert train_tiny.main(["all", "--folder", "my_pictures"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_tiny.py: runs/tiny has a run on 12 scenes with seed 0, "
        "not on the 10 pictures of my_pictures with seed 0: choose another --out."
    )


def test_the_same_run_resumes_and_keeps_its_number_of_steps(out):
    run = make_run(out)
    for options in ({"minutes": 5}, {"minutes": 1, "steps": 9}):
        run.train("vae", **options)
    assert load_state(out / "vae.state")["step"] == 1


def test_a_finished_stage_is_logged(out, caplog):
    caplog.set_level("INFO")
    make_run(out).train("text", minutes=1, steps=9)
    assert "text is finished, after 1 steps" in caplog.text


def test_the_same_start_resumes_and_another_does_not(finished, tmp_path):
    start = shutil.copy(finished / "tiny.ckpt", tmp_path / "copy.ckpt")
    begin(tmp_path / "out", "diffusion", start=finished / "tiny.ckpt")
    make_run(tmp_path / "out", start=start)  # the same weights in another file
    with pytest.raises(TrainingError, match=r"with seed 0, from .*tiny.ckpt, not on 12 scenes with seed 0:"):
        make_run(tmp_path / "out")
    other, known = tmp_path / "other.ckpt", read_checkpoint(start)
    known.state["model.diffusion_model.out.2.bias"] += 1
    write_checkpoint(other, known.state, known.config)
    with pytest.raises(TrainingError, match=r"tiny.ckpt, not on 12 scenes with seed 0, from .*other.ckpt"):
        make_run(tmp_path / "out", start=other)


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
    make_run(tmp_path / "out", folder=mine)
    change(mine)
    with pytest.raises(TrainingError, match="pictures of .*mine with seed 0, which have changed since: choose another"):
        make_run(tmp_path / "out", folder=mine)


def test_a_folder_that_has_moved_is_the_same(tmp_path):
    mine = make_folder(tmp_path / "mine")
    begin(tmp_path / "out", folder=mine)
    make_run(tmp_path / "out", folder=mine.rename(tmp_path / "moved"))


def test_a_state_of_unknown_pictures_is_refused_and_kept(out):
    state = load_state(out / "text.state")
    del state["record"]
    save_atomically(state, out / "text.state")
    before = content(out)
    with pytest.raises(TrainingError, match=r"text\.state does not say what it was trained on: choose another --out"):
        make_run(out)
    assert content(out) == before


def test_a_model_of_unknown_origin_is_not_replaced(finished, tmp_path):
    shutil.copy(finished / "tiny.ckpt", tmp_path / "tiny.ckpt")
    with pytest.raises(
        TrainingError, match=r"tiny\.ckpt was not trained in this folder and would be overwritten: choose"
    ):
        make_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.ckpt"]


def test_latents_are_computed_again_for_other_pictures(finished, tmp_path):
    """Even if the run was stopped before its first state."""
    mine, start = make_folder(tmp_path / "mine"), finished / "tiny.ckpt"
    first, _ = make_run(tmp_path / "out", folder=mine, start=start)._latents()
    change_picture(mine)
    second, _ = make_run(tmp_path / "out", folder=mine, start=start)._latents()
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_latents_are_computed_again_for_another_autoencoder(out):
    first, state = make_run(out)._latents()[0], load_state(out / "vae.state")
    assert torch.equal(first, make_run(out)._latents()[0])
    for name in state["average"]:
        state["average"][name] = state["average"][name].flip(0)
    save_atomically(state, out / "vae.state")
    assert not torch.equal(first, make_run(out)._latents()[0])


@pytest.mark.slow
def test_the_unets_initial_weights_do_not_depend_on_saved_latents(out):
    (out / "latents.state").unlink()
    first, second = (make_run(out)._stage("diffusion").networks.state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_an_inpainting_model_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("paint.ckpt"), random_state(INPAINTING_MICRO), INPAINTING_MICRO.to_dict())
    assert train_tiny.main(["diffusion", "--start", "paint.ckpt", "--out", "out", "--scenes", "12"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_tiny.py: paint.ckpt is an inpainting model, which cannot be trained further: choose another --start."
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("count", [3, 7])
def test_too_few_pictures_are_refused_before_anything_is_written(tmp_path, count):
    mine = make_folder(tmp_path / "mine", count)
    for options in ({"scenes": count}, {"folder": mine}):
        with pytest.raises(TrainingError, match=f"The number of training images should be at least 8, not {count}"):
            make_run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_used_leaves_nothing_behind(tmp_path):
    mine = make_folder(tmp_path / "mine")
    (mine / "captions.jsonl").write_text('{"file": "z.png", "caption": "z"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"There is no file .*z\.png"):
        make_run(tmp_path / "out", folder=mine)
    assert not (tmp_path / "out").exists()


def test_samples_are_not_mixed_with_the_training_images(tmp_path, monkeypatch):
    mine = make_folder(tmp_path / "mine")
    before = content(mine)
    (tmp_path / "link").symlink_to(mine)
    monkeypatch.chdir(mine)
    for out in (mine, tmp_path / "link", Path(), Path("../mine")):
        with pytest.raises(
            TrainingError, match="has the training images, and samples would mix with them: choose another"
        ):
            make_run(out, folder=mine)
    assert content(mine) == before


def test_a_run_in_a_subfolder_of_its_images_resumes(tmp_path):
    """Its samples are not taken for training images."""
    mine = make_folder(tmp_path / "mine")
    make_run(mine / "out", folder=mine).train("vae", minutes=1, steps=1)
    assert (mine / "out/vae.png").exists()
    assert len(make_run(mine / "out", folder=mine).train_set) == 9
