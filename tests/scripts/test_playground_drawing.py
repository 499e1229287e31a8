"""What the playground's worker draws: the pictures of `generate`, with LoRAs, ControlNets and embeddings of data/."""

import argparse
import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.playground.drawing import Stopped, Studio, hear_warnings
from scripts.playground.limits import Limits
from scripts.playground.questions import QUESTIONS, about
from scripts.support.defaults import with_defaults
from sd import generate
from sd.adapters.control import Control
from sd.checkpoints.files import write_checkpoint
from sd.config import SD15
from sd.inside.recording import record
from sd.pipeline import decode_latents
from sd.request import Request
from tests.support import synthetic_embeddings
from tests.support.control import cldm_state, random_controlnet
from tests.support.synthetic import FEW_LAYERS, random_models
from tests.support.tiny_autoencoders import random_tiny_autoencoder

SMALL = {"width": 32, "height": 40, "n_inference_steps": 2, "sampler_name": "euler", "seed": 3}


@pytest.fixture(scope="module")
def studio():
    options = argparse.Namespace(checkpoint=Path("micro.ckpt"), vae=None)
    return Studio(random_models(FEW_LAYERS), options, Limits())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder in the place of data/."""
    monkeypatch.setattr("sd.files.DATA", tmp_path)
    for name in ("loras", "controls", "embeddings"):
        (tmp_path / name).mkdir()
    return tmp_path


def draw(studio, stop=lambda: None, **work):
    """The events of a picture."""
    events = []
    studio.draw(SMALL | {"previews": "none"} | work, lambda name, data: events.append((name, data)), stop)
    json.dumps(events, allow_nan=False)
    return events


def pixels(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def picture(seed=0, size=(32, 40)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def url(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_pictures_are_those_of_generate_also_when_they_are_watched(studio):
    expected = generate("a house", models=studio.models, **SMALL)
    for watched in ({}, {"previews": "full", "attention": True, "features": True}):
        events = draw(studio, prompt="a house", **watched)
        assert np.array_equal(pixels(events[-1][1]["images"][0]), expected)
    assert [name for name, _ in events] == ["started", "step", "predicted", "step", "predicted", "done"]
    assert len(events[-1][1]["features"]) == 2


def test_a_decoder_for_previews(studio):
    """SD 1.5's own decoder takes longer than a step. With --preview, each step has a predicted picture."""
    models = replace(studio.models, config=replace(FEW_LAYERS, vae=SD15.vae))
    decoder = random_tiny_autoencoder()["decoder"]
    without = draw(Studio(models, studio.options, Limits()), prompt="a house", previews="full")
    events = draw(Studio(models, studio.options, Limits(), decoder), prompt="a house", previews="full")
    assert [name for name, _ in without] == ["started", "step", "step", "done"]
    assert [name for name, _ in events] == ["started", "step", "predicted", "step", "predicted", "done"]
    assert events[-1][1]["images"] == without[-1][1]["images"]  # which the model's own decoder decoded
    latents = record(with_defaults(Request("a house", **SMALL), models), models).moments[0].denoised
    expected = decode_latents(replace(models, decoder=decoder), latents)[0]
    assert np.array_equal(pixels(events[2][1]["image"]), expected)


def test_two_passes_can_be_watched(studio):
    more = {"hires_scale": 2, "hires_strength": 0.5, "clip_skip": 2, "freeu": [1.5, 1.6, 0.9, 0.2]}
    events = draw(studio, prompt="a house", previews="full", attention=True, features=True, **more)
    assert [data["pass"] for name, data in events if name == "started"] == [1, 2]
    done = events[-1][1]
    assert (done["width"], done["height"]) == (64, 80)
    assert {one["pass"] for one in done["features"]} == {1, 2}
    assert len(done["attention"]["tokens"]) == 4
    assert np.array_equal(pixels(done["images"][0]), generate("a house", models=studio.models, **SMALL, **more))


