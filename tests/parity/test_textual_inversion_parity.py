"""Embedding files read by diffusers and here: the same context, in prompts with one or more of their words."""

import pytest
import torch

from sd import load_models
from sd.adapters.textual_inversion import with_embeddings
from sd.model_saver import save_folder
from sd.pipeline import encode_prompt
from tests.support.marks import slow
from tests.support.synthetic import MICRO, SD2_MICRO, random_models
from tests.support.synthetic_embeddings import vectors, write

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 2e-5
WORD = "<my-cat>"
# Without "!", which transformers' tokenizer of SD 2.x takes for padding.
PROMPTS = ["{}", "a photo of {} on grass", "{}, red; {}?", "a ({}) [x]", "two {} {}", "no word"]
# The suffix, the layout and the vectors. diffusers refuses the paper's own ParameterDict.
FILES = [(".pt", "web ui", 1), (".pt", "web ui", 8), (".bin", "by token", 1), (".bin", "by token", 3)]
FILES += [(".safetensors", "by token", 2), (".safetensors", "emb_params", 4), (".pt", "tensor", 2)]


def their_context(pipe, prompt):
    """What the pipeline gives for a prompt: its U-Net's context, (1, 77, D)."""
    return pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0]


@pytest.fixture(scope="module", params=[MICRO, slow(SD2_MICRO)], ids=["sd15", "sd2"])
def base(request, tmp_path_factory):
    models = random_models(request.param)
    folder = tmp_path_factory.mktemp("base") / "model"
    save_folder(models, folder)
    return models, folder


def opened(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_equal_contexts(pipe, models, word=WORD):
    largest = 0
    for prompt in PROMPTS:
        text = prompt.format(*[word] * 2)
        ours = encode_prompt(models, text, None, plain=True)
        largest = max(largest, (ours - their_context(pipe, text)).abs().max().item())
    print(f"largest difference {largest:.1e}")
    assert largest <= TOLERANCE


def test_the_same_context_as_in_diffusers(tmp_path, base):
    models, folder = base
    pipe = opened(folder)
    for number, (suffix, layout, count) in enumerate(FILES):
        word = f"<my-cat-{number}>"
        path = write(tmp_path / f"cat{number}{suffix}", layout, vectors(count, seed=number))
        state = torch.load(path) if layout == "tensor" else path
        pipe.load_textual_inversion(state, token=word, use_safetensors=suffix == ".safetensors")
        models = with_embeddings(models, [(path, word)])
        assert_equal_contexts(pipe, models, word)


def test_diffusers_opens_a_saved_folder_with_the_words(tmp_path, base):
    models, _ = base
    paths = [write(tmp_path / f"cat{i}.pt", "tensor", vectors(count)) for i, count in enumerate((3, 1))]
    new = with_embeddings(models, [(paths[0], WORD), (paths[1], "sks-style")])
    save_folder(new, tmp_path / "model")
    pipe = opened(tmp_path / "model")
    for word in (WORD, "sks-style"):
        assert_equal_contexts(pipe, new, word)
    assert_equal_contexts(pipe, load_models(tmp_path / "model", "cpu", torch.float32))
