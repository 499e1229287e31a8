"""Full fine-tuning: the loss against diffusers, runs that resume, the file that they write, and bad input."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sd
from scripts import train
from scripts.training import full
from sd.checkpoints.files import read_checkpoint, write_checkpoint
from sd.config import PREDICTION_TYPES, SD_TURBO, SamplingConfig
from sd.runtime.out_of_memory import OutOfMemory
from sd.training import fine_tuning
from sd.training.fine_tuning import OPTIMIZERS, FineTuning, FineTuningRun, FineTuningStage
from sd.training.latents import Latents
from sd.training.loop import TrainingError, load_state
from tests.support.accelerator import accelerator
from tests.support.synthetic import FEW_LAYERS, INPAINTING_MICRO, LCM_MICRO, random_models, random_state

TO_V = ("--buckets", "--flip", "--prediction-type", "v_prediction", "--zero-snr")
ZERO_SNR = {"prediction_type": "v_prediction", "zero_snr": True}
MODEL = replace(FEW_LAYERS, sampling=SamplingConfig(steps=1, cfg_scale=3.0))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.ckpt"
    write_checkpoint(path, random_state(MODEL), MODEL.to_dict())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures, two of which are wide."""
    folder = tmp_path_factory.mktemp("mine")
    for i in range(8):
        Image.new("RGB", (128, 64) if i > 5 else (64, 64), (30 * i, 99, 50)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}\nnumber {i} (of 8", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models():
    return random_models(MODEL)


def stage_of(models, settings, counts=(3, 3)):
    """A stage with a batch of four, on random latents of two shapes, so many of each."""
    settings = replace(settings, batch_size=4).suited_to(MODEL)
    models = replace(models, config=replace(MODEL, schedule=settings.schedule(MODEL.schedule)))
    generator = torch.Generator().manual_seed(0)
    buckets = []
    for count, size in zip(counts, [(8, 8), (4, 8)]):
        latents = torch.randn(count, 4, *size, generator=generator)
        tokens = [models.tokenizer([f"{n} houses", "a tent"]) for n in range(count)]
        buckets.append(Latents(latents, torch.zeros_like(latents), tokens))
    return FineTuningStage(models, buckets, settings)


@pytest.mark.parametrize(
    "predicts, zero_snr, min_snr",
    [("epsilon", False, 5.0), ("epsilon", False, 0.0), ("v_prediction", False, 5.0), ("v_prediction", True, 0.0)],
)
def test_the_loss_is_that_of_diffusers_example(predicts, zero_snr, min_snr, models):
    """Its examples/text_to_image/train_text_to_image.py, with its U-Net, its schedule and its SNR."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    from tests.parity.reference import unet

    settings = FineTuning(min_snr=min_snr, offset_noise=0.1, prediction_type=predicts, zero_snr=zero_snr)
    stage = stage_of(models, settings)
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=predicts,
        rescale_betas_zero_snr=zero_snr,
    )
    latents, tokens, _, noise = stage.draw(torch.Generator().manual_seed(2))
    timesteps = torch.tensor([0, 250, 700, 999])
    with torch.no_grad():
        ours = stage.loss(latents, tokens, timesteps, noise)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        context = stage.models.clip(tokens)
        predicted = unet(MODEL, random_state(MODEL))(noisy, timesteps, context).sample
        target = noise if predicts == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        errors = (predicted - target).square().mean(dim=(1, 2, 3))
        if min_snr:
            snr = compute_snr(scheduler, timesteps)
            weights = torch.stack([snr, min_snr * torch.ones_like(snr)], dim=1).min(dim=1)[0]
            errors = errors * weights / (snr if predicts == "epsilon" else snr + 1)
    assert ours.item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_every_picture_is_equally_likely_whatever_its_bucket(models):
    stage, generator = stage_of(models, FineTuning(), counts=(3, 9)), torch.Generator().manual_seed(0)
    shapes = [tuple(stage.draw(generator)[0].shape[2:]) for _ in range(400)]
    assert set(shapes) == {(8, 8), (4, 8)}
    assert shapes.count((4, 8)) / 400 == pytest.approx(3 / 4, abs=0.07)


def test_batches_depend_only_on_the_generator(models):
    stage, batches = stage_of(models, FineTuning(offset_noise=0.1)), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        stage.draw(generator)
        batches.append(stage.draw(generator))
    assert all(torch.equal(one, other) for one, other in zip(*batches))


def test_settings_that_suit_the_model():
    small, large = (FineTuning().suited_to(replace(MODEL, image_size=size)) for size in (128, 512))
    assert (small.learning_rate, small.batch_size, small.min_snr) == (5e-4, 16, 5.0)
    assert (large.learning_rate, large.batch_size, large.prediction_type) == (1e-5, 4, "epsilon")
    zero = replace(MODEL, schedule=replace(MODEL.schedule, rescale_betas_zero_snr=True))
    assert FineTuning().suited_to(zero).min_snr == 0


def test_the_optimizer_in_8_bits_is_that_of_bitsandbytes(models, monkeypatch):
    class AdamW8bit(torch.optim.SGD):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
            super().__init__(params, lr=lr)

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
    assert isinstance(stage_of(models, FineTuning(optimizer="adamw8bit")).optimizers()[0], AdamW8bit)
    assert isinstance(stage_of(models, FineTuning()).optimizers()[0], torch.optim.AdamW)


def fine_tune(start, folder, out, *more):
    """Runs the script for one step with a small model."""
    arguments = ["--folder", folder, "--checkpoint", start, "--out", out, "--steps", 1, "--batch", 2, "--device", "cpu"]
    return train.main(["full", *map(str, [*arguments, *more])])


@pytest.fixture(scope="module")
def trained(start, folder, tmp_path_factory):
    """The folder of a run with buckets, mirrored pictures and another prediction type."""
    out = tmp_path_factory.mktemp("trained")
    assert fine_tune(start, folder, out, *TO_V) == 0
    return out


def test_the_result_is_a_checkpoint_that_says_what_it_predicts(trained, start):
    assert {"full.png", "full.txt"} <= {path.name for path in trained.iterdir()}
    models = sd.load_models(trained / "full.safetensors", "cpu", torch.float32)
    schedule = models.config.schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)
    assert sd.generate("a red house", models=models, n_inference_steps=1, seed=0).shape == (64, 64, 3)
    before, after = (read_checkpoint(path).state for path in (start, trained / "full.safetensors"))
    assert after.keys() - before.keys() == {"v_pred", "ztsnr"}
    assert {tensor.dtype for key, tensor in after.items() if key in before} == {torch.float16, torch.int64}
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key].half(), after[key].half())}
    assert changed == {"model"}


def test_mirrored_pictures_and_buckets_are_trained_on(trained):
    known = load_state(trained / "latents.state")
    assert [tuple(bucket["means"].shape) for bucket in known["buckets"]] == [(4, 4, 5, 11), (12, 4, 8, 8)]
    assert known["buckets"][0]["names"] == ["6.png", "7.png"] * 2


@pytest.mark.slow
def test_a_finished_run_only_writes_its_file_again(trained, start, folder, monkeypatch):
    (trained / "full.safetensors").unlink()
    monkeypatch.setattr(fine_tuning, "encode_all", None)  # the latents are saved
    assert fine_tune(start, folder, trained, *TO_V) == 0
    assert (trained / "full.safetensors").exists()


@pytest.mark.parametrize(
    "more, reason",
    [
        (TO_V[1:], "--buckets should be on, as in the run in {out}, not off: or choose another --out."),
        pytest.param(
            (*TO_V, "--ema", "0.5"),
            "--ema should be 0.999, as in the run in {out}, not 0.5: or choose another --out.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*TO_V, "--seed", "1"),
            "{out} has a run on the 8 pictures of {folder} with seed 0, from {start}, not on ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(more, reason, trained, start, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert fine_tune(start, folder, trained, *more) == 2
    assert reason.format(out=trained, folder=folder, start=start) in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FineTuning(batch_size=2), FineTuning(batch_size=2, buckets=True, flip=True)])
def test_a_run_resumes_to_the_same_weights(settings, start, folder, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    FineTuningRun(whole, folder, start, settings, "cpu").train(1, steps=3)
    monkeypatch.setattr(FineTuningRun, "_show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FineTuningRun(halves, folder, start, settings, "cpu", save_every=0).train(1, steps=3)
    monkeypatch.undo()
    assert load_state(halves / "full.state")["step"] == 1
    FineTuningRun(halves, folder, start, settings, "cpu").train(1, steps=3)
    one, other = (load_state(path / "full.state") for path in (whole, halves))
    for part in ("networks", "average"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_on_a_simulated_gpu(start, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**9))
    with accelerator("cuda:0"):
        run = FineTuningRun(tmp_path, folder, start, FineTuning(batch_size=2), "cuda:0")
        run.train(1, steps=1)
        assert run.write_checkpoint().exists()


@pytest.mark.parametrize(
    "config, reason",
    [
        (INPAINTING_MICRO, "is an inpainting model, which cannot be trained further: choose another --checkpoint."),
        (SD_TURBO, "draws in a few steps, which this training would undo: choose the --checkpoint that it was"),
        (LCM_MICRO, "draws in a few steps, which this training would undo: choose the --checkpoint that it was"),
    ],
)
def test_models_that_cannot_be_trained_further(config, reason):
    with pytest.raises(TrainingError, match=f"^model.ckpt {reason}"):
        fine_tuning._check_model(config, Path("model.ckpt"))


@pytest.mark.slow
def test_a_model_for_inpainting_is_refused_before_any_work(folder, tmp_path, capsys):
    path = tmp_path / "start.ckpt"
    write_checkpoint(path, random_state(INPAINTING_MICRO), INPAINTING_MICRO.to_dict())
    assert fine_tune(path, folder, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"train.py: {path} is an inpainting model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"zero_snr": True}, "--zero-snr should be used with --prediction-type v_prediction: in noise alone, "),
        (ZERO_SNR | {"min_snr": 5.0}, "--min-snr should be 0 with --zero-snr: "),
        ({"min_snr": -1}, "--min-snr should be a number from 0 on, not -1."),
        ({"offset_noise": math.nan}, "--offset-noise should be a number from 0 on, not nan."),
        ({"ema": 1}, "--ema should be from 0 to below 1, not 1."),
        ({"learning_rate": -1}, "--learning-rate should be a number above 0, not -1."),
        ({"batch_size": 0}, "--batch should be a number above 0, not 0."),
        ({"prediction_type": "x"}, "--prediction-type should be epsilon or v_prediction, not x."),
        ({"optimizer": "sgd"}, "--optimizer should be adamw or adamw8bit, not sgd."),
    ],
)
def test_bad_settings(given, reason):
    def check(settings):
        settings.check()
        settings.suited_to(MODEL).check()

    with pytest.raises(TrainingError, match=re.escape(reason)):
        check(FineTuning(**given))
    check(FineTuning(**ZERO_SNR))


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--optimizer", "adamw8bit"], "needs the package bitsandbytes: `pip install bitsandbytes`, or choose adamw."),
        pytest.param(["--zero-snr"], "--zero-snr should be used with --prediction", marks=pytest.mark.slow),
        (["--checkpoint", "none.ckpt"], "There is no checkpoint none.ckpt"),
    ],
)
def test_bad_flags_are_one_sentence(more, reason, start, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert fine_tune(start, folder, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ")
    assert reason in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pictures, captions, reason",
    [
        (0, 0, "has no captioned images: add some, such as cat.png"),
        (1, 1, "The number of training images should be at least 8, not 1: for a few pictures of one thing, train a"),
        (9, 8, "8.png has no caption: write one in 8.txt in the same folder"),
    ],
)
def test_bad_folders_are_one_sentence(pictures, captions, reason, start, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(pictures):
        Image.new("RGB", (64, 64)).save(mine / f"{i}.png")
    for i in range(captions):
        (mine / f"{i}.txt").write_text("a picture")
    assert fine_tune(start, mine, tmp_path / "out") == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_not_trained_there_is_kept(start, folder, tmp_path, capsys):
    (tmp_path / "full.safetensors").write_bytes(b"precious")
    assert fine_tune(start, folder, tmp_path) == 2
    assert "was not trained in this folder and would be overwritten: choose another --out." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full.safetensors"]


def test_a_lack_of_memory_has_advice_for_training():
    message = r"not enough memory \(.*99 bytes\): use --accumulate 2, .*, or --optimizer adamw8bit, or train a LoRA\.$"
    run = SimpleNamespace(stage=SimpleNamespace(), _pictures=no_memory)
    with pytest.raises(OutOfMemory, match=message):
        fine_tuning.FineTuningRun.train(run, 1)


def no_memory():
    raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 99 bytes")


def test_a_gpu_that_is_too_small_is_an_error_before_any_work(models, monkeypatch):
    models = replace(models, device=torch.device("cuda:0"))
    weights = sum(p.numel() for p in models.diffusion.parameters())
    for factor, present in [(20, 20), (14, 14)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, size=present * weights: (0, size))
        fine_tuning._check_memory(models, "adamw" if factor == 20 else "adamw8bit")
    with pytest.raises(TrainingError, match=r"cuda:0 should have more than .* GB to train all weights of this model"):
        fine_tuning._check_memory(models, "adamw")


def test_the_script_names_what_sd_knows():
    assert (full.PREDICTION_TYPES, full.OPTIMIZERS) == (PREDICTION_TYPES, OPTIMIZERS)
