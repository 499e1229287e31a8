"""Prompts of any length: their chunks, how contexts are joined, and how weights are applied."""

from itertools import chain

import numpy as np
import pytest
import torch

from sd import generate, model_loader, pipeline
from sd.prompts.weights import chunks_of, join_chunks, layout, split, weigh
from sd.tokenizer import Tokenizer
from tests.support.synthetic import MICRO, random_models

START, END, CAT, COMMA = 49406, 49407, 2368, 267


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def lengths(chunks):
    return [len(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    "cats, expected",
    [(0, [0]), (1, [1]), (75, [75]), (76, [75, 1]), (95, [75, 20]), (150, [75, 75]), (151, [75, 75, 1])],
)
def test_chunks_without_a_comma(tokenizer, cats, expected):
    chunks = chunks_of("cat " * cats, tokenizer)
    assert lengths(chunks) == expected
    assert list(chain(*chunks)) == [(CAT, 1.0)] * cats


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (60, 14, [75]),  # 75 tokens fit
        (60, 15, [61, 15]),  # 76 tokens: the tokens after the comma move
        (60, 34, [61, 34]),  # 95 tokens
        (55, 20, [56, 20]),  # the comma is the first of the last 20 tokens
        (54, 21, [75, 1]),  # the comma is one token too early
        (74, 10, [75, 10]),  # the comma ends the chunk: nothing moves
        (75, 10, [75, 11]),  # the comma itself no longer fits
        (60, 100, [61, 75, 25]),
    ],
)
def test_tokens_after_a_late_comma_move_to_the_next_chunk(tokenizer, before, after, expected):
    chunks = chunks_of("cat " * before + ", " + "cat " * after, tokenizer)
    assert lengths(chunks) == expected
    assert [token for token, _ in chain(*chunks)] == [CAT] * before + [COMMA] + [CAT] * after


def test_the_last_comma_counts():
    tokens = [(COMMA if i in (58, 70, 130) else CAT, float(i)) for i in range(160)]
    assert split(tokens, 75, {COMMA}) == [tokens[:71], tokens[71:131], tokens[131:]]


def test_a_comma_right_after_a_full_chunk_moves_nothing():
    tokens = [(COMMA if i in (60, 75) else CAT, 1.0) for i in range(90)]
    assert lengths(split(tokens, 75, {COMMA})) == [75, 15]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("cat BREAK cat cat", [1, 2]),
        ("BREAK cat", [0, 1]),
        ("cat BREAK", [1]),
        ("cat BREAK BREAK cat", [1, 0, 1]),
        ("BREAK", [0]),
        ("cat " * 80 + "BREAK" + " cat" * 3, [75, 5, 3]),
        ("cat " * 60 + ", cat BREAK" + " cat" * 30, [62, 30]),
    ],
)
def test_break_starts_a_chunk(tokenizer, prompt, expected):
    assert lengths(chunks_of(prompt, tokenizer)) == expected


def test_layout_token_by_token(tokenizer):
    tokens, weights, counts = layout(["a (cat:1.5) BREAK [dog]", "cat " * 75], tokenizer)
    assert counts == [2, 1]
    assert tokens.dtype == torch.long
    assert weights.dtype == torch.float32
    assert tokens.tolist() == [
        [START, 320, CAT, *[END] * 74],
        [START, 1929, *[END] * 75],
        [START, *[CAT] * 75, END],
    ]
    expected = torch.ones(3, 77)
    expected[0, 2], expected[1, 1] = 1.5, 1 / 1.1
    assert torch.equal(weights, expected)


