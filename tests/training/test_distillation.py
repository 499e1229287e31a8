"""Consistency distillation: the loss against diffusers' schedulers, runs that resume, and the file that they write."""

from dataclasses import replace

import pytest
import torch

import sd
from scripts import train_tiny
from sd.checkpoints.files import read_checkpoint, write_checkpoint
from sd.config import PREDICTION_TYPES, SD_TURBO, SamplingConfig
from sd.samplers.lcm import DISTILLED_STEPS
from sd.tokenizer import Tokenizer
from sd.training import distillation, samples
from sd.training.distillation import ConsistencyStage, DistillationRun, drawn_by
from sd.training.loop import TrainingError, load_state
from tests.support.accelerator import accelerator
from tests.support.synthetic import FEW_LAYERS, INPAINTING_MICRO, random_models, random_state

TEACHER = replace(FEW_LAYERS, sampling=SamplingConfig(steps=2, cfg_scale=3.0))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    write_checkpoint(path, random_state(TEACHER), TEACHER.to_dict())
    return path


def stage_of(models, batch_size=4):
    tokens = [Tokenizer()(text) for text in ("a red house", "a tent", "a tree at night")]
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return ConsistencyStage(models, (latents, torch.zeros_like(latents)), tokens, 3.0, batch_size, rank=2)


@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
def test_the_loss_is_that_of_diffusers_schedulers(predicts):
    """Algorithm 1 of 2310.04378, from DDIMScheduler's step and LCMScheduler's boundary condition, image by image."""
    diffusers = pytest.importorskip("diffusers")
    config = replace(TEACHER, schedule=replace(TEACHER.schedule, prediction_type=predicts))
    models = random_models(config)
    stage = stage_of(models)
    torch.manual_seed(5)
    for change in stage.networks["lora"].values():
        torch.nn.init.normal_(change.up, std=0.05)
    latents, tokens, _, noise = stage.draw(torch.Generator().manual_seed(2))
    levels = torch.tensor([1, 2, 27, 50])
    with torch.no_grad():
        ours = stage.loss(latents, tokens, levels, noise)

        settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        settings |= {"prediction_type": predicts, "clip_sample": False, "set_alpha_to_one": False}
        ddim, lcm = diffusers.DDIMScheduler(**settings), diffusers.LCMScheduler(**settings)
        ddim.set_timesteps(DISTILLED_STEPS)

        def end(x, t, context):
            output = stage.student(x, context, torch.tensor([t]))
            x_0 = ddim.step(output, t, x).pred_original_sample
            c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(t)
            return c_skip * x + c_out * x_0

        losses = []
        for z, token, level, e in zip(latents, tokens, levels.tolist(), noise):
            t = 20 * level - 1
            x = ddim.add_noise(z[None], e[None], torch.tensor([t]))
            uncond, context = models.clip(torch.cat([stage.empty, token[None]])).split(1)
            outputs = [models.diffusion(x, each, torch.tensor([t])) for each in (uncond, context)]
            earlier = ddim.step(outputs[0] + 3.0 * (outputs[1] - outputs[0]), t, x).prev_sample
            d = end(x, t, context) - end(earlier, max(t - 20, 0), context)
            losses.append(((d**2 + 1e-6).sqrt() - 1e-3).mean())
    assert ours == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_only_the_student_of_the_later_timestep_gets_gradients():
    stage = stage_of(random_models(TEACHER))
    loss = stage.loss(*stage.draw(torch.Generator().manual_seed(0)))
    gradients = torch.autograd.grad(loss, list(stage.networks.parameters()))
    assert sum(g.abs().sum() for g in gradients) > 0
    with torch.autocast("cpu", torch.bfloat16):  # it keeps casts of the weights, in torch 2.4 even without gradients
        loss = stage.loss(*stage.draw(torch.Generator().manual_seed(0)))
    assert sum(g.abs().sum() for g in torch.autograd.grad(loss, list(stage.networks.parameters()))) > 0
    assert not any(x.requires_grad for x in stage.teacher.diffusion.parameters())


def test_a_lora_from_elsewhere_is_not_replaced(start, tmp_path):
    (tmp_path / "lcm.safetensors").write_bytes(b"mine")
    with pytest.raises(
        TrainingError, match=r"lcm\.safetensors was not trained in this folder and would be overwritten"
    ):
        DistillationRun(tmp_path, start, prompts=8, device="cpu")
    assert (tmp_path / "lcm.safetensors").read_bytes() == b"mine"


def test_levels_are_evenly_spread_and_reach_both_ends():
    stage = stage_of(random_models(TEACHER), batch_size=50)
    levels = stage.draw(torch.Generator().manual_seed(1))[2]
    assert sorted(levels.tolist()) == list(range(1, DISTILLED_STEPS + 1))


def distil(start, out, *more):
    """Runs the script with a tiny teacher, on eight prompts."""
    return train_tiny.main(["lcm", "--start", str(start), "--out", str(out), "--scenes", "8", "--device", "cpu", *more])


