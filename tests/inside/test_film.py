"""Films of the denoising: the last frame is the image that `generate` makes."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sd import generate, pipeline
from sd.config import SD15
from sd.inside import recording
from sd.inside.film import frames
from sd.inside.recording import record
from sd.request import Request
from tests.support.synthetic import INPAINTING_MICRO, MICRO, random_models

OPTIONS = {"seed": 3, "n_inference_steps": 3, "height": 32, "width": 40}
PICTURE = Image.new("RGB", (40, 32), "red")


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def half_mask() -> Image.Image:
    mask = Image.new("L", (40, 32))
    mask.paste(255, (0, 0, 20, 32))
    return mask


@pytest.mark.parametrize(
    "more", [{}, {"input_image": PICTURE, "strength": 0.7, "sampler_name": "ddpm", "cfg_scale": 2}]
)
def test_it_ends_with_the_picture_that_generate_makes(models, more):
    film = frames(record(Request("a cat", "a dog", **OPTIONS, **more), models))
    assert len(film) == (3 if more else 4)
    assert all(frame.shape == (32, 40, 3) and frame.dtype == np.uint8 for frame in film)
    assert np.array_equal(film[-1], generate("a cat", "a dog", models=models, **OPTIONS, **more))
    assert not np.array_equal(film[0], film[1])


@pytest.mark.parametrize("config", [MICRO, INPAINTING_MICRO])
def test_inpainting_keeps_what_stays_in_every_frame(config):
    models = random_models(config)
    more = {"input_image": PICTURE, "mask_image": half_mask(), "feather": 4}
    film = frames(record(Request("a cat", **OPTIONS, **more), models))
    assert np.array_equal(film[-1], generate("a cat", models=models, **OPTIONS, **more))
    for frame in film:
        assert (frame[:, 20:] == (255, 0, 0)).all()
        assert (frame[:, :16] != (255, 0, 0)).any()


def test_frames_are_the_predicted_pictures(models):
    film = frames(record(Request("a cat", **OPTIONS), models))
    generators = pipeline.make_generators(3, 1)
    sampler = pipeline.SAMPLERS["dpm++2m"](generators, schedule=models.config.schedule)
    sampler.set_inference_timesteps(3)
    latents = pipeline.get_latents(models, 1, 32, 40, generators)
    for step in pipeline.denoise(models, latents, pipeline.encode_prompt(models, "a cat"), sampler):
        assert np.array_equal(film[step.index], pipeline.decode_latents(models, step.denoised)[0])


def test_large_decoders_run_once(models, monkeypatch):
    models = replace(models, config=replace(MICRO, vae=SD15.vae))
    calls = []
    decode = pipeline.decode_latents
    monkeypatch.setattr(pipeline, "decode_latents", lambda *args: calls.append(1) or decode(*args))
    film = frames(record(Request("a cat", **OPTIONS), models))
    assert len(calls) == 1
    assert [frame.shape for frame in film] == [(32, 40, 3)] * 4


@pytest.mark.parametrize("steps, count", [(2, 3), (3, 4), (4, 4), (7, 4)])
def test_long_runs_have_no_more_frames(models, monkeypatch, steps, count):
    monkeypatch.setattr(recording, "MAX_MOMENTS", 3)
    options = {"n_inference_steps": steps, "height": 8, "width": 8, "seed": 0}
    assert len(frames(record(Request("a cat", **options), models))) == count  # at most 3 steps, and the picture
