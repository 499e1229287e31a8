"""Embeddings in every layout give their words to models; files and words that do not fit are refused by name."""

from dataclasses import replace

import pytest
import torch

from sd import load_models
from sd.adapters.textual_inversion import MAX_VECTORS, Embedding, read_embedding, with_embeddings
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import write_checkpoint
from sd.config import SD15
from sd.model_saver import save_folder
from sd.models import Models
from sd.pipeline import encode_prompt, generate
from tests.support.marks import slow
from tests.support.synthetic import MICRO, SD2_MICRO, random_models
from tests.support.synthetic_embeddings import LAYOUTS, TOKEN, layout, saved, vectors, write


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.fixture
def cat(tmp_path):
    return write(tmp_path / "cat.pt", "web ui")


def as_words_of(models: Models, ids: list[int], path) -> Models:
    """Models with an embedding whose vectors are rows of the table."""
    rows = models.clip.token_embedding.weight[ids]
    write(path, "emb_params", rows)
    return with_embeddings(models, [path])


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(tmp_path, name, kind, count):
    if kind == "safetensors" and name not in ("by token", "emb_params"):
        return
    path = write(tmp_path / "My Cat.v2.pt", name, vectors(count), kind)  # the content counts, not the suffix
    embedding = read_embedding(path)
    assert torch.equal(embedding.vectors, vectors(count))
    assert embedding.words == (("my cat.v2", TOKEN) if name == "by token" else ("my cat.v2",))
    assert read_embedding(path, "S*").words == ("s*",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(tmp_path, dtype):
    path = write(tmp_path / "cat.safetensors", "emb_params", vectors().to(dtype))
    embedding = read_embedding(path)
    assert embedding.vectors.dtype == torch.float32
    assert torch.equal(embedding.vectors, vectors().to(dtype).float())


def test_the_file_may_change_later(cat):
    embedding = read_embedding(cat)
    cat.write_bytes(bytes(cat.stat().st_size))
    assert torch.equal(embedding.vectors, vectors())


XL = {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}
BAD_FILES = {
    "XL": (saved(XL, "safetensors"), "is an embedding for Stable Diffusion XL; give one for 1.x or 2.x."),
    "two words": (
        saved({"<a>": torch.zeros(1, 32), "<b>": torch.zeros(1, 32)}),
        "should have one tensor, the vectors of one word, not 2, such as '<a>'.",
    ),
    "a LoRA": (
        saved({f"lora_unet_{i}.alpha": torch.zeros(()) for i in range(264)}, "safetensors"),
        "should be an embedding, but it is a LoRA, a small change to a model rather than a model.",
    ),
    "a model": (
        saved({f"{name}.{i}": torch.zeros(1) for name in ("model.diffusion_model", "first_stage_model") for i in "12"}),
        "should be an embedding, but it is a whole model: give it as the checkpoint.",
    ),
    "a VAE": (
        saved({f"decoder.{i}": torch.zeros(1) for i in "12"}),
        "should be an embedding, but it is a VAE: give it as `vae=`.",
    ),
    "numbers": (saved({f"{i}": torch.zeros(1, 32) for i in range(3)}), "the vectors of one word, not 3, such as '0'."),
    "sparse": (saved({"*": torch.eye(3).to_sparse()}), "has tensor '*' of an unsupported kind _rebuild_sparse_tensor"),
    "no vectors": (
        saved(layout("tensor", torch.zeros(0, 32))),
        "floats of shape (n, width), not float32 of shape (0, 32).",
    ),
    "many": (
        saved(layout("web ui", torch.zeros(76, 32))),
        "floats of shape (n, width), not float32 of shape (76, 32).",
    ),
    "a number": (
        saved(layout("emb_params", torch.zeros(()))),
        "floats of shape (n, width), not float32 of shape ().",
    ),
    "images": (
        saved(layout("tensor", torch.zeros(1, 3, 32))),
        "floats of shape (n, width), not float32 of shape (1, 3, 32).",
    ),
    "integers": (
        saved(layout("tensor", torch.ones(1, 32).long())),
        "(n, width), not int64 of shape (1, 32).",
    ),
    "NaN": (saved(layout("web ui", torch.full((1, 32), torch.nan))), "should have finite vectors, not NaN or infinity"),
    "infinity": (saved(layout("tensor", torch.full((1, 32), torch.inf))), "should have finite vectors, not NaN or"),
    "empty": (b"", "is empty; download it again."),
    "a web page": (b"<!DOCTYPE html><html>", "is a web page (HTML)"),
    "truncated": (saved(layout("web ui", vectors()))[:-400], "is truncated"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = tmp_path / "cat.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_embedding(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path} ")
    assert "\n" not in str(caught.value)


def test_pictures_and_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"cat.png should be a .safetensors, .pt or .bin file: pictures"):
        read_embedding(tmp_path / "cat.png")
    with pytest.raises(FileNotFoundError, match=r"There is no embedding file at .*cat.pt\."):
        read_embedding(tmp_path / "cat.pt")


@pytest.mark.parametrize("word", ["", " ", "\ud800", "a" * 20_000])
def test_words_that_no_prompt_can_have(cat, word):
    with pytest.raises(ValueError, match=r"cat.pt should get a word that a prompt can have, not '"):
        read_embedding(cat, word)


def test_arguments_of_other_types(models, cat):
    with pytest.raises(TypeError, match="embeddings should be a list"):
        with_embeddings(models, cat)
    for given in (None, 3, {cat: "word"}):
        with pytest.raises(TypeError, match=r"^embeddings should be a list of paths or \(path, word\), not "):
            with_embeddings(models, given)
    for given in (None, 3, (cat, 3), (cat, "a", "b"), [None, "a"]):
        with pytest.raises(TypeError, match=r"An embedding should be a path or \(path, word\), not "):
            with_embeddings(models, [given])


def test_vectors_of_another_model(tmp_path, models):
    path = write(tmp_path / "cat.pt", "web ui", vectors(2, 768))
    message = r"cat.pt should have vectors of 32 numbers for these models, not 768 \(Stable Diffusion 1.x\)\."
    with pytest.raises(ValueError, match=message):
        with_embeddings(models, [path])
    wide = replace(SD15.text, layers=1, vocab_size=49408)
    sd15 = replace(models, clip=type(models.clip)(wide))
    write(path, "web ui", vectors(1, 1024))
    message = r"vectors of 768 numbers \(Stable Diffusion 1.x\) for these models, not 1024 \(Stable Diffusion 2.x\)\."
    with pytest.raises(ValueError, match=message):
        with_embeddings(sd15, [path])


@pytest.mark.parametrize("config", [MICRO, SD2_MICRO])
def test_a_word_for_a_known_token_gives_the_same_context(tmp_path, config):
    models = random_models(config)
    new = as_words_of(models, [1929], tmp_path / "s.pt")  # dog
    ours, known = (encode_prompt(m, f"a {word} on grass", None) for m, word in ((new, "S"), (models, "dog")))
    assert torch.equal(ours, known)


def test_several_vectors_in_weights_and_negative_prompts(tmp_path, models):
    ids = models.tokenizer.encode("red lighthouse")
    new = as_words_of(models, ids, tmp_path / "s.pt")
    prompts = "a (S:1.3) at night, [S]", "(S), fog"
    ours = encode_prompt(new, *prompts)
    known = encode_prompt(models, *(prompt.replace("S", "red lighthouse") for prompt in prompts))
    assert torch.equal(ours, known)


def test_a_word_at_the_end_of_a_chunk_goes_whole_into_the_next(tmp_path, models):
    ids = models.tokenizer.encode("red lighthouse")
    new = as_words_of(models, ids, tmp_path / "s.pt")
    ours = encode_prompt(new, "a " * 74 + "S", None)
    known = encode_prompt(models, "a " * 74 + "BREAK red lighthouse", None)
    assert ours.shape == (1, 154, 32)
    assert torch.equal(ours, known)


def test_a_word_can_fill_a_chunk(tmp_path, models):
    new = as_words_of(models, list(range(MAX_VECTORS)), tmp_path / "s.pt")
    assert encode_prompt(new, "S", None).shape == (1, 77, 32)
    assert encode_prompt(new, "a S b", None).shape == (1, 3 * 77, 32)


def test_the_base_stays_and_the_rest_is_shared(models, cat):
    table, config, tokenizer = models.clip.token_embedding.weight, models.config, models.tokenizer
    new = with_embeddings(models, [cat])
    assert models.clip.token_embedding.weight is table
    assert (models.config, models.tokenizer) == (config, tokenizer)
    assert len(table) == 49408 == models.clip.config.vocab_size
    assert torch.equal(new.clip.token_embedding.weight, torch.cat([table, vectors()]))
    assert new.config.text.vocab_size == new.clip.config.vocab_size == 49411
    for name in ("encoder", "decoder", "diffusion"):
        assert getattr(new, name) is getattr(models, name)
    theirs = {name: weight.data_ptr() for name, weight in models.clip.named_parameters()}
    ours = {name: weight.data_ptr() for name, weight in new.clip.named_parameters()}
    assert [name for name in ours if ours[name] != theirs[name]] == ["token_embedding.weight"]
    assert not any(weight.requires_grad for weight in new.clip.parameters())
    new.clip.double()  # moving one does not move the other
    assert models.clip.norm.weight.dtype == torch.float32


def test_words_of_two_calls_and_two_files(tmp_path, models, cat):
    other = write(tmp_path / "style_1.safetensors", "emb_params", vectors(2, seed=1))
    both = with_embeddings(models, [cat, (str(other), "<Style>")])
    one_by_one = with_embeddings(with_embeddings(models, [cat]), [(other, "<style>")])
    for new in (both, one_by_one):
        assert new.tokenizer.encode("<STYLE> cat") == [49411, 49412, 49408, 49409, 49410]
        assert torch.equal(new.clip.token_embedding.weight[49408:], torch.cat([vectors(), vectors(2, seed=1)]))


def test_numbers_in_names_are_not_vectors(tmp_path, models):
    """As in the web UI; in a folder of diffusers, "style_1" is the second vector of "style"."""
    paths = [write(tmp_path / f"style{end}.pt", "tensor", vectors(2)) for end in ("", "_1")]
    new = with_embeddings(models, paths)
    assert new.tokenizer.encode("style") == [49408, 49409]
    assert new.tokenizer.encode("style_1") == [49410, 49411]
    with pytest.raises(ValueError, match="The word 'style' should get another name to be saved: 'style_1' and so on"):
        save_folder(new, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_word_that_the_models_have(models, cat):
    new = with_embeddings(models, [cat])
    with pytest.raises(ValueError, match=r"cat.pt should get another word than 'cat', which the models have\."):
        with_embeddings(new, [cat])
    with pytest.raises(ValueError, match="should get another word than 's'"):
        with_embeddings(models, [(cat, "s"), (cat, "S")])


def test_large_values_and_16_bit_tables(tmp_path, models):
    """Negative embeddings often have values far larger than CLIP's own: they are kept, unless the dtype cannot."""
    path = write(tmp_path / "bad.pt", "tensor", vectors() * 1e6)
    assert torch.equal(with_embeddings(models, [path]).clip.token_embedding.weight[49408:], vectors() * 1e6)
    half = random_models(MICRO)
    half.clip.half()
    with pytest.raises(ValueError, match="bad.pt has numbers that float16 cannot hold: load the models in another"):
        with_embeddings(half, [path])
    write(path, "tensor", vectors() * 1e3)
    table = with_embeddings(half, [path]).clip.token_embedding.weight
    assert table.dtype == torch.float16
    assert torch.equal(table[49408:], (vectors() * 1e3).half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32)])
