"""FreeU against diffusers' U-Net with equal weights, and by its definition."""

from threading import Thread

import numpy as np
import pytest
import torch

from sd import generate
from sd.adapters.freeu import FreeU, scale_low_frequencies
from sd.model_converter import to_compvis
from tests.support.synthetic import MICRO, SD2_MICRO, random_models

FACTORS = (1.5, 1.6, 0.9, 0.2)


@pytest.mark.parametrize("config", [MICRO, SD2_MICRO], ids=["sd1", "sd2"])
@pytest.mark.parametrize("height, width", [(8, 8), (24, 40)])
@torch.no_grad()
def test_the_unet_is_that_of_diffusers(config, height, width):
    reference = pytest.importorskip("tests.parity.reference")
    models = random_models(config)
    theirs = reference.unet(config, to_compvis(models))
    b1, b2, s1, s2 = FACTORS
    theirs.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
    latents, context = torch.randn(2, 4, height, width), torch.randn(2, 77, config.unet.context_width)
    timesteps = torch.tensor([7, 800])
    expected = theirs(latents, timesteps, context).sample
    plain = models.diffusion(latents, context, timesteps)
    actual = FreeU(models.diffusion, FACTORS, models.diffusion)(latents, context, timesteps)
    assert (actual - expected).abs().max() <= 2e-5 < (plain - expected).abs().max()
    assert torch.equal(models.diffusion(latents, context, timesteps), plain)  # nothing stays behind


def test_factors_of_one_change_nothing():
    models = random_models(MICRO)
    settings = {"models": models, "n_inference_steps": 2, "seed": 1, "height": 64, "width": 64}
    plain = generate("a cat", **settings)
    assert np.abs(generate("a cat", freeu=(1, 1, 1, 1), **settings).astype(int) - plain).max() <= 1
    assert np.abs(generate("a cat", freeu=FACTORS, **settings).astype(int) - plain).max() > 1


@pytest.mark.parametrize("height, width", [(8, 8), (3, 5), (1, 1), (2, 7)])
def test_the_four_lowest_frequencies(height, width):
    """By the definition of the Fourier transform: sum_yx h exp(-2 pi i (u y / H + v x / W))."""
    h = torch.randn(1, 2, height, width, dtype=torch.float64)
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    expected = h.to(torch.complex128)
    for u, v in {(u % height, v % width) for u in (-1, 0) for v in (-1, 0)}:
        wave = torch.exp(2j * torch.pi * (u * y + v * x))  # (H, W)
        part = (h * wave.conj()).sum((2, 3), keepdim=True) * wave / (height * width)
        expected = expected + (0.2 - 1) * part
    torch.testing.assert_close(scale_low_frequencies(h.float(), 0.2).double(), expected.real, rtol=0, atol=1e-5)


@torch.no_grad()
def test_another_thread_uses_the_same_unet():
    """It draws without FreeU, while this one is in the middle of the U-Net."""
    models, others = random_models(MICRO), []
    arguments = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.tensor([500])
    plain, expected = models.diffusion(*arguments), FreeU(models.diffusion, FACTORS, models.diffusion)(*arguments)

    def call(*arguments):
        thread = Thread(target=lambda: others.append(models.diffusion(*arguments)))
        thread.start()
        thread.join()
        return models.diffusion(*arguments)

    assert torch.equal(FreeU(models.diffusion, FACTORS, call)(*arguments), expected)
    assert torch.equal(others[0], plain)
    assert not torch.equal(expected, plain)


def test_compiled_models_are_refused(monkeypatch):
    models = random_models(MICRO)
    models.diffusion._compiled_call_impl = models.diffusion.forward
    with pytest.raises(ValueError, match=r"^freeu should be None for compiled models"):
        generate("a cat", models=models, n_inference_steps=1, freeu=FACTORS)
