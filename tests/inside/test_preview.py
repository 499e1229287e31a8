"""Latent previews: the known map for SD 1.x, and the map fitted to other decoders."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sd.config import SD15
from sd.images import image_to_tensor
from sd.inside.preview import SD15_PREVIEW, Preview, fit, preview_for
from sd.model_loader import TINY_CHECKPOINT, load_models
from sd.training.world.render import render
from sd.training.world.scenes import scene_and_captions
from tests.support.synthetic import MICRO, random_models


class LinearDecoder(nn.Module):
    """Images that are a linear function of the latents, enlarged eight times; optionally squared, or with noise."""

    def __init__(self, noise: float = 0.0, curved: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.post_quant_conv = nn.Conv2d(4, 3, 1)
        self.post_quant_conv.weight.data = torch.randn(3, 4, 1, 1, generator=generator) / 4
        self.post_quant_conv.bias.data = torch.tensor([0.1, 0, -0.2])
        self.noise, self.curved = noise, curved

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        pictures = F.interpolate(self.post_quant_conv(latents), scale_factor=8)
        pictures = pictures.square() if self.curved else pictures
        return pictures + self.noise * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))


def r_squared(preview: Preview, decoder: nn.Module, latents: torch.Tensor) -> float:
    """The share of the variance of the decoder's images that the preview explains, at one pixel for each latent."""
    with torch.no_grad():
        pixels = F.avg_pool2d(decoder(latents).float(), 8)
        error = F.conv2d(latents, preview.weight[:, :, None, None], preview.bias) - pixels
    return 1 - (error.square().sum() / (pixels - pixels.mean((0, 2, 3), keepdim=True)).square().sum()).item()


def test_the_known_factors_of_sd15():
    latents = torch.zeros(5, 4, 1, 1)
    latents[range(4), range(4)] = 0.5
    pictures = SD15_PREVIEW(latents)
    factors = SD15_PREVIEW.weight.T * 0.5
    expected = np.rint((factors.numpy() + 1) * 127.5)
    assert np.array_equal(pictures[:4, 0, 0], expected)
    assert pictures[4, 0, 0].tolist() == [128, 128, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_pixel_a_latent(dtype):
    latents = torch.randn(3, 4, 5, 7).to(dtype)
    pictures = SD15_PREVIEW(latents)
    assert pictures.shape == (3, 5, 7, 3)
    assert pictures.dtype == np.uint8
    assert np.array_equal(pictures[1:2], SD15_PREVIEW(latents[1:2]))


def test_quick_enough_for_every_step():
    latents = torch.randn(1, 4, 64, 64)
    SD15_PREVIEW(latents)
    started = time.process_time()
    for _ in range(20):
        SD15_PREVIEW(latents)
    assert (time.process_time() - started) / 20 < 0.01  # 0.3 ms where nothing else runs


def test_a_linear_decoder_is_found_exactly():
    decoder = LinearDecoder()
    preview = fit(decoder)
    torch.testing.assert_close(preview.weight, decoder.post_quant_conv.weight.data[..., 0, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(preview.bias, decoder.post_quant_conv.bias.data, rtol=0, atol=1e-5)


def test_noise_is_averaged_out():
    held_out = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    assert r_squared(fit(LinearDecoder(noise=0.3)), LinearDecoder(), held_out) > 0.99


def test_the_fit_uses_the_given_latents():
    """If the decoder is not linear, a fit to latents similar to the previewed ones is better than any other."""
    decoder = LinearDecoder(curved=True)
    blocks = 1 + 0.3 * torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    latents = F.interpolate(blocks, scale_factor=4)
    given, held_out = latents[:4], latents[4:]
    assert r_squared(fit(decoder, given), decoder, held_out) > 0.8
    assert r_squared(fit(decoder), decoder, held_out) < 0.5


@pytest.mark.skipif(not TINY_CHECKPOINT.exists(), reason="needs the tiny model")
def test_the_fit_to_the_tiny_model_holds_for_pictures_it_has_not_seen():
    models = load_models(device="cpu", dtype=torch.float32)
    scenes = [render(scene_and_captions(seed)[0], seed) for seed in range(6)]
    pictures = torch.cat([image_to_tensor(scene, 128, 128) for scene in scenes])
    with torch.no_grad():
        latents = models.encoder(pictures)
    given, held_out = latents[:2], latents[2:]
    assert r_squared(fit(models.decoder), models.decoder, held_out) > 0.7
    assert r_squared(fit(models.decoder, given), models.decoder, held_out) > 0.7


def test_each_model_has_its_own_preview():
    models = random_models(MICRO)
    preview, again = preview_for(models), fit(models.decoder)
    torch.testing.assert_close(preview.weight, again.weight)  # the random latents are always the same
    models.config = SD15
    assert preview_for(models) is SD15_PREVIEW


@pytest.mark.slow
def test_a_decoder_in_bfloat16():
    decoder = random_models(MICRO).decoder
    expected = fit(decoder)
    preview = fit(decoder.to(torch.bfloat16))
    assert preview.weight.dtype == torch.float32
    torch.testing.assert_close(preview.weight, expected.weight, rtol=0, atol=0.02)


def test_fewer_latents_than_unknowns_are_allowed():
    decoder = LinearDecoder()
    latents = torch.ones(1, 4, 1, 1)
    picture = fit(decoder, latents)(latents)
    expected = np.rint((decoder(latents)[0, :, 0, 0].detach().clamp(-1, 1).numpy() + 1) * 127.5)
    assert np.abs(picture[0, 0, 0] - expected).max() <= 1
