"""Models saved as folders: ours reads them back to the bit, and diffusers draws the same images from them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sd import generate, load_models
from sd.config import SD_TURBO, TINY
from sd.model_saver import save_folder
from sd.prompts.added_words import TokenizerWithWords
from tests.support.marks import slow
from tests.support.synthetic import INPAINTING_MICRO, LCM_MICRO, MICRO, SD2_INPAINTING_MICRO, SD2_MICRO, random_models

CONFIGS = {"sd15": MICRO, "inpainting": INPAINTING_MICRO, "sd2": SD2_MICRO, "sd2 inpainting": SD2_INPAINTING_MICRO}
CONFIGS["zero snr"] = replace(MICRO, schedule=replace(SD2_MICRO.schedule, rescale_betas_zero_snr=True))
CONFIGS["turbo"] = replace(SD2_MICRO, schedule=SD_TURBO.schedule, sampling=SD_TURBO.sampling)
CONFIGS["lcm"] = LCM_MICRO
NETWORKS = ("clip", "encoder", "decoder", "diffusion")


def assert_equal_weights(models, others):
    for name in NETWORKS:
        ours, theirs = getattr(models, name).state_dict(), getattr(others, name).state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("name", [slow(name) if name in ("sd2 inpainting", "zero snr") else name for name in CONFIGS])
def test_round_trip(tmp_path, name):
    models = random_models(CONFIGS[name])
    save_folder(models, tmp_path / "model")
    back = load_models(tmp_path / "model", "cpu", torch.float32, tuned=False)
    assert back.config == models.config
    assert_equal_weights(models, back)
    assert back.tokenizer.pad_token_id == models.tokenizer.pad_token_id
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_tiny_model(tmp_path):
    models = load_models(device="cpu", dtype=torch.float32, tuned=False)
    save_folder(models, tmp_path / "tiny")
    back = load_models(tmp_path / "tiny", "cpu", torch.float32, tuned=False)
    assert back.config == replace(TINY, sampling=replace(TINY.sampling, cfg_scale=7.5))  # it has no place for these
    assert_equal_weights(models, back)


def test_float16_and_added_words(tmp_path):
    models = random_models(MICRO)
    rows = torch.cat([models.clip.token_embedding.weight, torch.randn(1, 32)])
    models.clip.token_embedding = torch.nn.Embedding(*rows.shape, _weight=rows)
    models.config = replace(MICRO, text=replace(MICRO.text, vocab_size=49409))
    models.tokenizer = TokenizerWithWords({"<my-cat>": [49408]})
    for name in NETWORKS:
        getattr(models, name).half()
    save_folder(models, tmp_path / "model")
    back = load_models(tmp_path / "model", "cpu", torch.float16, tuned=False)
    assert back.tokenizer.encode("a <my-cat>") == [320, 49408]
    assert_equal_weights(models, back)


def test_an_empty_folder_may_exist(tmp_path):
    (tmp_path / "micro").mkdir()
    save_folder(random_models(MICRO), tmp_path / "micro")
    assert (tmp_path / "micro" / "model_index.json").is_file()


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
    models = random_models(MICRO)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="should be the name of a new folder"):
            save_folder(models, tmp_path / name)
    monkeypatch.setattr("sd.model_saver._tokenizer", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        save_folder(models, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    save_folder(models, tmp_path / "empty")
    assert json.loads(Path(tmp_path / "empty/model_index.json").read_text())["unet"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [slow("sd15"), "sd2"])
def test_diffusers_draws_the_same_image(tmp_path, name):
    diffusers = pytest.importorskip("diffusers")
    models = random_models(CONFIGS[name], seed=3)
    save_folder(models, tmp_path / "model")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "np"}
    theirs = pipe("a cat on a mat", generator=torch.Generator().manual_seed(1), **options).images[0]
    ours = generate("a cat on a mat", models=models, seed=1, sampler_name="ddim", n_inference_steps=10, cfg_scale=7.5)
    assert np.abs(ours.astype(int) - np.rint(theirs * 255)).max() <= 1
    assert ours.std() > 10
    inpainting = random_models(INPAINTING_MICRO)
    save_folder(inpainting, tmp_path / "inpainting")
    diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "inpainting", local_files_only=True)