def test_layout_takes_start_end_padding_and_length_from_the_tokenizer():
    tokens, weights, counts = layout(["(cat:2) cat cat"], Tokenizer(context_length=5, pad_token_id=0))
    assert tokens.tolist() == [[START, CAT, CAT, CAT, END]]
    tokens, weights, counts = layout(["(cat:2) cat cat, cat"], Tokenizer(context_length=5, pad_token_id=0))
    assert tokens.tolist() == [[START, CAT, CAT, CAT, END], [START, COMMA, CAT, END, 0]]
    assert weights.tolist() == [[1, 2, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert counts == [2]


def test_a_chunk_has_room_for_one_token_at_least():
    with pytest.raises(ValueError, match="context_length should be at least 3, not 2"):
        layout(["cat"], Tokenizer(context_length=2))


def test_layout_of_short_plain_prompts_is_the_tokenizers_own(tokenizer):
    texts = ["", "A cat, at 10:30!", "cat " * 75, "café ☕ 'quoted'"]
    tokens, weights, counts = layout(texts, tokenizer)
    assert torch.equal(tokens, tokenizer(texts))
    assert torch.equal(weights, torch.ones(4, 77))
    assert counts == [1, 1, 1, 1]


def test_a_prompt_may_have_100_chunks(tokenizer):
    assert layout(["4" * 7500], tokenizer)[2] == [100]
    for text in ("4" * 7501, "a BREAK " * 101 + "a"):
        with pytest.raises(ValueError, match=r"^prompt should be at most 100 chunks of 75 tokens long, not 10[12]\.$"):
            layout([text], tokenizer)


def of_chunks(count):
    return " BREAK ".join(["cat"] * count)


@pytest.mark.parametrize("counts", [[1, 2, 3, 4, 5, 6], [100, 1, 50], [61, 61], [20, 30, 60], [7, 8]])
def test_prompts_of_different_lengths_share_a_batch(tokenizer, counts):
    assert layout(list(map(of_chunks, counts)), tokenizer)[2] == counts


@pytest.mark.parametrize("counts, most, multiple, numbers", [([7, 9], 60, 63, "7, 9"), ([100, 3], 100, 300, "3, 100")])
def test_lengths_that_need_too_many_repetitions_are_refused(models, counts, most, multiple, numbers):
    sentence = (
        "^The prompts and negative prompts of a batch should have numbers of chunks whose least common multiple is "
        rf"at most {most}, not {multiple} \(for {numbers} chunks\): generate their images one at a time, or shorten "
        r"one\.$"
    )
    handle = models.clip.register_forward_pre_hook(lambda *_: pytest.fail("encoded before checking"))
    try:
        with pytest.raises(ValueError, match=sentence):
            pipeline.encode_prompt(models, list(map(of_chunks, counts)), None)
        with pytest.raises(ValueError, match=sentence):
            generate(of_chunks(counts[0]), of_chunks(counts[1]), models=models, height=8, width=8)
    finally:
        handle.remove()


def test_join_chunks_repeats_the_shorter_contexts():
    context = torch.arange(6.0).view(6, 1, 1)  # six chunks of one token
    joined = join_chunks(context, [1, 2, 3])
    assert joined.shape == (3, 6, 1)
    assert joined[..., 0].tolist() == [[0, 0, 0, 0, 0, 0], [1, 2, 1, 2, 1, 2], [3, 4, 5, 3, 4, 5]]
    assert torch.equal(join_chunks(context, [3, 3])[..., 0], torch.tensor([[0.0, 1, 2], [3, 4, 5]]))


def test_weigh_multiplies_and_restores_the_mean_of_each_chunk():
    context = torch.rand(3, 77, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(3, 77)
    weights[0, 1:4], weights[2, 5] = 1.5, 0.2
    weighed = weigh(context, weights)
    for chunk in (0, 2):
        product = context[chunk] * weights[chunk, :, None]
        torch.testing.assert_close(weighed[chunk], product * (context[chunk].mean() / product.mean()))
        torch.testing.assert_close(weighed[chunk].mean(), context[chunk].mean())
    assert torch.equal(weighed[1], context[1])


def test_weigh_by_hand():
    context = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])  # mean 2; weighted by 1 and 3: mean 4
    assert weigh(context, torch.tensor([[1.0, 3.0]])).tolist() == [[[0.5, 1.5], [3.0, 3.0]]]


@pytest.mark.parametrize(
    "means, weights, factor",
    [
        ([0, 0], [1, 3], 1),  # s is 0 / 0
        ([1, -1], [1, 3], 2),  # the mean is 0, the weighted mean negative
        ([3, -1], [1, 3], 2),  # the weighted mean is 0
        ([2, -1], [1, 3], 2),  # s would be negative
        ([4, -1], [1, 3], 2),  # s would be 3, and 1 / mean(|w|) is 1/2
        ([1, 1], [1, -1], 2),  # the weights cancel out
    ],
)
def test_means_that_cancel_out_cannot_blow_up_the_context(means, weights, factor):
    context, weights = torch.tensor(means).float().view(1, 2, 1), torch.tensor([weights]).float()
    expected = (factor * context * weights[..., None] / weights.abs().mean()).flatten()
    assert torch.equal(weigh(context, weights).flatten(), expected)


def test_the_context_changes_gradually_with_a_weight():
    """(word:2.85) and (word:2.9) mean nearly the same, wherever s comes to its limits."""
    context = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(0))
    context[0, 5] -= 20 * context.mean()  # so that the mean changes its sign as this token's weight grows
    values = torch.arange(-200, 400) / 20

    def weighed(value: float) -> torch.Tensor:
        return weigh(context, torch.where(torch.arange(77) == 5, value, 1.0)[None])

    contexts = torch.cat([weighed(value) for value in values])  # (600, 77, 8)
    jumps = contexts.diff(dim=0).abs().amax((1, 2))
    assert jumps.max() < 0.3 * contexts.std()


