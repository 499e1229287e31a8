"""The four steps, and `generate`. Agreement with diffusers' pipelines is tested in parity/."""

import re
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate, pipeline
from sd.checkpoints.files import write_checkpoint
from sd.config import SamplingConfig, ScheduleConfig
from sd.request import Request
from sd.tokenizer import DEFAULT_MERGES, Tokenizer
from tests.support.synthetic import MICRO, random_models, random_state

QUICK = {"n_inference_steps": 3, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def max_difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_one_prompt_gives_one_picture_and_a_list_a_stack(models):
    one = generate("a cat", models=models, seed=1, **QUICK)
    assert one.shape == (32, 32, 3)
    assert one.dtype == np.uint8
    assert one.std() > 10
    assert generate(["a cat"], models=models, seed=1, **QUICK).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("height, width", [(None, None), (32, 72), (8, 8), (104, None)])
def test_size(models, height, width):
    image = generate("a cat", models=models, n_inference_steps=1, height=height, width=width)
    assert image.shape == (height or 64, width or 64, 3)


def test_a_picture_is_the_same_alone_and_in_a_batch(models):
    prompts = ["a cat", "a dog", "a house"]
    together = generate(prompts, ["", "bad", "dark"], models=models, seed=7, **QUICK)
    for i, (prompt, uncond) in enumerate(zip(prompts, ["", "bad", "dark"])):
        alone = generate(prompt, uncond, models=models, seed=7 + i, **QUICK)
        assert max_difference(together[i], alone) <= 1


def test_same_seed_same_picture_and_other_seed_another(models):
    first = generate("a cat", models=models, seed=3, **QUICK)
    assert np.array_equal(first, generate("a cat", models=models, seed=3, **QUICK))
    assert max_difference(first, generate("a cat", models=models, seed=4, **QUICK)) > 20
    assert max_difference(first, generate("a cat", models=models, **QUICK)) > 20


def test_the_global_random_state_is_left_alone(models):
    before = torch.get_rng_state()
    generate("a cat", models=models, **QUICK)
    assert torch.equal(before, torch.get_rng_state())


def test_every_argument_counts(models, picture):
    base = {"prompt": "a cat", "input_image": picture, "models": models, "seed": 1, "n_inference_steps": 5}
    base |= {"height": 32, "width": 32}
    first = generate(**base)
    changes = {"prompt": "a dog", "uncond_prompt": "blurry", "strength": 0.3, "cfg_scale": 2.0, "do_cfg": False}
    changes |= {"n_inference_steps": 10, "input_image": None, "cfg_rescale": 0.7, "deep_cache": 5}
    for name, value in changes.items():
        assert max_difference(first, generate(**(base | {name: value}))) > 2, name


def test_low_strength_keeps_the_picture(models, picture):
    latents = pipeline.get_latents(models, 1, 32, 32, 0)
    sampler = pipeline.SAMPLERS["ddpm"](pipeline.make_generators(0, 1))
    sampler.set_strength(0.02)
    kept = pipeline.get_latents(models, 1, 32, 32, 0, picture, sampler)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    encoded = models.encoder(pipeline.image_to_tensor(picture, 32, 32), noise)
    assert torch.equal(latents, noise)
    assert ((kept - encoded).std() / encoded.std()).item() < 0.2


def test_steps_by_hand_are_what_generate_does(models):
    context = pipeline.encode_prompt(models, "a cat", "blurry")
    assert context.shape == (2, 77, 32)
    generators = pipeline.make_generators(5, 1)
    sampler = pipeline.SAMPLERS["dpm++2m"](generators, schedule=models.config.schedule)
    sampler.set_inference_timesteps(3)
    latents = pipeline.get_latents(models, 1, 32, 32, generators)
    steps = list(pipeline.denoise(models, latents, context, sampler, 7.5))
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.timestep for step in steps] == [999, 666, 333]
    for step in steps:
        for tensor in (step.latents, step.denoised, step.noise, step.noise_uncond, step.noise_cond):
            assert tensor.shape == (1, 4, 4, 4)
            assert tensor.dtype == torch.float32
        guided = step.noise_uncond + 7.5 * (step.noise_cond - step.noise_uncond)
        torch.testing.assert_close(step.noise, guided)
    torch.testing.assert_close(steps[-1].latents, steps[-1].denoised)
    image = pipeline.decode_latents(models, steps[-1].latents)
    assert np.array_equal(image[0], generate("a cat", "blurry", models=models, seed=5, **QUICK))


