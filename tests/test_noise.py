"""The forward process: the noise schedule, spacings of timesteps, seeds."""

import pytest
import torch

from sd.config import ScheduleConfig
from sd.ddpm import DDPMSampler
from sd.noise import add_noise, draw_noise, karras_sigmas, make_betas, make_generators, space_timesteps


def test_betas_are_linear_in_their_square_root():
    betas = make_betas(ScheduleConfig())
    assert betas.shape == (1000,)
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([0.00085, 0.012]))
    gaps = betas.sqrt().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(999), rtol=0, atol=1e-7)


def test_linear_betas():
    gaps = make_betas(ScheduleConfig(beta_schedule="linear")).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(999), rtol=0, atol=1e-8)


def test_bad_schedule():
    with pytest.raises(ValueError, match="beta_schedule should be"):
        DDPMSampler(schedule=ScheduleConfig(beta_schedule="cosine"))
    with pytest.raises(ValueError, match="prediction_type should be"):
        DDPMSampler(schedule=ScheduleConfig(prediction_type="sample"))


@pytest.mark.parametrize(
    "spacing, n, offset, timesteps",
    [
        ("leading", 4, 0, [750, 500, 250, 0]),
        ("leading", 4, 1, [751, 501, 251, 1]),
        ("leading", 3, 1, [667, 334, 1]),
        ("leading", 1, 1, [1]),
        ("trailing", 4, 0, [999, 749, 499, 249]),
        ("trailing", 3, 0, [999, 666, 332]),
        ("trailing", 1, 0, [999]),
        ("linspace", 4, 0, [999, 666, 333, 0]),
        ("linspace", 3, 0, [999, 499.5, 0]),
        ("linspace", 1, 0, [0]),
    ],
)
def test_spacing(spacing, n, offset, timesteps):
    assert space_timesteps(n, 1000, spacing, offset).tolist() == timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_spacing_can_visit_every_timestep(spacing):
    assert space_timesteps(1000, 1000, spacing, 1).tolist() == list(range(999, -1, -1))


def test_bad_spacing():
    with pytest.raises(ValueError, match='spacing should be "leading", "trailing" or "linspace", not \'log\'.'):
        space_timesteps(10, 1000, "log")


def test_karras_sigmas():
    """2206.00364, eq. 5, by hand: the middle of three is the mean of the seventh roots."""
    sigmas = karras_sigmas(3, 128.0, 1.0)
    assert sigmas.tolist() == pytest.approx([128, 1.5**7, 1])
    assert karras_sigmas(1, 128.0, 1.0).tolist() == pytest.approx([128])


def test_a_generator_per_image_gives_what_it_gives_alone():
    together = draw_noise((3, 4, 8, 8), [torch.Generator().manual_seed(s) for s in (5, 6, 7)])
    alone = draw_noise((1, 4, 8, 8), torch.Generator().manual_seed(6))
    assert torch.equal(together[1:2], alone)
    with pytest.raises(ValueError, match="generator should have 3 generators, one per image, not 1"):
        draw_noise((3, 4, 8, 8), [torch.Generator()])


def test_without_a_seed_every_run_has_its_own():
    """Below 2^32, so that any other tool takes it too."""
    seeds = {make_generators(None, 1)[0].initial_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) < 2**32
    first, second = make_generators(None, 2)
    assert second.initial_seed() == first.initial_seed() + 1


def test_add_noise_by_hand():
    """sqrt(0.25) * 4 + sqrt(0.75) * 2, and 4 or 2 alone at the ends."""
    x_0, noise = torch.full((3, 1, 1, 1), 4.0), torch.full((3, 1, 1, 1), 2.0)
    noisy = add_noise(x_0, noise, torch.tensor([1.0, 0.25, 0.0]).reshape(3, 1, 1, 1))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([4.0, 2 + 3**0.5, 2.0]))


def test_generators_count_up_from_the_seed():
    first, second = (torch.randn(4, generator=generator) for generator in make_generators(7, 2))
    assert torch.equal(first, torch.randn(4, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(second, torch.randn(4, generator=torch.Generator().manual_seed(8)))


def test_zero_terminal_snr():
    """2305.08891, algorithm 1: sqrt(a_t) keeps its first value and ends at 0 (here 2^-12), linear in the old one."""
    plain = torch.cumprod(1 - make_betas(ScheduleConfig()), dim=0).sqrt()
    signal = torch.cumprod(1 - make_betas(ScheduleConfig(rescale_betas_zero_snr=True)), dim=0).sqrt()
    torch.testing.assert_close(signal[0], plain[0])
    torch.testing.assert_close(signal[-1], torch.tensor(2.0**-12), rtol=1e-3, atol=0)
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(signal[:-1], expected[:-1], rtol=1e-4, atol=1e-6)
    assert (signal.diff() < 0).all()
