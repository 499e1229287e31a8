"""The text encoder. Its agreement with transformers is tested in parity/."""

import pytest
import torch

from tests.support.synthetic import MICRO, random_networks


@pytest.fixture(scope="module")
def clip():
    return random_networks(MICRO).clip


def test_forward_is_embed_then_encode(clip):
    tokens = torch.randint(0, 49408, (2, 77))
    assert torch.equal(clip(tokens), clip.encode(clip.embed(tokens)))
    assert clip(tokens).shape == (2, 77, MICRO.text.width)


def test_embed_adds_token_and_position(clip):
    tokens = torch.tensor([[49406, 320, 320]])
    embeddings = clip.embed(tokens)
    assert torch.equal(embeddings[0, 1], clip.token_embedding.weight[320] + clip.position_embedding.weight[1])
    assert not torch.equal(embeddings[0, 1], embeddings[0, 2])


def test_a_token_sees_only_those_before_it(clip):
    tokens = torch.randint(0, 49408, (1, 77))
    changed = tokens.clone()
    changed[:, 40:] = 7
    before, after = clip(tokens), clip(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-6)
    assert (before[:, 40:] - after[:, 40:]).abs().amax(-1).min() > 1e-3


def test_a_prompt_is_encoded_alone_as_in_a_batch(clip):
    tokens = torch.randint(0, 49408, (3, 77))
    torch.testing.assert_close(clip(tokens)[1:2], clip(tokens[1:2]), rtol=0, atol=1e-6)
