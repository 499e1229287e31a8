"""Replacing, mixing and interpolating: results worked out by hand, and images from such contexts."""

import math

import numpy as np
import pytest
import torch

from sd import pipeline
from sd.prompts.embeddings import mix, replace, slerp
from tests.support.synthetic import MICRO, random_models

CAT, PANDA, PUPPY = 2368, 12952, 6829


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def draw(models, context):
    """Context -> image."""
    generators = pipeline.make_generators(0, 1)
    sampler = pipeline.SAMPLERS["dpm++2m"](generators, schedule=models.config.schedule)
    sampler.set_inference_timesteps(2)
    latents = pipeline.get_latents(models, 1, 32, 32, generators)
    *_, last = pipeline.denoise(models, latents, context, sampler)
    return pipeline.decode_latents(models, last.latents)[0]


def test_a_replaced_token_is_the_prompt_with_the_other_token(models):
    tokens = models.tokenizer(["a picture of a cat", "cat, cat"])
    expected = models.tokenizer(["a picture of a puppy", "puppy, puppy"])
    table, positions = models.clip.token_embedding.weight, models.clip.position_embedding.weight
    before = models.clip.embed(tokens)
    embeddings = replace(before, tokens == CAT, table[PUPPY], positions)
    assert torch.equal(embeddings, models.clip.embed(expected))
    assert torch.equal(models.clip.encode(embeddings), models.clip(expected))
    assert torch.equal(before, models.clip.embed(tokens)), "the input changed"


def test_replace_by_hand():
    embeddings = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    positions = torch.tensor([[0.0, 0.5], [0.25, 0.0], [9.0, 9.0]])
    replaced = replace(embeddings, torch.tensor([[False, True]]), torch.tensor([10.0, 20.0]), positions)
    assert replaced.tolist() == [[[1.0, 1.0], [10.25, 20.0]]]


def test_replace_needs_something_to_replace(models):
    tokens = models.tokenizer("a dog")
    with pytest.raises(ValueError, match="where should be true for at least one token"):
        replace(models.clip.embed(tokens), tokens == CAT, torch.zeros(32), models.clip.position_embedding.weight)


def test_images_from_a_mixture_of_two_tokens(models):
    tokens = models.tokenizer("a picture of a cat")
    table, positions = models.clip.token_embedding.weight, models.clip.position_embedding.weight
    uncond = pipeline.encode_prompt(models, "", None)

    def image(shares):
        mixture = mix([table[CAT], table[PANDA]], shares)
        context = models.clip.encode(replace(models.clip.embed(tokens), tokens == CAT, mixture, positions))
        return draw(models, torch.cat([uncond, context]))

    cat, both, panda = (image(shares) for shares in ([1, 0], [0.4, 0.6], [0, 1]))
    assert both.shape == (32, 32, 3)
    expected = [draw(models, pipeline.encode_prompt(models, f"a picture of a {word}")) for word in ("cat", "panda")]
    for actual, wanted in zip((cat, panda), expected):
        assert np.abs(actual.astype(int) - wanted.astype(int)).max() <= 1
        assert (both != wanted).any()


@pytest.mark.parametrize("between", [lambda a, b: mix([a, b], [0.5, 0.5]), lambda a, b: slerp(a, b, 0.5)])
def test_images_between_two_prompts(models, between):
    uncond, cat, house = pipeline.encode_prompt(models, ["", "a cat", "a red house, " * 30], None).split(1)
    middle = between(cat, house)
    assert middle.shape == cat.shape == (1, 154, 32)
    images = [draw(models, torch.cat([uncond, context])) for context in (cat, middle, house)]
    assert (images[0] != images[1]).any()
    assert (images[1] != images[2]).any()


def test_mix():
    king, woman, man = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    assert mix([king, woman, man], [1, 1, -1]).tolist() == [2.0, 3.0]
    torch.testing.assert_close(mix([king, man], [0.4, 0.6]), torch.tensor([1.8, 0.4]))


def test_slerp_by_hand():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    third = slerp(east, north, 1 / 3)
    torch.testing.assert_close(third, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    longer = slerp(east, 3 * north, 0.5)  # both ends weighted by sin(pi / 4) / sin(pi / 2)
    torch.testing.assert_close(longer, torch.tensor([1.0, 3.0]) * math.sqrt(0.5))


def test_slerp_keeps_the_length_and_divides_the_angle_of_every_vector():
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.nn.functional.normalize(torch.randn(2, 5, 8, generator=generator), dim=-1) for _ in range(2))
    angle = (start * end).sum(-1).acos()
    for t in (0.0, 0.25, 0.9, 1.0):
        between = slerp(start, end, t)
        torch.testing.assert_close(between.norm(dim=-1), torch.ones(2, 5))
        torch.testing.assert_close((start * between).sum(-1), torch.cos(t * angle))
    torch.testing.assert_close(slerp(start, end, 0.0), start)
    torch.testing.assert_close(slerp(start, end, 1.0), end)


def test_slerp_of_parallel_vectors_is_linear():
    ends = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    others = torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.0, 0.0], [-1.0, 0.0]])
    expected = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(slerp(ends, others, 0.5), expected)
    quarter = torch.tensor([[1.0, 2.0], [1.5, 3.0], [0.0, 0.0], [0.5, 0.0]])
    torch.testing.assert_close(slerp(ends, others, 0.25), quarter)
    nearly = torch.tensor([1.0, 1e-4])
    torch.testing.assert_close(slerp(nearly, torch.tensor([2.0, 0.0]), 0.5), torch.tensor([1.5, 0.5e-4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slerp_keeps_the_dtype(dtype):
    assert slerp(torch.ones(2, dtype=dtype), torch.tensor([1.0, -1.0], dtype=dtype), 0.5).dtype == dtype


def test_different_shapes_are_refused():
    short, long = torch.zeros(1, 77, 4), torch.zeros(1, 154, 4)
    sentence = r"^Tensors should have the same shape, not \(1, 77, 4\) and \(1, 154, 4\)\. Prompts that are given to"
    with pytest.raises(ValueError, match=sentence):
        mix([short, long], [0.5, 0.5])
    with pytest.raises(ValueError, match=sentence):
        slerp(short, long, 0.5)
    with pytest.raises(ValueError, match="shares should be one number for each tensor, not 1 for 2"):
        mix([short, short], [0.5])
