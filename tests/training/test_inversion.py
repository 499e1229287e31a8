"""Textual inversion: the gradient of the rows against transformers and diffusers, the file, and bad input."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

import sd
from scripts import train
from sd.adapters.textual_inversion import Embedding, with_embeddings
from sd.checkpoints.files import read_state_dict, write_checkpoint
from sd.config import SamplingConfig
from sd.training.inversion import FASTER, InversionRun, InversionStage, NewThing, NewWord
from sd.training.latents import Latents
from sd.training.loop import TrainingError, load_state
from tests.adapters.test_lora_parity import pipeline
from tests.support.marks import slow
from tests.support.synthetic import FEW_LAYERS, INPAINTING_MICRO, random_models, random_state

CONFIG = replace(FEW_LAYERS, sampling=SamplingConfig(steps=2, cfg_scale=3.0))
SETTINGS = NewThing("windmill", vectors=2, batch_size=4).suited_to(CONFIG, "inversion")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.ckpt"
    write_checkpoint(path, random_state(CONFIG), CONFIG.to_dict())
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), ["a windmill", "a red windmill at night"] * 2)


def write_pictures(folder, captions):
    for i, caption in enumerate(captions):
        Image.new("RGB", (70, 64), (30 * i, 99, 50)).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption, encoding="utf-8")
    return folder


def latents_of(models, *captions):
    """One random picture for each caption."""
    means = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Latents(means, torch.zeros_like(means), [models.tokenizer([caption]) for caption in captions])


def with_word(models, word):
    return with_embeddings(models, [Embedding("windmill.pt", ("windmill",), word.rows.detach())])


def new_word(models, n=2):
    rows = torch.randn(n, models.config.text.width, generator=torch.Generator().manual_seed(7))
    return NewWord(rows, len(models.clip.token_embedding.weight))


def test_the_context_is_that_of_models_with_the_word():
    models = random_models(CONFIG)
    word = new_word(models)
    worded = with_word(models, word)
    tokens = worded.tokenizer(["a windmill at night", "a house"])
    assert torch.equal(word.context(models.clip, tokens), worded.clip(tokens))


def test_the_gradient_is_that_of_transformers_and_diffusers():
    """As diffusers' own script trains, but with the weights of min-SNR (2303.09556)."""
    models = random_models(CONFIG)
    word = new_word(models)
    worded = with_word(models, word)
    pictures = latents_of(worded, "a windmill", "a red windmill")
    stage = InversionStage(models, nn.ModuleDict({"word": word}), pictures, SETTINGS)
    latents, tokens, timesteps, noise = stage.draw(torch.Generator().manual_seed(3))
    [ours] = torch.autograd.grad(stage.loss(latents, tokens, timesteps, noise), list(stage.networks.parameters()))

    pipe = pipeline(CONFIG, random_state(CONFIG))
    table = pipe.text_encoder.resize_token_embeddings(49410, mean_resizing=False).weight
    table.data[49408:] = word.rows.detach()
    table.requires_grad_()
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(**settings)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = pipe.unet(noisy, timesteps, pipe.text_encoder(tokens)[0]).sample
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    loss = ((predicted - noise).square().mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr).mean()
    [theirs] = torch.autograd.grad(loss, [table])
    assert ours.abs().max() > 1e-5
    assert (ours - FASTER * theirs[49408:]).abs().max() <= 1e-4 * ours.abs().max()


def test_nothing_but_the_rows_is_trained():
    models = random_models(CONFIG)
    stage = InversionStage(models, nn.ModuleDict({"word": new_word(models)}), latents_of(models, "a house"), SETTINGS)
    assert [name for name, _ in stage.networks.named_parameters()] == ["word.embedding_change"]
    assert not any(x.requires_grad for network in (models.clip, models.diffusion) for x in network.parameters())


def invert(start, pictures, out, *more):
    """Runs the script with a small model, on four pictures."""
    given = ["inversion", "--checkpoint", start, "--pictures", pictures, "--word", "windmill", "--out", out]
    return train.main([*map(str, given), "--batch", "4", "--device", "cpu", *more])


def test_its_file_is_read_by_our_loader_and_by_diffusers(start, pictures, tmp_path, capsys):
    assert invert(start, pictures, tmp_path, "--steps", "2", "--vectors", "3") == 0
    path = tmp_path / "windmill.safetensors"
    assert capsys.readouterr().out == f"{path}\n"
    assert (tmp_path / "inversion.png").exists()
    [(name, rows)] = read_state_dict(path).items()
    assert (name, rows.shape, rows.dtype) == ("<windmill>", (3, 32), torch.float16)
    models = sd.load_models(start, "cpu", torch.float32, embeddings=[path])
    assert models.tokenizer.encode("a windmill") == [320, 49408, 49409, 49410]
    assert torch.equal(models.clip.token_embedding.weight[49408:49411], rows.float())