def test_it_learns_and_its_file_draws(start, tmp_path, capsys):
    assert distil(start, tmp_path, "--steps", "2") == 0
    path = tmp_path / "lcm.safetensors"
    assert capsys.readouterr().out == f"{path}\n"
    assert (tmp_path / "lcm.png").exists()
    models = sd.load_models(start, "cpu", loras=[path])
    assert sd.generate("a red house", models=models, do_cfg=False, sampler_name="lcm", seed=0).shape == (64, 64, 3)
    ups = [x for key, x in read_checkpoint(path).state.items() if key.endswith("lora_up.weight")]
    assert all(up.abs().sum() > 0 for up in ups)
    assert distil(start, tmp_path, "--steps", "2") == 0  # it is finished: only the file is written again


@pytest.mark.slow
def test_a_run_resumes_to_the_same_weights(start, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    DistillationRun(whole, start, prompts=8, device="cpu").train(1, steps=2)
    monkeypatch.setattr(distillation.DistillationRun, "_show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        DistillationRun(halves, start, prompts=8, device="cpu", save_every=0).train(1, steps=2)
    monkeypatch.undo()
    assert load_state(halves / "lcm.state")["step"] == 1
    DistillationRun(halves, start, prompts=8, device="cpu").train(1, steps=2)
    one, other = (load_state(folder / "lcm.state")["average"] for folder in (whole, halves))
    assert all(torch.equal(one[name], other[name]) for name in one)


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_teacher_draws_only_what_is_missing(start, tmp_path, monkeypatch):
    models = sd.load_models(start, "cpu", torch.float32)
    monkeypatch.setattr(distillation, "DRAWN_AT_ONCE", 2)
    prompts, path = [f"{n} houses" for n in range(6)], tmp_path / "drawn.state"
    whole = drawn_by(models, prompts, 0, tmp_path / "whole.state", {})
    drawn_by(models, prompts[:2], 0, path, {})
    counted = []
    monkeypatch.setattr(samples, "encode_prompt", lambda m, texts, **k: counted.append(texts) or encode(m, texts))
    assert torch.equal(drawn_by(models, prompts, 0, path, {}), whole)
    assert counted == [prompts[2:4], prompts[4:]]
    assert torch.equal(drawn_by(models, prompts, 0, path, {"other": "record"}), whole)
    assert len(counted) == 5


def encode(models, texts):
    return sd.pipeline.encode_prompt(models, texts, plain=True)


def test_your_own_images_are_encoded_instead(start, tmp_path, pictures_folder):
    run = DistillationRun(tmp_path / "out", start, pictures_folder, device="cpu")
    run.train(1, steps=1)
    assert not (tmp_path / "out" / "drawn.state").exists()
    assert run.write_lora().exists()


def test_the_folder_of_the_images_is_not_that_of_the_run(start, pictures_folder):
    with pytest.raises(TrainingError, match="has the training images"):
        DistillationRun(pictures_folder, start, pictures_folder, device="cpu")
    assert not [path for path in pictures_folder.iterdir() if path.suffix not in (".png", ".txt")]


def test_a_file_cannot_be_the_folder_of_a_run(start):
    with pytest.raises(TrainingError, match="cannot be created: it or a parent of it is a file"):
        DistillationRun(start, start, prompts=8, device="cpu")


def test_a_teacher_on_a_simulated_gpu(start, tmp_path):
    with accelerator("cuda:0"):
        run = DistillationRun(tmp_path, start, prompts=8, device="cuda:0")
        run.train(1, steps=1)
        assert run.write_lora().exists()


@pytest.fixture
def pictures_folder(tmp_path):
    from PIL import Image

    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (70, 64), (30 * i, 99, 50)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "config, reason",
    [
        (INPAINTING_MICRO, "is an inpainting model, which cannot be distilled: choose another --start."),
        (
            replace(FEW_LAYERS, sampling=SD_TURBO.sampling),
            "already draws in a few steps, without guidance: choose another --start.",
        ),
    ],
)
def test_models_that_cannot_be_distilled(config, reason, tmp_path, capsys):
    path = tmp_path / "start.ckpt"
    write_checkpoint(path, random_state(config), config.to_dict())
    assert distil(path, tmp_path / "out") == 2
    assert capsys.readouterr().err == f"train_tiny.py: {path} {reason}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--scenes", "4"], "The number of prompts should be at least 8, not 4."),
        (["--start", "none.ckpt"], "There is no checkpoint none.ckpt"),
        (["--prediction-type", "epsilon"], "--prediction-type should be left out of stage lcm"),
    ],
)
def test_bad_input_is_one_sentence(more, reason, start, tmp_path, capsys):
    try:
        code = distil(start, tmp_path / "out", *more)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert reason in error
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_resumed(start, tmp_path):
    DistillationRun(tmp_path, start, prompts=8, device="cpu").train(1, steps=1)
    with pytest.raises(TrainingError, match="choose another --out"):
        DistillationRun(tmp_path, start, prompts=9, device="cpu")
