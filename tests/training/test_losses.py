"""Each loss against a value computed by hand."""

import math

import pytest
import torch

from sd.encoder import sample_posterior
from sd.training.losses import (
    contrastive_loss,
    diffusion_loss,
    diffusion_target,
    drop_captions,
    kl_to_standard_normal,
    offset_noise,
    vae_loss,
)


@pytest.mark.parametrize(
    "mean, variance, divergence",
    [(0.0, 1.0, 0.0), (2.0, 1.0, 2.0), (0.0, math.e, 0.5 * (math.e - 2)), (1.0, 0.25, 0.5 * (0.25 + math.log(4)))],
)
def test_divergence_from_the_standard_normal(mean, variance, divergence):
    moments = torch.full((2, 4, 3, 3), mean), torch.full((2, 4, 3, 3), math.log(variance))
    assert kl_to_standard_normal(*moments).item() == pytest.approx(divergence, abs=1e-6)


def test_vae_loss_of_a_perfect_copy_is_its_divergence():
    image = torch.rand(1, 3, 8, 8)
    loss = vae_loss(image, image, torch.full((1, 4, 1, 1), 2.0), torch.zeros(1, 4, 1, 1), kl_weight=0.1)
    assert loss.item() == pytest.approx(0.1 * 2.0)


def test_vae_loss_adds_squares_magnitudes_and_edges():
    image, decoded = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.5, 0.5], [-0.5, -0.5]]]])
    zero = torch.zeros(1, 4, 1, 1)
    # square 0.25, magnitude 0.5; neighbours in a row are equal, those in a column differ by 1
    loss = vae_loss(image, decoded, zero, zero, square_weight=8, edge_weight=0.5).item()
    assert loss == pytest.approx(8 * 0.25 + 0.5 + 0.5 * 1.0)


def test_the_posterior_sample_passes_gradients_to_both_moments():
    mean, log_variance = torch.tensor([1.0], requires_grad=True), torch.tensor([math.log(4.0)], requires_grad=True)
    z = sample_posterior(mean, log_variance, torch.tensor([3.0]))
    z.backward()
    assert z.item() == pytest.approx(1 + 2 * 3)
    assert mean.grad.item() == 1
    assert log_variance.grad.item() == pytest.approx(0.5 * 2 * 3)


def test_contrastive_loss_of_two_pairs():
    images = torch.tensor([[3.0, 0.0], [0.0, 0.5]])  # lengths do not matter
    texts = torch.eye(2)
    loss = contrastive_loss(images, texts, torch.tensor(math.log(2.0)))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)


def test_contrastive_loss_is_the_mean_of_both_directions():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # both captions fit the first picture
    logits = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    rows = math.log(2)
    columns = 0.5 * ((math.log(math.e + 1) - logits[0, 0]) + (math.log(math.e + 1) - logits[1, 1]))
    loss = contrastive_loss(images, texts, torch.tensor(0.0))
    assert loss.item() == pytest.approx(0.5 * (rows + columns.item()), rel=1e-5)


def test_contrastive_scale_is_at_most_100():
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert contrastive_loss(images, texts, torch.tensor(50.0)).item() == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("chance, dropped", [(0.0, 0), (1.0, 8)])
def test_captions_are_dropped(chance, dropped):
    tokens = drop_captions(torch.ones(8, 77), torch.zeros(1, 77), chance)
    assert (tokens == 0).all(dim=1).sum() == dropped


def test_a_tenth_of_the_captions_is_dropped():
    tokens = drop_captions(torch.ones(4000, 1), torch.zeros(1, 1), 0.1, torch.Generator().manual_seed(0))
    assert 0.08 < (tokens == 0).float().mean() < 0.12


def test_targets():
    a_t = torch.full((1, 1, 1, 1), 0.36)
    latents, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 5.0)
    assert diffusion_target(latents, noise, a_t, "epsilon").item() == 5
    assert diffusion_target(latents, noise, a_t, "v_prediction").item() == pytest.approx(0.6 * 5 - 0.8 * 2)


ALPHAS = torch.tensor([0.8, 0.36])


def loss_of(prediction, prediction_type="epsilon", min_snr=None, timestep=1, snr_power=1.0):
    """The loss for x_0 = 2, noise 5 and this prediction, and the noisy latent."""
    seen = []

    def unet(noisy, context, timesteps):
        seen.append(noisy)
        return torch.full_like(noisy, prediction)

    latents, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 5.0)
    context, timesteps = torch.zeros(1, 77, 4), torch.tensor([timestep])
    loss = diffusion_loss(unet, latents, context, timesteps, noise, ALPHAS, prediction_type, min_snr, snr_power)
    return loss.item(), seen[0].item()


def test_diffusion_loss_is_the_squared_error_of_the_noise():
    loss, noisy = loss_of(4.0)
    assert noisy == pytest.approx(0.6 * 2 + 0.8 * 5)  # 2006.11239, eq. 4
    assert loss == pytest.approx(1.0)


def test_diffusion_loss_of_velocity():
    assert loss_of(0.0, "v_prediction")[0] == pytest.approx((0.6 * 5 - 0.8 * 2) ** 2)


@pytest.mark.parametrize(
    "prediction_type, weight",
    [("epsilon", 2 / 4), ("v_prediction", 2 / 5)],  # SNR = 0.8 / 0.2 = 4
)
def test_min_snr_weighs_clean_pictures_less(prediction_type, weight):
    plain = loss_of(0.0, prediction_type, timestep=0)[0]
    assert loss_of(0.0, prediction_type, min_snr=2.0, timestep=0)[0] == pytest.approx(weight * plain)


def test_min_snr_leaves_noisy_pictures_alone():
    assert loss_of(0.0, min_snr=5.0)[0] == pytest.approx(loss_of(0.0)[0])


@pytest.mark.parametrize("prediction_type, below", [("epsilon", 0), ("v_prediction", 1)])
@pytest.mark.parametrize("timestep, snr", [(0, 0.8 / 0.2), (1, 0.36 / 0.64)])
def test_a_power_below_1_weighs_noisy_pictures_more(prediction_type, below, timestep, snr):
    plain = loss_of(0.0, prediction_type, timestep=timestep)[0]
    loss = loss_of(0.0, prediction_type, 2.0, timestep, snr_power=0.5)[0]
    assert loss == pytest.approx(min(snr, 2.0) ** 0.5 / (snr + below) * plain)


def test_offset_noise_moves_each_channel_of_each_picture_as_a_whole():
    noise = torch.randn(3, 4, 5, 6)
    moved = offset_noise(noise, 0.1, torch.Generator().manual_seed(7)) - noise
    offsets = 0.1 * torch.randn(3, 4, 1, 1, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(moved, offsets.expand(3, 4, 5, 6))
    assert torch.equal(offset_noise(noise, 0.0), noise)


def test_offset_noise_has_more_variance():
    """e and o are independent: the variance of e + s o is 1 + s^2."""
    generator = torch.Generator().manual_seed(0)
    noise = offset_noise(torch.randn(4000, 4, 2, 2, generator=generator), 0.5, generator)
    assert noise.var().item() == pytest.approx(1.25, abs=0.03)
