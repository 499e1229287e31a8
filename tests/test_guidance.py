"""Classifier-free guidance and its refinements, and guidance by a loss on the picture."""

import copy

import pytest
import torch

from sd import pipeline
from sd.guidance import by_loss, classifier_free
from tests.support.synthetic import MICRO, random_models

SHAPE = (2, 4, 8, 8)


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def run(models, **options):
    """Six steps of a fixed run -> the list of `Step`s."""
    sampler = pipeline.SAMPLERS["ddim"]()
    sampler.set_inference_timesteps(6)
    latents = pipeline.get_latents(models, 1, 32, 32, seed=0)
    return list(pipeline.denoise(models, latents, pipeline.encode_prompt(models, "a cat"), sampler, **options))


def test_scale():
    uncond, cond = torch.randn(SHAPE), torch.randn(SHAPE)
    torch.testing.assert_close(classifier_free(uncond, cond, 1.0), cond)
    torch.testing.assert_close(classifier_free(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(classifier_free(uncond, cond, 7.5), 7.5 * cond - 6.5 * uncond)


def test_full_rescale_gives_each_picture_the_deviation_of_its_conditional_prediction():
    uncond, cond = torch.randn(SHAPE), torch.randn(SHAPE) * torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    noise = classifier_free(uncond, cond, 7.5, rescale=1)
    for i in range(2):
        torch.testing.assert_close(noise[i].std(), cond[i].std())
    plain, half = classifier_free(uncond, cond, 7.5), classifier_free(uncond, cond, 7.5, rescale=0.5)
    torch.testing.assert_close(half, (plain + noise) / 2)


@pytest.mark.parametrize(
    "interval, guided",
    [((0, 1), [True] * 6), ((0.2, 0.8), [False, False, True, True, True, False]), ((0, 0), [False] * 6)],
)
def test_guidance_over_a_part_of_the_run(models, interval, guided):
    assert [step.noise_uncond is not None for step in run(models, cfg_interval=interval)] == guided


def test_outside_of_the_interval_the_prompt_alone_counts(models):
    unguided, scale_1 = run(models, cfg_interval=(0, 0))[-1].latents, run(models, cfg_scale=1.0)[-1].latents
    torch.testing.assert_close(unguided, scale_1, rtol=0, atol=1e-4)


def test_rescale_reaches_the_run(models):
    steps = run(models, cfg_rescale=1.0)
    for step in steps:
        torch.testing.assert_close(step.noise.std(), step.noise_cond.std())


@pytest.mark.parametrize("timestep", [989, 400])  # where 1 - a_t is almost 1, and where it is not
def test_the_gradient_is_that_of_the_loss(models, timestep):
    """Against finite differences, along the gradient itself."""
    sampler, timestep = pipeline.SAMPLERS["ddim"](), torch.tensor(timestep)
    latents, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)

    def loss(pictures):
        return pictures.square().mean()

    def loss_at(x):
        denoised, _ = sampler.predict(timestep, x, noise)
        return loss(models.decoder(denoised)).item()

    moved = by_loss(models.decoder, sampler, timestep, latents, noise, loss)
    a_t = sampler.alphas_cumprod[int(timestep)]
    gradient = (latents - moved) / (1 - a_t)
    step = 1e-2 / gradient.norm()
    slope = (loss_at(latents + step * gradient) - loss_at(latents - step * gradient)) / (2 * step)
    assert slope.item() == pytest.approx(gradient.square().sum().item(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1e-3, pytest.param(50, marks=pytest.mark.slow)])
def test_no_gradient_vanishes_in_float16(models, weight):
    """That of a mean over so many pixels is smaller than what float16 can tell from 0."""
    sampler, half = pipeline.SAMPLERS["ddim"](), copy.deepcopy(models.decoder).half()
    latents, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()

    def push(decoder):
        return by_loss(decoder, sampler, 989, latents, noise, lambda x: weight * x.square().mean()) - latents

    expected, actual = push(models.decoder), push(half)
    assert (actual - expected).norm() < 0.02 * expected.norm()


def test_a_loss_steers_the_picture(models):
    """The founding notebook's experiment: the distance of the blue channel from 0.9 of its range."""

    def blue_loss(pictures):
        return 200 * ((pictures[:, 2] + 1) / 2 - 0.9).abs().mean()

    plain, blue = (
        pipeline.decode_latents(models, run(models, guidance=guidance)[-1].latents) for guidance in (None, blue_loss)
    )
    assert blue[..., 2].mean() > plain[..., 2].mean() + 5
    assert not models.decoder.gradient_checkpointing


def test_checkpointing_changes_no_number(models):
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    gradients = []
    for checkpointing in (False, True):
        models.decoder.gradient_checkpointing = checkpointing
        gradients.append(torch.autograd.grad(models.decoder(latents).square().mean(), latents)[0])
    models.decoder.gradient_checkpointing = False
    assert torch.equal(*gradients)


def test_an_error_in_the_loss_leaves_the_decoder_as_it_was(models):
    with pytest.raises(ZeroDivisionError):
        run(models, guidance=lambda pictures: 1 / 0)
    assert not models.decoder.gradient_checkpointing