@pytest.mark.slow
def test_words_begin_as_their_class(start, pictures, tmp_path):
    def rows(**settings):
        return InversionRun(tmp_path, pictures, NewThing("windmill", **settings), start, "cpu").rows

    models = sd.load_models(start, "cpu", torch.float32)
    table, tent, cat = models.clip.token_embedding.weight, *map(models.tokenizer.encode, ("tent", "hot air balloon"))
    assert torch.equal(rows(kind="tent", vectors=2), table[tent * 2])
    assert torch.equal(rows(kind="hot air balloon", vectors=2), table[cat[:2]])
    assert torch.allclose(rows(vectors=1), table.mean(dim=0, keepdim=True))


def test_a_folder_without_captions(start, tmp_path):
    folder = write_pictures(tmp_path, [None] * 2)
    run = InversionRun(tmp_path / "out", folder, NewThing("windmill"), start, "cpu")
    assert run.images.captions == [["a windmill"]] * 2


BAD = {
    "no pictures": ([], (), "has no captioned images: add some, such as cat.png"),
    "a caption missing": (["a windmill", None], (), "1.png has no caption: write one in 1.txt"),
    "a caption without the word": (
        ["a windmill", "a house"],
        (),
        "1.png should have the word 'windmill': it is 'a house'.",
    ),
    "no word": (
        ["a windmill"] * 4,
        ("--word", "a/b"),
        "--word should be of letters, digits, - and _, such as windmill, not 'a/b'.",
    ),
    "no vectors": (["a windmill"] * 4, ("--vectors", "0"), "--vectors should be 1 to 16, not 0."),
    "many vectors": (["a windmill"] * 4, ("--vectors", "100"), "--vectors should be 1 to 16, not 100."),
    "its own class": (
        ["a windmill"] * 4,
        ("--class", "windmill"),
        "--class should be another word than --word, not 'windmill'.",
    ),
    "a rate": (["a windmill"] * 4, ("--learning-rate", "-1"), "--learning-rate should be a number above 0, not -1."),
}


QUICK = ("no pictures", "a caption missing", "a caption without the word", "no word")  # before the model is loaded


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in BAD])
def test_bad_input_is_one_sentence(name, start, tmp_path, capsys):
    captions, more, reason = BAD[name]
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert invert(start, write_pictures(folder, captions), tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ")
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_class_without_a_meaning(pictures, tmp_path):
    """As in the tiny model: the embeddings of words that no caption had are zero."""
    state = random_state(CONFIG)
    state["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"][1000:49000] = 0
    write_checkpoint(tmp_path / "start.ckpt", state, CONFIG.to_dict())
    with pytest.raises(TrainingError, match="--class should be a word that the model knows, not 'house'."):
        InversionRun(tmp_path / "out", pictures, NewThing("windmill", kind="house"), tmp_path / "start.ckpt", "cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_inpainting_model(pictures, tmp_path):
    write_checkpoint(tmp_path / "start.ckpt", random_state(INPAINTING_MICRO), INPAINTING_MICRO.to_dict())
    with pytest.raises(TrainingError, match="is an inpainting model, which cannot learn new things: choose another"):
        InversionRun(tmp_path / "out", pictures, NewThing("windmill"), tmp_path / "start.ckpt", "cpu")


@pytest.mark.slow
def test_a_run_with_other_settings_or_another_file_is_not_resumed(start, pictures, tmp_path):
    InversionRun(tmp_path, pictures, NewThing("windmill"), start, "cpu").train(1, steps=1)
    with pytest.raises(
        TrainingError, match="--vectors should be 4, as in the run in .*, not 2: or choose another --out"
    ):
        InversionRun(tmp_path, pictures, NewThing("windmill", vectors=2), start, "cpu")
    with pytest.raises(TrainingError, match="choose another --out"):
        InversionRun(tmp_path, pictures, NewThing("windmill"), start, "cpu", seed=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "windmill.safetensors").write_bytes(b"mine")
    with pytest.raises(TrainingError, match="was not trained in this folder and would be overwritten"):
        InversionRun(other, pictures, NewThing("windmill"), start, "cpu")


@pytest.mark.slow
def test_a_run_resumes_to_the_same_rows(start, pictures, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    InversionRun(whole, pictures, NewThing("windmill"), start, "cpu").train(1, steps=2)
    monkeypatch.setattr(InversionRun, "_show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        InversionRun(halves, pictures, NewThing("windmill"), start, "cpu", save_every=0).train(1, steps=2)
    monkeypatch.undo()
    InversionRun(halves, pictures, NewThing("windmill"), start, "cpu").train(1, steps=2)
    one, other = (load_state(folder / "inversion.state")["average"] for folder in (whole, halves))
    assert torch.equal(one["word.embedding_change"], other["word.embedding_change"])


def interrupt(*_):
    raise KeyboardInterrupt
