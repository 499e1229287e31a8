"""The words of the training captions, and the text of `demo.py --world`."""

import pytest
import torch

from sd.model_loader import load_models
from sd.training.world.scenes import scene_and_captions
from sd.training.world.vocabulary import describe, known_words, unknown_words


def test_every_training_caption_is_known():
    captions = [caption for seed in range(300) for caption in scene_and_captions(seed)[1]]
    assert [words for caption in captions if (words := unknown_words(caption))] == []


@pytest.mark.parametrize(
    "prompt, unknown",
    [
        ("A RED house, at noon!", []),
        ("an astronaut riding an astronaut on the left", ["astronaut", "riding"]),
        ("", []),
        ("42 (%$", []),
        ("ein Haus", ["ein", "haus"]),
        ("two yellow tents behind a cottage, no cacti", []),
        ("no windmill, only a rocket", ["windmill", "rocket"]),
    ],
)
def test_unknown_words(prompt, unknown):
    assert unknown_words(prompt) == unknown


def test_words_that_a_model_was_not_trained_on():
    """Training sets the embeddings of words that never occur to zero."""
    models = load_models(device="cpu", dtype=torch.float32)
    prompt = "two tents behind a RED cottage at noon"
    assert unknown_words(prompt, models) == []
    for word in ("tents", "behind"):
        models.clip.token_embedding.weight.data[models.tokenizer.encode(word)] = 0
    assert unknown_words(prompt, models) == ["tents", "behind"]


def test_the_examples_in_the_description_have_only_known_words():
    examples = describe().split('"')[1::2]
    assert len(examples) == 3
    assert unknown_words(" ".join(examples)) == []
    assert {"house", "purple", "night", "left", "moon"} <= known_words()
    assert all(word in describe() for word in ("lighthouse", "cactus", "purple", "in the desert", "at dawn"))
