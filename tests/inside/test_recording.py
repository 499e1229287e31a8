"""Recordings: the image is the one that `generate` makes, and the moments are its steps."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from sd import generate, pipeline
from sd.inside import recording
from sd.inside.recording import peak_memory, record
from sd.request import Request
from tests import ROOT
from tests.support.synthetic import MICRO, random_models

OPTIONS = {"seed": 3, "n_inference_steps": 3, "height": 32, "width": 40}


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"do_cfg": False},
        {"cfg_scale": 2.0, "cfg_rescale": 0.5, "sampler_name": "euler_a"},
        {"deep_cache": 2},
    ],
)
def test_the_image_is_that_of_generate(models, more):
    recorded = record(Request("a cat", "a dog", **OPTIONS, **more), models)
    assert np.array_equal(recorded.image, generate("a cat", "a dog", models=models, **OPTIONS, **more))
    assert (recorded.moments[0].noise_uncond is None) == ("do_cfg" in more)
    assert [moment.index for moment in recorded.moments] == [0, 1, 2]


def test_no_negative_prompt_is_the_empty_one(models):
    recorded = record(Request("a cat", None, **OPTIONS), models)
    assert recorded.uncond_prompt == ""
    assert np.array_equal(recorded.image, generate("a cat", models=models, **OPTIONS))


def test_lists_of_one_prompt_are_recorded_as_its_texts(models):
    recorded = record(Request(["a cat"], ("a dog",), **OPTIONS), models)
    assert (recorded.prompt, recorded.uncond_prompt) == ("a cat", "a dog")


def test_moments_are_what_the_unet_saw(models):
    seen = []
    handle = models.diffusion.register_forward_pre_hook(lambda _, args: seen.append(args[0][:1].clone()))
    try:
        recorded = record(Request("a cat", **OPTIONS), models)
    finally:
        handle.remove()
    for moment, latents in zip(recorded.moments, seen, strict=True):
        assert torch.equal(moment.latents, latents)
    generators = pipeline.make_generators(3, 1)
    assert torch.equal(recorded.moments[0].latents, pipeline.get_latents(models, 1, 32, 40, generators))
    for moment in recorded.moments:
        noise = moment.noise_uncond + 7.5 * (moment.noise_cond - moment.noise_uncond)
        denoised, _ = recorded.sampler.predict(torch.tensor(moment.timestep), moment.latents, noise)
        torch.testing.assert_close(moment.denoised, denoised)


@pytest.mark.parametrize("steps, kept", [(1, [0]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])])
def test_the_number_of_moments_is_limited(models, monkeypatch, steps, kept):
    monkeypatch.setattr(recording, "MAX_MOMENTS", 4)
    recorded = record(Request("a cat", **OPTIONS | {"n_inference_steps": steps, "height": 8, "width": 8}), models)
    assert [moment.index for moment in recorded.moments] == kept
    timesteps = [moment.timestep for moment in recorded.moments]
    assert all(later < earlier for earlier, later in pairwise(timesteps))


def test_costs(models):
    costs = record(Request("a cat", **OPTIONS), models).costs
    assert list(costs) == ["encode_prompt", "prepare", "denoise", "decode_latents"]
    for cost in costs.values():
        assert 0 <= cost.seconds < 100
        assert cost.peak > 50 << 20  # torch alone is more
    assert costs["denoise"].seconds > costs["prepare"].seconds


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_peaks_are_those_of_each_part():
    code = (
        "import torch; from types import SimpleNamespace; from sd.inside.recording import _measured\n"
        "costs, models = {}, SimpleNamespace(device=torch.device('cpu'))\n"
        "for name, size in (('small', 1), ('large', 200), ('after', 1)):\n"
        "    with _measured(costs, name, models):\n"
        "        torch.ones(size << 18)\n"
        "small, large, after = (costs[name].peak >> 20 for name in costs)\n"
        "assert 150 < large - small < 250, costs\n"
        "assert large - after > 150, costs\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_peaks_without_proc(monkeypatch, tmp_path):
    known = peak_memory(torch.device("cpu"))
    monkeypatch.setattr(recording, "STATUS", tmp_path / "none")
    assert peak_memory(torch.device("cpu")) > known / 2
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory(torch.device("cpu")) is None


def test_bad_input_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(recording, "load_models", lambda: pytest.fail("loaded before checking"))
    with pytest.raises(ValueError, match="strength should be a number above 0 and at most 1, not 2."):
        record(Request("a cat", strength=2))
    with pytest.raises(ValueError, match="input_image should be given with mask_image"):
        record(Request("a cat", mask_image=np.zeros((8, 8), dtype=np.uint8)))
    with pytest.raises(ValueError, match="cfg_scale should be a number"):
        record(Request("a cat", cfg_scale="much"))
    with pytest.raises(ValueError, match="prompt should be one text to be recorded, not 2."):
        record(Request(["a cat", "a dog"]))
    with pytest.raises(ValueError, match="models should be what load_models returns"):
        record(Request("a cat"), "tiny.ckpt")
