"""Classifier-free guidance and its refinements, and guidance by a loss on the picture."""

import copy
from dataclasses import replace

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


class FakeUNet(torch.nn.Module):
    """Predicts, at every pixel, the first number of the row's context. Keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # has the device and the dtype
        self.calls = []

    def forward(self, latents, context, timesteps):
        self.calls.append((latents, context, timesteps))
        return context[:, :1, :1, None].expand_as(latents)


@pytest.fixture
def unet():
    return FakeUNet()


def denoise(models, unet, rows, **options):
    """Three steps of DDIM with a fake U-Net, on latents that are all 1 and 2 -> the `Step`s and the sampler."""
    sampler = pipeline.SAMPLERS["ddim"]()
    sampler.set_inference_timesteps(3)
    context = torch.tensor(rows)[:, None, None].expand(-1, 77, 32)
    latents = torch.tensor([1.0, 2.0])[:, None, None, None].expand(SHAPE)
    return list(pipeline.denoise(replace(models, diffusion=unet), latents, context, sampler, **options)), sampler


def values(x):
    """The value of each row, which has one value alone."""
    assert (x == x[:, :1, :1, :1]).all()
    return x[:, 0, 0, 0].tolist()


def test_the_first_half_of_the_context_is_the_unconditional_one(models, unet):
    steps, _ = denoise(models, unet, [0.1, 0.2, 0.3, 0.5], cfg_scale=4.0)
    for step in steps:
        assert values(step.noise_uncond) == pytest.approx([0.1, 0.2])
        assert values(step.noise_cond) == pytest.approx([0.3, 0.5])
        assert values(step.noise) == pytest.approx([0.1 + 4 * 0.2, 0.2 + 4 * 0.3])
    uncond, cond = pipeline.encode_prompt(models, "a cat", "blurry")
    torch.testing.assert_close(uncond[None], pipeline.encode_prompt(models, "blurry", None))
    torch.testing.assert_close(cond[None], pipeline.encode_prompt(models, "a cat", None))


def test_without_guidance_the_second_half_is_used_alone(models, unet):
    steps, _ = denoise(models, unet, [0.1, 0.2, 0.3, 0.5], cfg_scale=1)
    for step, (latents, context, timesteps) in zip(steps, unet.calls, strict=True):
        assert len(latents) == len(context) == len(timesteps) == 2
        assert step.noise_uncond is None
        assert values(step.noise) == values(step.noise_cond) == pytest.approx([0.3, 0.5])


def test_the_unet_gets_the_latents_and_the_timestep_of_each_step(models, unet):
    """Then DDIM's step (2010.02502, eq. 12) makes the latents of the next."""
    steps, sampler = denoise(models, unet, [0.1, 0.2, 0.3, 0.5], cfg_scale=4.0)
    a = [*sampler.alphas_cumprod[[667, 334, 1]].tolist(), 1]
    x = [1.0, 2.0]
    for i, (step, (latents, _, timesteps)) in enumerate(zip(steps, unet.calls, strict=True)):
        assert timesteps.tolist() == [[667, 334, 1][i]] * 4
        assert (step.index, step.timestep) == (i, [667, 334, 1][i])
        assert values(latents) == pytest.approx([*x, *x])  # both halves: the same latents
        noise = 0.1 + 4 * 0.2, 0.2 + 4 * 0.3
        x_0 = [(x_t - (1 - a[i]) ** 0.5 * e) / a[i] ** 0.5 for x_t, e in zip(x, noise)]
        x = [a[i + 1] ** 0.5 * clean + (1 - a[i + 1]) ** 0.5 * e for clean, e in zip(x_0, noise)]
        assert values(step.denoised) == pytest.approx(x_0, rel=1e-4)
        assert values(step.latents) == pytest.approx(x, rel=1e-4)


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


@pytest.mark.parametrize("weight", [1e-3, 50])
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
