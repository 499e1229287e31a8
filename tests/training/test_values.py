"""The arithmetic of training against values computed by hand. A falling loss alone would not show these errors."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sd import pipeline
from sd.clip import CLIP
from sd.decoder import Decoder
from sd.encoder import Encoder
from sd.training import evaluation, samples
from sd.training.data import CaptionedImages
from sd.training.diffusion import DiffusionStage
from sd.training.loop import WARMUP, Training
from sd.training.losses import vae_loss
from sd.training.muon import Muon
from sd.training.text import TextStage
from sd.training.vae import DecoderStage, VAEStage
from tests.support.synthetic import MICRO
from tests.training.test_loop import Line


@pytest.fixture
def start():
    """Makes a `Training` of `Line` on one thread."""

    def make(folder, steps=1000, **stage):
        training = Training(Line(**stage), folder, torch.device("cpu"), 1.0, steps, seed=3)
        training.gradients.workers = 1
        return training

    return make


class Watcher:
    """Takes the place of an optimizer: records learning rates and gradient norms, and changes nothing."""

    def __init__(self, parameters):
        self.parameters, self.param_groups, self.rates, self.norms = parameters, [{"lr": 0.0}], [], []

    def step(self):
        self.rates.append(self.param_groups[0]["lr"])
        self.norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters)))

    def zero_grad(self):
        pass


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.4 / WARMUP),
        (49, 0.4 * 0.5 * (0.5 + 0.5 * math.cos(0.049 * math.pi))),
        (WARMUP, 0.4 * (0.5 + 0.5 * math.cos(0.1 * math.pi))),  # 0.39
        (500, 0.2),
        (999, 0.4 * (math.pi / 2000) ** 2),  # 1 - cos x is about x^2 / 2
    ],
)
def test_the_learning_rate_rises_and_falls(tmp_path, start, step, rate):
    training = start(tmp_path)
    training.step, training.optimizers = step, [Watcher(training.parameters), Watcher(training.parameters)]
    training._one_step()
    assert [optimizer.rates for optimizer in training.optimizers] == [[pytest.approx(rate, rel=1e-3)]] * 2


def test_the_averages_decay_is_small_at_first(tmp_path, start):
    training = start(tmp_path)
    training.stage.ema = 0.3
    expected = training.networks["line"].weight.detach().clone()
    for decay in (2 / 11, 3 / 12, 0.3, 0.3):  # (1 + k) / (10 + k) after k steps, and no more than 0.3
        training._one_step()
        expected = decay * expected + (1 - decay) * training.networks["line"].weight.detach()
        torch.testing.assert_close(training.average["line"].weight, expected)


def test_large_gradients_are_clipped_to_norm_one_and_small_ones_are_not(tmp_path, start):
    for scale, clipped in ((100.0, True), (0.0, False)):
        training = start(tmp_path, scale=scale)
        with torch.no_grad():
            for parameter in training.parameters:
                parameter *= 0.01
        (x,) = training.stage.draw(torch.Generator().manual_seed(3))
        norm = math.sqrt(sum(share.square().sum().item() for share in training.gradients.of_part((x,))[1]))
        assert (norm > 1) == clipped
        training.optimizers = [Watcher(training.parameters)]
        training._one_step()
        assert training.optimizers[0].norms == [pytest.approx(min(norm, 1.0), rel=1e-4)]


def test_muon_lets_weights_decay_by_learning_rate_times_decay():
    weight = nn.Parameter(torch.full((4, 4), 2.0))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 2.0 * 0.95))


@pytest.fixture(scope="module")
def unet_stage():
    """Stage 3 on 20 pictures with different captions."""
    torch.manual_seed(0)
    latents = torch.randn(20, 4, 8, 8), torch.ones(20, 4, 8, 8)
    tokens = [torch.full((1, 77), 1000 + i, dtype=torch.int32) for i in range(20)]
    empty = torch.full((1, 77), 49407)
    return DiffusionStage(MICRO.unet, MICRO.schedule, latents, tokens, empty, CLIP(MICRO.text), batch_size=50)


def test_the_timesteps_of_a_batch_are_spread_evenly(unet_stage):
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(100):
        timesteps = unet_stage.draw(generator)[2].sort().values
        assert ((timesteps // 20).bincount(minlength=50) == 1).all()  # one in each fiftieth of 0..999
        seen.append(timesteps)
    assert torch.cat(seen).min() == 0
    assert torch.cat(seen).max() == 999
    assert len(torch.cat(seen).unique()) > 900  # and not always the same


def test_the_unet_learns_without_a_caption_one_time_in_ten(unet_stage):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([unet_stage.draw(generator)[1] for _ in range(100)])
    dropped = (tokens == unet_stage.empty).all(dim=1).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.02)  # three deviations of 5,000 draws are 0.013


def test_the_unets_latents_are_drawn_from_the_posterior(unet_stage, monkeypatch):
    monkeypatch.setattr(unet_stage, "means", torch.full_like(unet_stage.means, 3.0))
    monkeypatch.setattr(unet_stage, "stds", torch.full_like(unet_stage.stds, 0.5))
    latents = unet_stage.draw(torch.Generator().manual_seed(0))[0]
    assert latents.mean().item() == pytest.approx(3, abs=0.02)
    assert latents.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("timestep", [0, 100, 200, 500, 999])
def test_the_unets_loss_is_weighted_by_the_root_of_min_snr_5(unet_stage, timestep):
    """w_t = min(SNR(t), 5)^0.5 / SNR(t); in 2303.09556, eq. 1, the power is 1. An untrained U-Net predicts 0, so
    that its squared error is the mean square of the noise."""
    betas = np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2
    a_t = np.prod(1 - betas[: timestep + 1])
    snr = a_t / (1 - a_t)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(timestep))
    tokens, timesteps = torch.full((2, 77), 49407), torch.full((2,), timestep)
    with torch.no_grad():
        loss = unet_stage.loss(torch.randn_like(noise), tokens, timesteps, noise).item()
    assert loss == pytest.approx(min(snr, 5) ** 0.5 / snr * noise.square().mean().item(), rel=1e-3)


def pictures(count):
    """Images of different greys."""
    greys = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return CaptionedImages(np.broadcast_to(greys, (count, 64, 64, 3)), [[str(i)] for i in range(count)])


def test_a_batch_of_the_text_stage_has_no_picture_twice():
    tokens = [torch.full((1, 77), i, dtype=torch.int32) for i in range(24)]
    stage, generator = TextStage(MICRO.text, pictures(24), tokens, batch_size=16), torch.Generator().manual_seed(0)
    for _ in range(5):
        images, captions = stage.draw(generator)
        assert len(images) == 16
        assert len(images[:, 0, 0, 0].unique()) == 16
        assert torch.equal(images[:, 0, 0, 0].int(), captions[:, 0])  # and each has its own caption


def test_the_decoder_stage_uses_samples_of_the_posterior():
    torch.manual_seed(0)
    encoder, decoder = Encoder(MICRO.vae), Decoder(MICRO.vae)
    with torch.no_grad():
        encoder.quant_conv.bias[4:] += 2  # a wide posterior
    stage = DecoderStage(VAEStage(MICRO.vae, pictures(8), batch_size=2), encoder, decoder)
    images, noise = stage.draw(torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(1, abs=0.2)
    with torch.no_grad():
        mean, log_variance = encoder.moments(images)
        latents = (mean + (log_variance / 2).exp() * noise) * MICRO.vae.scaling_factor
        assert stage.loss(images, noise).item() == pytest.approx(vae_loss(images, decoder(latents)).item(), rel=1e-4)
        assert stage.loss(images, noise).item() != pytest.approx(stage.loss(images, 0 * noise).item(), rel=1e-3)


def test_every_image_of_an_evaluation_has_its_own_seed(monkeypatch):
    """Images are generated in batches of 32, and image i has seed i."""
    drawn = []

    def noise(shape, generators):
        drawn.extend(generator.initial_seed() for generator in generators)
        return torch.zeros(shape)

    monkeypatch.setattr(pipeline, "draw_noise", noise)
    monkeypatch.setattr(samples, "denoise", lambda models, latents, *_, **__: [])
    monkeypatch.setattr(samples, "encode_prompt", lambda *_, **__: None)
    monkeypatch.setattr(samples, "decode_latents", lambda models, latents: np.zeros((len(latents), 2, 2, 3), np.uint8))
    networks = SimpleNamespace(config=MICRO, diffusion=torch.nn.Linear(1, 1))
    assert len(evaluation.draw_prompts(networks, ["a house"] * 70, "ddim", 2, 1.0)) == 70
    assert drawn == list(range(70))
