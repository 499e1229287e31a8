"""Words of textual inversion are one token each, whatever stands around them; all other text is read as before."""

import pytest

from sd.prompts.added_words import TokenizerWithWords
from sd.prompts.weights import layout
from sd.tokenizer import Tokenizer

WORDS = {"<my-cat>": 49408, "<my-cat>_1": 49409, "<my-cat>_2": 49410, "sks": 49412, "<Größe>": 49413}
CAT = [49408, 49409, 49410]


@pytest.fixture(scope="module")
def plain():
    return Tokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return TokenizerWithWords(WORDS)


def test_an_added_word_is_one_token_for_each_vector(tokenizer):
    assert tokenizer.encode("<my-cat>") == CAT
    assert tokenizer.encode("sks") == [49412]


@pytest.mark.parametrize("text", ["a {} on grass", "a {}, red", "!{}", "{}!", "({})", "two{}cats", "{} {}", "  {}"])
def test_the_text_around_it_is_read_as_before(tokenizer, plain, text):
    parts = text.split("{}")
    expected = plain.encode(parts[0])
    for part in parts[1:]:
        expected += CAT + plain.encode(part)
    assert tokenizer.encode(text.replace("{}", "<my-cat>")) == expected


def test_case_does_not_matter(tokenizer):
    assert tokenizer.encode("a <MY-Cat>") == tokenizer.encode("a <my-cat>")
    assert tokenizer.encode("<größe> <GRÖSSE>")[0] == 49413


def test_one_vector_of_several_can_be_written(tokenizer):
    assert tokenizer.encode("<my-cat>_1") == [49409]


@pytest.mark.parametrize("text", ["", "a cat", "my-cat", "< my-cat>", "it's 42!", "größe", "<|endoftext|> end"])
def test_other_text_is_unchanged(tokenizer, plain, text):
    assert tokenizer.encode(text) == plain.encode(text)
    assert (tokenizer(text) == plain(text)).all()


def test_words_are_decoded(tokenizer, plain):
    assert tokenizer.decode(tokenizer.encode("a sks house")) == "a sks house"
    assert tokenizer.decode([320, 49408, 1929]) == "a <my-cat> dog"
    assert tokenizer.decode([49411]) == ""  # an id between added words that no word has
    assert len(tokenizer) == 49414
    assert len(plain) == 49408


def test_weights_apply_to_added_words(tokenizer):
    tokens, weights, _ = layout(["a (<my-cat>:1.5)"], tokenizer)
    assert tokens[0, 1:5].tolist() == [320, *CAT]
    assert weights[0, 1:5].tolist() == [1, 1.5, 1.5, 1.5]


def test_the_limit_on_characters_holds(tokenizer):
    with pytest.raises(ValueError, match="at most 10000 characters"):
        tokenizer.encode("<my-cat> " * 2000)


def test_a_taken_id_is_refused():
    with pytest.raises(ValueError, match="The id of '<a>' should be 49,408 or more, not 5"):
        TokenizerWithWords({"<a>": 5})


def test_the_same_ids_as_transformers(tmp_path, tokenizer, plain):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer(
        vocab=plain.vocab, merges=plain.merges, bos_token="<|startoftext|>", eos_token="<|endoftext|>"
    )
    theirs.add_tokens(["<dog>", "zqx"])
    ours = TokenizerWithWords({"<dog>": 49408, "zqx": 49409})
    for text in ("a <dog> on grass", "<dog>!", "a photo of zqx, red", "two <dog> <dog>", "a cat", "(<dog>)"):
        assert [49406, *ours.encode(text), 49407] == theirs(text).input_ids


def test_no_words_at_all(plain):
    assert TokenizerWithWords({}).encode("a cat") == plain.encode("a cat")