def test_steps_by_hand_refuse_what_cannot_be(models, picture):
    with pytest.raises(ValueError, match="height should be a multiple of 8 pixels, not 100"):
        pipeline.get_latents(models, 1, 100, 64)
    with pytest.raises(ValueError, match="sampler should be given with input_image"):
        pipeline.get_latents(models, 1, 64, 64, input_image=picture)
    latents, sampler = pipeline.get_latents(models, 2), pipeline.SAMPLERS["ddpm"]()
    with pytest.raises(ValueError, match="context should have 2 or 4 rows, not 3"):
        next(pipeline.denoise(models, latents, torch.zeros(3, 77, 32), sampler))
    for deep_cache in (0, -2, 1.5):
        with pytest.raises(
            ValueError, match=f"^deep_cache should be a whole number from 1 to 1000, not {deep_cache}.$"
        ):
            next(pipeline.denoise(models, latents, torch.zeros(2, 77, 32), sampler, deep_cache=deep_cache))


@pytest.mark.parametrize(
    "latents, context, problem",
    [
        ((1, 3, 8, 8), (2, 77, 32), "latents should be a tensor (B, 4, h, w), not (1, 3, 8, 8)."),
        ((4, 8, 8), (2, 77, 32), "latents should be a tensor (B, 4, h, w), not (4, 8, 8)."),
        ((0, 4, 8, 8), (2, 77, 32), "latents should be a tensor (B, 4, h, w), not (0, 4, 8, 8)."),
        ((1, 4, 8, 8), (2, 77, 768), "context should be a tensor (B or 2B, 77 k, 32), not (2, 77, 768)."),
        ((1, 4, 8, 8), (77, 32), "context should be a tensor (B or 2B, 77 k, 32), not (77, 32)."),
    ],
)
def test_tensors_of_another_shape_are_named(models, latents, context, problem):
    sampler = pipeline.SAMPLERS["ddpm"]()
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        next(pipeline.denoise(models, torch.zeros(latents), torch.zeros(context), sampler))
    if problem.startswith("latents"):
        with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
            pipeline.decode_latents(models, torch.zeros(latents))


def test_arrays_are_no_tensors(models):
    array, problem = np.zeros((1, 4, 8, 8), np.float32), r"^latents should be a tensor \(B, 4, h, w\), not array\("
    with pytest.raises(ValueError, match=problem):
        next(pipeline.denoise(models, array, torch.zeros(2, 77, 32), pipeline.SAMPLERS["ddpm"]()))
    with pytest.raises(ValueError, match=problem):
        pipeline.decode_latents(models, array)


def test_a_guided_part_of_the_run_has_whole_steps(models):
    """To a computer, 0.07 * 100 is 7.000000000000001 and 0.14 * 100 is 14.000000000000002."""
    latents, context = pipeline.get_latents(models, 1, 8, 8), pipeline.encode_prompt(models, "a cat")
    sampler = pipeline.SAMPLERS["ddim"]()
    sampler.set_inference_timesteps(100)
    run = islice(pipeline.denoise(models, latents, context, sampler, cfg_interval=(0.07, 0.14)), 16)
    assert [step.index for step in run if step.noise_uncond is not None] == list(range(7, 14))


def test_no_negative_prompt_is_the_empty_one(models):
    pictures = [generate("a cat", uncond, models=models, seed=1, **QUICK) for uncond in (None, "")]
    assert np.array_equal(*pictures)


def test_denoise_without_guidance(models):
    context = pipeline.encode_prompt(models, ["a cat", "a dog"], None)
    assert context.shape == (2, 77, 32)
    sampler = pipeline.SAMPLERS["ddpm"](torch.Generator())
    step = next(pipeline.denoise(models, pipeline.get_latents(models, 2, 32, 32), context, sampler))
    assert step.noise_uncond is None
    assert torch.equal(step.noise, step.noise_cond)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same_picture(models, dtype):
    half = random_models(MICRO)
    for network in (half.clip, half.encoder, half.decoder, half.diffusion):
        network.to(dtype)
    expected = generate("a cat", models=models, seed=1, cfg_scale=2.0, **QUICK)
    actual = generate("a cat", models=half, seed=1, cfg_scale=2.0, **QUICK)
    assert np.abs(actual.astype(int) - expected.astype(int)).mean() < 6


