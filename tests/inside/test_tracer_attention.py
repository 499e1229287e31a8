"""Attention maps: what the tracer computes is what the network attended to."""

from dataclasses import replace

import pytest
import torch

from sd import generate
from sd.inside.tracer import Tracer, attention_weights, word_positions
from sd.prompts.weights import layout
from tests.support.synthetic import MICRO, random_models, random_networks

OPTIONS = {"seed": 3, "n_inference_steps": 2, "height": 32, "width": 40}
STAGES = ["down.1", "down.2", "down.4", "down.5", "down.7", "down.8", "middle", *(f"up.{i}" for i in range(3, 12))]


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def test_attention_weights_give_the_output_of_the_module(models):
    module = models.diffusion.middle[1].cross_attention
    x, context = torch.randn(2, 6, 32), torch.randn(2, 9, 32)
    weights = attention_weights(module, x, context)
    assert weights.shape == (2, 6, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
    one_head = type(module)(32, 32, heads=1).requires_grad_(False)
    expected = one_head.out(attention_weights(one_head, x, context) @ one_head.value(context))
    torch.testing.assert_close(one_head(x, context), expected)
    query, key = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (module.query(x), module.key(context)))
    expected = (query @ key.mT / 4).softmax(-1).mean(1)
    torch.testing.assert_close(weights, expected)


def test_attention_is_averaged_over_calls(models):
    latents, context = torch.randn(3, 1, 4, 4, 5), torch.randn(1, 77, 32)
    alone = []
    for one in latents:
        with Tracer(models, attention=True) as trace:
            models.diffusion(one, context, torch.tensor([10]))
        alone.append(trace.attention)
    with Tracer(models, attention=True) as trace:
        for one in latents:
            models.diffusion(one, context, torch.tensor([10]))
    assert list(trace.attention) == STAGES
    for stage, mean in trace.attention.items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, torch.stack([maps[stage] for maps in alone]).mean(0))
    assert trace.attention["down.1"].shape == (1, 4, 5, 77)
    assert trace.attention["middle"].shape == (1, 1, 1, 77)


def test_rows_of_the_prompt_are_the_last_with_and_without_guidance(models):
    latents, context = torch.randn(1, 4, 4, 4), torch.randn(2, 77, 32)
    with Tracer(models, attention=True) as trace:
        models.diffusion(latents, context[1:], torch.tensor([10]))
    alone = trace.token_map(2)
    with Tracer(models, attention=True) as trace:
        models.diffusion(latents.expand(2, -1, -1, -1), context, torch.tensor([10, 10]))
        assert trace.attention["middle"].shape[0] == 2
        models.diffusion(latents, context[1:], torch.tensor([10]))  # a step without guidance
    assert trace.attention["middle"].shape[0] == 1
    torch.testing.assert_close(trace.token_map(2), alone)


def test_another_size_starts_again(models):
    with Tracer(models, attention=True) as trace:
        for height in (4, 6):
            models.diffusion(torch.zeros(1, 4, height, 4), torch.randn(1, 77, 32), torch.tensor([10]))
    assert trace.attention["down.1"].shape == (1, 6, 4, 77)
    assert trace.token_map(1).shape == (48, 32)
    torch.testing.assert_close(trace.attention["down.1"].sum(-1), torch.ones(1, 6, 4))


@pytest.mark.parametrize("do_cfg", [True, False])
def test_maps_of_all_tokens_add_up_to_one(models, do_cfg):
    with Tracer(models, attention=True) as trace:
        generate(["a cat", "a dog"], do_cfg=do_cfg, models=models, **OPTIONS)
    torch.testing.assert_close(trace.token_map(list(range(77)), row=-2), torch.ones(32, 40))
    cat, dog = trace.word_map("cat", "a cat", row=-2), trace.word_map("dog", "a dog")
    assert cat.shape == dog.shape == (32, 40)
    assert torch.equal(dog, trace.token_map(2))
    assert not torch.equal(dog, trace.token_map(2, row=-2))
    assert 0 < cat.min() < cat.max() < 1


def test_equal_keys_get_equal_attention(models):
    models = replace(models, diffusion=random_networks(MICRO).diffusion)
    for module in models.diffusion.modules():
        if hasattr(module, "key"):
            module.key.weight.zero_()
    with Tracer(models, attention=True) as trace:
        models.diffusion(torch.randn(1, 4, 4, 4), torch.randn(1, 77, 32), torch.tensor([10]))
    torch.testing.assert_close(trace.token_map(5), torch.full((32, 32), 1 / 77))


@pytest.mark.parametrize(
    "word, prompt, positions",
    [
        ("cat", "a cat", [2]),
        ("Cat", "a CAT and a cat", [2, 5]),
        ("red house", "a red house", [2, 3]),
        ("cat", "a (red:1.2) [cat]", [3]),
        ("cat", "a " * 75 + "cat", [78]),
        ("zyxwvutsrq", "zyxwvutsrq", list(range(1, 7))),
    ],
)
def test_word_positions(models, word, prompt, positions):
    found = word_positions(models.tokenizer, word, prompt)
    assert found == positions
    tokens = layout([prompt], models.tokenizer)[0].flatten()
    assert models.tokenizer.decode(tokens[found]).startswith(word.lower())


@pytest.mark.parametrize("word, prompt", [("cat", "a category"), ("", "a cat"), ("a dog", "a cat, dog")])
def test_words_that_are_not_in_the_prompt(models, word, prompt):
    with pytest.raises(
        ValueError, match=f"word should be in the prompt, as a whole word: '{word}' is not in '{prompt}'."
    ):
        word_positions(models.tokenizer, word, prompt)


def test_positions_in_a_repeated_context(models):
    assert word_positions(models.tokenizer, "cat", "a cat", 231) == [2, 79, 156]
    long = "a " * 75 + "cat"
    assert word_positions(models.tokenizer, "cat", long, 154) == [78]
    assert word_positions(models.tokenizer, "cat", long, 308) == [78, 232]


def test_a_words_map_is_the_same_alone_and_beside_a_longer_prompt(models):
    short, long = "a cat", "a cat BREAK a dog BREAK a house"
    maps = []
    for prompts in ([short], [short, long]):
        with Tracer(models, attention=True) as trace:
            generate(prompts, models=models, **OPTIONS)
        maps.append(trace.word_map("cat", short, row=-len(prompts)))
    assert trace.tokens == 231
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trace.token_map(2, row=-2), maps[0], rtol=0.1)  # a third of it


def test_maps_of_weighted_and_long_prompts(models):
    prompt = "a " * 80 + "(cat:1.5)"
    with Tracer(models, attention=True) as trace:
        generate(prompt, models=models, **OPTIONS)
    assert trace.attention["middle"].shape[-1] == 154
    assert torch.equal(trace.word_map("cat", prompt), trace.token_map(77 + 1 + 5))