@pytest.mark.parametrize("weight", [1e30, -1e30, 0.0, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_greatest_and_the_least_weights_stay_finite(dtype, weight):
    context = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.ones(1, 77)
    weights[0, 1:76] = weight
    weighed = weigh(context, weights)
    assert weighed.dtype == dtype
    assert weighed.isfinite().all()
    assert 0.1 < weighed.float().std() < 20


@pytest.mark.parametrize(
    "prompts, unconds",
    [
        (["a cat", "a cat, " * 40 + "a dog"], ["", ""]),
        (["a cat", "a dog"], ["blurry", "bad BREAK dark BREAK blurry"]),
        (["a cat BREAK a dog", "a (house:1.5)"], ["a BREAK b BREAK c", "blurry"]),
    ],
)
def test_an_image_is_the_same_alone_and_in_a_batch_with_a_longer_prompt(models, prompts, unconds):
    options = {"models": models, "n_inference_steps": 3, "height": 32, "width": 32}
    together = generate(prompts, unconds, seed=7, **options)
    for i, (prompt, uncond) in enumerate(zip(prompts, unconds)):
        alone = generate(prompt, uncond, seed=7 + i, **options)
        assert np.abs(together[i].astype(int) - alone).max() <= 1


def test_generate_applies_weights_and_accepts_long_prompts(models):
    options = {"models": models, "seed": 1, "n_inference_steps": 2, "height": 32, "width": 32}
    plain = generate("a cat, a dog", **options)
    assert (generate("a (cat:3), a dog", **options) != plain).any()
    assert (generate("a cat, a dog" + ", a dog" * 30, **options) != plain).any()
    assert (generate(r"a (cat:1.0), [(a dog:1.1)]", **options) == plain).mean() > 0.9


@pytest.mark.parametrize("argument, value", [("prompt", "a (cat"), ("uncond_prompt", "a cat]")])
def test_generate_refuses_unbalanced_brackets_before_any_work(monkeypatch, argument, value):
    monkeypatch.setattr(model_loader, "load_models", lambda **_: pytest.fail("loaded before checking"))
    with pytest.raises(ValueError, match=f"^{argument} should have its brackets in pairs: nothing "):
        generate(**({"prompt": "a cat"} | {argument: value}))