def test_load_models_with_embeddings(demo_checkpoint, cat, dtype):
    new = load_models(demo_checkpoint, "cpu", dtype, embeddings=[cat, (cat, "<kitten>")])
    base = load_models(demo_checkpoint, "cpu", dtype)
    again = with_embeddings(base, [Embedding(cat, ("cat",), vectors()), (cat, "<kitten>")])
    contexts = [encode_prompt(models, "a cat and a <kitten>", None) for models in (new, again, base)]
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.equal(contexts[0], contexts[2])
    image, other = (generate("a cat", models=m, seed=1, n_inference_steps=1) for m in (new, base))
    assert (image != other).any()


def test_bad_embeddings_are_refused_before_the_checkpoint_is_read(tmp_path, cat):
    with pytest.raises(FileNotFoundError, match="There is no embedding file at"):
        load_models(tmp_path / "absent.ckpt", embeddings=[tmp_path / "absent.pt"])
    with pytest.raises(TypeError, match="embeddings should be a list"):
        load_models(tmp_path / "absent.ckpt", embeddings=str(cat))


@pytest.mark.slow
def test_words_are_saved_in_a_folder_and_not_in_a_file(tmp_path, models, cat):
    new = with_embeddings(models, [cat, (write(tmp_path / "b.pt", "tensor", vectors(1)), "<b>")])
    save_folder(new, tmp_path / "folder")
    back = load_models(tmp_path / "folder", "cpu", torch.float32, tuned=False)
    assert back.config == new.config
    prompt = "a cat with <b>"
    assert torch.equal(encode_prompt(back, prompt, None), encode_prompt(new, prompt, None))
    more = with_embeddings(back, [(cat, "<c>")])
    assert more.tokenizer.encode("cat <c>") == [49408, 49409, 49410, 49412, 49413, 49414]
    from sd.model_converter import to_compvis

    write_checkpoint(tmp_path / "one.safetensors", to_compvis(new), new.config.to_dict())
    assert load_models(tmp_path / "one.safetensors", "cpu").tokenizer.encode("cat") == [2368]