@pytest.mark.slow
@pytest.mark.parametrize("invert", [False, True])
def test_masks(studio, invert):
    mask = np.zeros((40, 32), np.uint8)
    mask[10:30, 8:24] = 255
    image = picture()
    sent = {"input_image": url(image), "mask_image": url(Image.fromarray(mask)), "invert_mask": invert}
    done = draw(studio, prompt="a house", **sent)[-1][1]
    used = 255 - mask if invert else mask
    expected = generate("a house", input_image=image, mask_image=Image.fromarray(used), models=studio.models, **SMALL)
    assert np.array_equal(pixels(done["images"][0]), expected)


@pytest.mark.slow
def test_controlnets_by_their_names(studio, data):
    write_checkpoint(data / "controls/canny.pth", cldm_state(random_controlnet(FEW_LAYERS.unet)))
    net = {"net": "canny", "image": url(picture(1)), "strength": 0.5}
    done = draw(studio, prompt="a house", control=[net])[-1][1]
    control = [Control(data / "controls/canny.pth", picture(1), 0.5)]
    expected = generate("a house", control=control, models=studio.models, **SMALL)
    assert np.array_equal(pixels(done["images"][0]), expected)
    assert "ControlNet 0: " in done["parameters"]
    assert draw(studio, prompt="a house", control=[net])[-1][1]["images"] == done["images"]
    assert [one["name"] for one in QUESTIONS["files"](studio, {})["controls"]] == ["canny"]


@pytest.mark.slow
def test_embeddings_that_prompts_name(studio, data):
    synthetic_embeddings.write(data / "embeddings/cat.pt", "web ui", synthetic_embeddings.vectors())
    plain = draw(studio, prompt="a dog")[-1][1]
    done = draw(studio, prompt="a cat")[-1][1]
    assert any("is the embedding in" in note for note in done["notes"])
    assert "TI hashes" in done["parameters"]
    assert done["images"] != plain["images"]
    listed = QUESTIONS["embeddings"](studio, {})
    assert listed["loaded"]["cat"]["vectors"] == 3


def test_stopping(studio):
    """Dropped between two steps; or finished with what there is."""
    asked = iter([None, "drop"])
    events = []
    work = SMALL | {"prompt": "a house", "n_inference_steps": 9, "previews": "none"}
    with pytest.raises(Stopped):
        studio.draw(work, lambda *event: events.append(event), lambda: next(asked))
    assert [name for name, _ in events] == ["started", "step"]
    asked = iter([None, "finish"])
    finished = draw(studio, lambda: next(asked), prompt="a house", n_inference_steps=9)
    assert [name for name, _ in finished] == ["started", "step", "step", "done"]
    assert finished[-1][1]["interrupted"]


@pytest.mark.slow
def test_warnings_are_notes_of_their_own_picture(studio, monkeypatch):
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        hear_warnings()
        mask = url(Image.new("L", (32, 40)))
        events = draw(studio, prompt="a house", input_image=url(picture()), mask_image=mask)
        assert events[-1][1]["notes"][0].startswith("mask_image is black everywhere")
        assert draw(studio, prompt="a house")[-1][1]["notes"] == []


def test_what_is_said_about_the_model(studio):
    said = about(studio)
    json.dumps(said, allow_nan=False)
    assert (said["model"], said["file"], said["tiny"], said["fast"]) == ("micro", "micro.ckpt", False, False)
    assert len(said["schedule"]["alphas_cumprod"]) == 101
    labels = {one["name"]: one["label"] for one in said["samplers"]}
    assert labels["dpm++2m_karras"] == "DPM++ 2M Karras"


def test_tokens(studio):
    answer = QUESTIONS["tokens"](studio, {"prompt": "a (lighthouses:1.5) BREAK café <lora:x:0.5>"})
    texts = [[piece["text"] for piece in chunk] for chunk in answer["chunks"]]
    assert texts == [["a", "ligh", "thou", "ses"], ["café"]]
    assert [piece["joined"] for piece in answer["chunks"][0]] == [False, False, True, True]
    assert (answer["count"], answer["room"]) == (5, 75)
    assert answer["loras"] == [{"name": "x", "strength": 0.5}]
    assert answer["chunks"][0][1]["weight"] == 1.5
    with pytest.raises(ValueError, match="brackets in pairs"):
        QUESTIONS["tokens"](studio, {"prompt": "(a"})