def test_networks_wait_on_the_idle_device(models, monkeypatch):
    moves = []
    for name in ("clip", "encoder", "diffusion", "decoder"):
        network = getattr(models, name)
        monkeypatch.setattr(network, "to", lambda device, name=name: moves.append((name, str(device))))
    generate("a cat", models=models, device="cpu", idle_device="cpu:0", **QUICK)
    order = ("clip", "encoder", "diffusion", "decoder")
    assert moves == [move for name in order for move in ((name, "cpu"), (name, "cpu:0"))]


def test_interruption_puts_the_network_back_to_sleep(models, monkeypatch):
    moves = []
    monkeypatch.setattr(models.diffusion, "to", lambda device: moves.append(str(device)))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models.diffusion, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate("a cat", models=models, idle_device="cpu", **QUICK)
    assert moves == ["cpu", "cpu"]


def test_another_tokenizer(models):
    class Counting(Tokenizer):
        seen = ()

        def encode(self, text):
            Counting.seen += (text,)
            return super().encode(text)

    generate("a cat", models=models, tokenizer=Counting(), **QUICK)
    assert "a cat" in Counting.seen


def test_the_cell_of_the_video(monkeypatch, tmp_path):
    """Its notebook's way to a picture, from the files it expects: here only the imports are other ones."""
    from sd import model_loader
    from sd.tokenizer import CLIPTokenizer

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").mkdir()
    shutil.copy(DEFAULT_MERGES, tmp_path / "data")
    write_checkpoint(tmp_path / "data/v1-5-pruned-emaonly.ckpt", random_state(MICRO), MICRO.to_dict())
    monkeypatch.chdir(tmp_path / "notebooks")

    tokenizer = CLIPTokenizer("../data/vocab.json", merges_file="../data/merges.txt")
    models = model_loader.preload_models_from_standard_weights("../data/v1-5-pruned-emaonly.ckpt", "cpu")
    output_image = pipeline.generate(
        prompt="A cat with sunglasses on a sofa, in soft light",
        uncond_prompt="",
        input_image=None,
        strength=0.9,
        do_cfg=True,
        cfg_scale=8,
        sampler_name="ddpm",
        n_inference_steps=2,
        seed=42,
        models=models,
        device="cpu",
        idle_device="cpu",
        tokenizer=tokenizer,
    )
    assert Image.fromarray(output_image).size == (64, 64)


def test_the_configuration_says_how_pictures_are_made(models):
    sampling = SamplingConfig("euler", 3, 2.0)
    usual = replace(models, config=replace(models.config, sampling=sampling))
    expected = generate("a cat", models=models, seed=1, sampler_name="euler", n_inference_steps=3, cfg_scale=2.0)
    assert np.array_equal(generate("a cat", models=usual, seed=1), expected)
    sampler, _, _ = pipeline.prepare(usual, Request("", sampler_name="ddim"))
    assert len(sampler.timesteps) == sampler.default_steps  # another sampler has a default of its own
    short = replace(usual, config=replace(usual.config, schedule=ScheduleConfig(num_training_steps=20)))
    assert len(pipeline.prepare(short, Request("", sampler_name="ddim"))[0].timesteps) == 20


def test_a_scale_of_one_asks_the_unet_once(models):
    context = pipeline.encode_prompt(models, "a cat", "a dog")
    sampler, latents, _ = pipeline.prepare(models, Request("", sampler_name="euler", n_inference_steps=3, seed=1))
    steps = list(pipeline.denoise(models, latents, context, sampler, cfg_scale=1))
    assert all(step.noise_uncond is None for step in steps)
    assert torch.equal(steps[-1].noise, steps[-1].noise_cond)


def test_a_negative_prompt_without_guidance_is_noted(models):
    with pytest.warns(UserWarning, match="^uncond_prompt has no effect with a cfg_scale of 1"):
        pipeline.prepare(models, Request("a", "b", cfg_scale=1, **QUICK))
    for request in (
        Request("a", "b"),
        Request(["a", "b"], ["", ""], cfg_scale=1),
        Request("a", "b", do_cfg=False, cfg_scale=1),
    ):
        pipeline.prepare(models, request)  # warnings are errors here
