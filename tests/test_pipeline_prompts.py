"""Prompts -> context: the text encoder's output, weighted, chunk beside chunk, the unconditional half first."""

import pytest
import torch

from sd.pipeline import encode_prompt
from tests.support.synthetic import MICRO, random_models


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def test_short_plain_prompts_have_the_plain_encoders_context(models):
    texts = ["", "A cat, at 10:30", "cat " * 75]
    expected = models.clip(models.tokenizer(texts))
    assert torch.equal(encode_prompt(models, texts, None), expected)
    assert torch.equal(encode_prompt(models, texts, None, plain=True), expected)


def test_weights_change_the_context_of_their_chunk_only(models):
    context = encode_prompt(models, ["a (cat:1.5) BREAK dog", "a cat BREAK dog"], None)
    assert context.shape == (2, 154, 32)
    assert torch.equal(context[0, 77:], context[1, 77:])
    first, second = context[:, :77]
    ratios = first / second
    scale = ratios[0, 0]
    torch.testing.assert_close(ratios[2], 1.5 * scale.expand(32))
    torch.testing.assert_close(ratios[torch.arange(77) != 2], scale.expand(76, 32))


def test_long_prompts_are_encoded_chunk_by_chunk(models):
    context = encode_prompt(models, "dog " * 75 + "cat", None)
    chunks = models.clip(models.tokenizer(["dog " * 75, "cat"]))
    assert context.shape == (1, 154, 32)
    assert torch.equal(context[0], chunks.flatten(0, 1))


@pytest.mark.parametrize("prompt, uncond", [("cat " * 160, "dog"), ("cat", "dog " * 160), ("cat", "BREAK BREAK dog")])
def test_the_context_of_the_shorter_half_is_repeated(models, prompt, uncond):
    context = encode_prompt(models, prompt, uncond)
    assert context.shape == (2, 231, 32)
    short, text = (0, "dog") if uncond == "dog" else (1, "cat")
    alone = models.clip(models.tokenizer([text]))[0]  # (77, D)
    torch.testing.assert_close(context[short], alone.repeat(3, 1), rtol=0, atol=1e-5)


def test_every_chunk_is_encoded_once(models):
    seen = []
    handle = models.clip.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        assert encode_prompt(models, ["a BREAK b", "a BREAK b BREAK c"], None).shape == (2, 6 * 77, 32)
    finally:
        handle.remove()
    assert [len(ids) for ids in seen] == [5]


def test_plain_switches_it_all_off(models):
    texts = ["a (cat:1.5) BREAK [dog]", "((a cat"]
    assert torch.equal(encode_prompt(models, texts, None, plain=True), models.clip(models.tokenizer(texts)))
    with pytest.warns(UserWarning, match="Only 75 of the prompt's 80 tokens fit"):
        context = encode_prompt(models, "cat " * 80, plain=True)
    assert context.shape == (2, 77, 32)


def test_encode_prompt_refuses_what_parse_refuses(models):
    with pytest.raises(ValueError, match="nothing closes the '\\(' of '\\(cat'"):
        encode_prompt(models, "a cat", "a (cat")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "prompt, uncond, sentence",
    [
        (None, "", "prompt should be a text or a list of one text or more, not None."),
        ([], None, r"prompt should be a text or a list of one text or more, not \[\]."),
        (["a cat", 3], None, r"prompt should be a text or a list of one text or more, not \['a cat', 3\]."),
        ("a cat", 3, "uncond_prompt should be a text or a list of texts, not 3."),
        (["a", "b", "c"], ["x", "y"], r"uncond_prompt should be one text, or 3 like the prompts, not \['x', 'y'\]."),
    ],
)
def test_encode_prompt_refuses_what_are_no_texts(models, prompt, uncond, sentence, plain):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        encode_prompt(models, prompt, uncond, plain)


def test_encode_prompt_puts_the_unconditional_half_first(models):
    context = encode_prompt(models, ["a cat", "a dog"], "blurry")
    alone = [encode_prompt(models, text, None) for text in ("blurry", "blurry", "a cat", "a dog")]
    torch.testing.assert_close(context, torch.cat(alone), rtol=0, atol=1e-5)
