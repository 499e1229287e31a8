"""DreamBooth with LoRA: the loss against the paper's formula, the file in our reader and in diffusers, bad input."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import sd
from scripts import train
from sd.checkpoints.files import read_state_dict, write_checkpoint
from sd.config import TINY
from sd.files import DATA
from sd.noise import add_noise
from sd.training import lora
from sd.training.inversion import NewThing
from sd.training.loop import TrainingError
from sd.training.lora import LoRARun, LoRAStage, prior_prompts
from sd.training.losses import diffusion_loss
from sd.training.low_rank import low_rank_changes, wearing
from tests.adapters.test_lora_parity import pipeline
from tests.support.accelerator import accelerator
from tests.support.marks import slow
from tests.support.synthetic import random_models, random_state
from tests.training.test_inversion import CONFIG, latents_of, new_word, with_word, write_pictures

SETTINGS = NewThing("windmill", rank=2, prior=0.25, batch_size=8).suited_to(CONFIG, "lora")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.ckpt"
    write_checkpoint(path, random_state(CONFIG), CONFIG.to_dict())
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), ["a windmill", "a red windmill at night"] * 2)


def stage_of(models, settings=SETTINGS):
    word = new_word(models)
    thing, others = latents_of(with_word(models, word), "a windmill"), latents_of(models, "a house", "a tent")
    torch.manual_seed(5)
    changes = low_rank_changes(models.diffusion, settings.rank)
    for change in changes.values():
        nn.init.normal_(change.up, std=0.05)
    return LoRAStage(models, nn.ModuleDict({"word": word, "lora": changes}), thing, others, settings)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_loss_has_both_parts_of_the_paper(predicts):
    """2208.12242, eq. 2: that of 6 rows of pictures, plus lambda = 1/3 times that of 2 rows of other things. For these,
    the target is what the U-Net predicts without the LoRA."""
    models = random_models(replace(CONFIG, schedule=replace(CONFIG.schedule, prediction_type=predicts)))
    stage = stage_of(models)
    batch = stage.draw(torch.Generator().manual_seed(2))
    latents, tokens, timesteps, noise, kept = batch
    assert (tokens >= 49408).any(dim=1).tolist() == [True] * 6 + [False] * 2
    assert kept.tolist() == [False] * 6 + [True] * 2
    assert sorted((timesteps // 125).tolist()) == list(range(8))  # evenly spread, and over both
    with torch.no_grad():
        context = with_word(models, stage.networks["word"]).clip(tokens)
        unet = wearing(models.diffusion, stage.networks["lora"])
        pictured = diffusion_loss(
            unet, *(x[:6] for x in (latents, context, timesteps, noise)), stage.alphas_cumprod, predicts, min_snr=5
        )
        alpha_bar = stage.alphas_cumprod[timesteps[6:]]
        x_t = add_noise(latents[6:], noise[6:], alpha_bar.reshape(-1, 1, 1, 1))
        change = unet(x_t, context[6:], timesteps[6:]) - models.diffusion(x_t, context[6:], timesteps[6:])
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=5) / (snr + 1 if predicts == "v_prediction" else snr)
        others = (weight * change.square().mean(dim=(1, 2, 3))).mean()
        loss = stage.loss(*batch)
    assert others > 0
    assert loss.item() == pytest.approx((0.75 * (pictured + others / 3)).item(), rel=1e-4)


def test_a_lora_that_changes_nothing_has_no_loss_on_other_things():
    stage = stage_of(random_models(CONFIG))
    for change in stage.networks["lora"].values():
        nn.init.zeros_(change.up)
    latents, tokens, timesteps, noise, kept = stage.draw(torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = stage.loss(*(x[kept] for x in (latents, tokens, timesteps, noise, kept)))
    assert loss.item() < 1e-9


def test_the_lora_and_the_rows_are_trained_and_nothing_else():
    stage = stage_of(random_models(CONFIG))
    loss = stage.loss(*stage.draw(torch.Generator().manual_seed(0)))
    gradients = torch.autograd.grad(loss, list(stage.networks.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    models = stage.models
    assert not any(x.requires_grad for network in (models.clip, models.diffusion) for x in network.parameters())


def test_without_prior_all_rows_are_pictures():
    stage = stage_of(random_models(CONFIG), replace(SETTINGS, prior=0.0))
    tokens = stage.draw(torch.Generator().manual_seed(0))[1]
    assert (tokens >= 49408).any(dim=1).all()


def teach(start, pictures, out, *more):
    """Runs the script with a small model, on four pictures."""
    given = ["lora", "--checkpoint", start, "--pictures", pictures, "--word", "windmill", "--out", out, "--rank", "2"]
    return train.main([*map(str, given), "--batch", "4", "--device", "cpu", *more])


def test_it_learns_and_its_file_draws(start, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora, "KIND_PROMPTS", 2)
    assert teach(start, pictures, tmp_path, "--steps", "2", "--vectors", "2", "--class", "house") == 0
    path = tmp_path / "windmill.safetensors"
    assert capsys.readouterr().out == f"{path}\n"
    assert (tmp_path / "lora.png").exists()
    state = read_state_dict(path)
    assert all(x.abs().sum() > 0 for key, x in state.items() if key.endswith("lora_up.weight"))
    models = sd.load_models(start, "cpu", torch.float32, loras=[path])
    assert models.tokenizer.added == {"windmill": [49408, 49409]}
    rows = state["bundle_emb.windmill.string_to_param.*"]
    assert torch.equal(models.clip.token_embedding.weight[49408:], rows.float())
    assert sd.generate("a windmill", models=models, seed=0).shape == (64, 64, 3)


@pytest.mark.parametrize("vectors", [slow("0"), "2"])
def test_diffusers_opens_the_file(vectors, start, pictures, tmp_path):
    """It refuses keys without "lora" in them: those of the rows are given to it as an embedding."""
    path = tmp_path / "windmill.safetensors"
    assert teach(start, pictures, tmp_path, "--steps", "1", "--vectors", vectors, "--prior", "0") == 0
    pipe, state = pipeline(CONFIG, random_state(CONFIG)), read_state_dict(path)
    if vectors == "0":
        pipe.load_lora_weights(str(path))
    else:
        pipe.load_lora_weights({key: tensor for key, tensor in state.items() if "lora" in key})
    models = sd.load_models(start, "cpu", torch.float32, tuned=False, loras=[path])
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    timesteps = torch.tensor([7, 900])
    with torch.no_grad():
        ours = models.diffusion(latents, context, timesteps)
        theirs = pipe.unet(latents, timesteps, context).sample
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.slow
def test_a_simulated_gpu(start, pictures, tmp_path):
    with accelerator("cuda:0"):
        run = LoRARun(tmp_path, pictures, NewThing("windmill", vectors=2, prior=0, batch_size=4), start, "cuda:0")
        run.train(1, steps=1)
        assert run.write().exists()


@pytest.mark.slow
def test_the_prior_of_the_toy_world():
    """A part of its prompts are for the kind itself: these are the first that the new thing would replace."""
    prompts = prior_prompts(random_models(replace(CONFIG, text=TINY.text)), "house")
    assert len(prompts) == 160
    assert sum("house" in prompt.split() for prompt in prompts) == 64
    assert sum(" and " in prompt for prompt in prompts) > 10  # two things, too
    assert prior_prompts(random_models(CONFIG), "cat") == ["a cat"] * 100


BAD = {
    "no rank": (("--rank", "0"), "--rank should be 1 to 64, the highest of a layer, not 0."),
    "a high rank": (("--rank", "65"), "--rank should be 1 to 64, the highest of a layer, not 65."),
    "a prior that is too high": (("--prior", "1"), "--prior should be from 0 to below 1, not 1."),
    "no room for a picture": (
        ("--prior", "0.9"),
        "--batch should be larger than 4 with --prior 0.9: each batch has some of the pictures, and some that the "
        "model drew.",
    ),
    "no class": ((), "--class should say what kind of thing it is, such as dog: or use --prior 0."),
    "many vectors": (("--vectors", "100"), "--vectors should be 0 to 16, not 100."),
}


@pytest.mark.parametrize("name", [name if name == "no rank" else slow(name) for name in BAD])
def test_bad_input_is_one_sentence(name, start, pictures, tmp_path, capsys):
    more, reason = BAD[name]
    assert teach(start, pictures, tmp_path / "out", *more) == 2
    assert capsys.readouterr().err == f"train.py: {reason}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_word_without_a_meaning_needs_rows(pictures, tmp_path):
    """As in the tiny model: the embeddings of words that no caption had are zero."""
    state = random_state(CONFIG)
    state["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"][1000:49000] = 0
    write_checkpoint(tmp_path / "start.ckpt", state, CONFIG.to_dict())
    settings = NewThing("windmill", vectors=0, prior=0)
    with pytest.raises(
        TrainingError, match="--vectors should be above 0: the model does not know the word 'windmill'."
    ):
        LoRARun(tmp_path / "out", pictures, settings, tmp_path / "start.ckpt", "cpu")


@pytest.mark.slow
def test_the_one_in_data():
    path = DATA / "tiny-windmill.safetensors"
    assert path.stat().st_size <= 1.8e6
    models = sd.load_models(loras=[path])
    assert models.tokenizer.added == {"windmill": [49408, 49409]}
    assert models.with_loras([]).tokenizer.added == {}


@pytest.mark.slow
def test_it_says_into_which_pieces_a_word_is_split(start, tmp_path, caplog):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder, ["a brobdingnag"])
    with caplog.at_level("INFO"):
        LoRARun(tmp_path / "out", folder, NewThing("brobdingnag", vectors=0, prior=0), start, "cpu")
    assert "The tokenizer splits 'brobdingnag' into 4 pieces: " in caplog.text
    assert "their background becomes part of the new thing" in caplog.text
