"""The steps of the pipeline against their definitions, with a U-Net whose predictions are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sd import pipeline
from tests.support.synthetic import MICRO, random_models

SHAPE = (2, 4, 8, 8)


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_unet_computes_in_its_dtype_and_everything_else_in_float32(models, unet, dtype):
    steps, _ = denoise(models, unet.to(dtype), [0.1, 0.2, 0.3, 0.5])
    for latents, context, _ in unet.calls:
        assert latents.dtype == context.dtype == dtype
    for step in steps:
        for tensor in (step.latents, step.denoised, step.noise, step.noise_uncond, step.noise_cond):
            assert tensor.dtype == torch.float32


def test_an_image_starts_at_the_noise_level_of_the_first_timestep(models):
    """A sample of its latents, x_0, and then sqrt(a_t) x_0 + sqrt(1 - a_t) e."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    sample, e = (torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    sampler = pipeline.SAMPLERS["ddim"](torch.Generator().manual_seed(6))
    sampler.set_inference_timesteps(10)
    sampler.set_strength(0.6)
    latents = pipeline.get_latents(models, 1, 32, 32, 5, pixels, sampler)
    a_t = sampler.alphas_cumprod[501]  # the first of the last six: 501, 401, ... 1
    x_0 = models.encoder(torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1, sample)
    torch.testing.assert_close(latents, a_t.sqrt() * x_0 + (1 - a_t).sqrt() * e, rtol=1e-4, atol=1e-4)
