"""Words of textual inversion are one token for each vector, whatever is around them; other text is read as before."""

import pytest

from sd.prompts.added_words import TokenizerWithWords, any_of, flat, grouped, words_in
from sd.prompts.weights import chunks_of, layout
from sd.tokenizer import Tokenizer

WORDS = {"<my-cat>": 49408, "<my-cat>_1": 49409, "<my-cat>_2": 49410, "sks": 49412, "<Größe>": 49413}
CAT = [49408, 49409, 49410]


@pytest.fixture(scope="module")
def plain():
    return Tokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return TokenizerWithWords(grouped(WORDS))


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
        TokenizerWithWords({"<a>": [5]})


def test_the_same_ids_as_transformers(tmp_path, tokenizer, plain):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer(
        vocab=plain.vocab, merges=plain.merges, bos_token="<|startoftext|>", eos_token="<|endoftext|>"
    )
    theirs.add_tokens(["<dog>", "zqx"])
    ours = TokenizerWithWords({"<dog>": [49408], "zqx": [49409]})
    for text in ("a <dog> on grass", "<dog>!", "a photo of zqx, red", "two <dog> <dog>", "a cat", "(<dog>)"):
        assert [49406, *ours.encode(text), 49407] == theirs(text).input_ids


def test_no_words_at_all(plain):
    assert TokenizerWithWords({}).encode("a cat") == plain.encode("a cat")


def test_vectors_have_names_as_in_diffusers():
    groups = {"<my-cat>": CAT, "<my-cat>_1": [49409], "<my-cat>_2": [49410], "sks": [49412], "<Größe>": [49413]}
    assert grouped(WORDS) == groups
    assert flat(groups) == WORDS
    assert flat({"a": [5, 6], "b": [7]}) == {"a": 5, "a_1": 6, "b": 7}


@pytest.mark.parametrize("text", ["asks", "sksy", "sks2", "9sks", "ésks"])
def test_a_word_is_not_found_inside_a_longer_one(tokenizer, plain, text):
    assert tokenizer.encode(text) == plain.encode(text)


def test_the_longest_word_comes_first():
    tokenizer = TokenizerWithWords({"bad": [49408], "bad_hands": [49409], "bad_hands-5": [49410]})
    texts = ["bad", "bad_hands", "Bad_Hands-5", "bad hands"]
    assert [tokenizer.encode(text)[0] for text in texts] == [49408, 49409, 49410, 49408]


def test_words_in_prompts():
    words = ["style (v2)", "sks", "<my-cat>", "bad-hands"]
    prompts = [r"a (SKS:1.3) [house] in style \(v2\)", "two bad-hands BREAK dogs, asks"]
    assert words_in(prompts, words) == {"style (v2)", "sks", "bad-hands"}
    assert words_in([], words) == words_in(prompts, []) == set()
    assert not any_of([]).search("")


def ids(chunk):
    return [token for token, _ in chunk]


@pytest.mark.parametrize("before, in_first", [(71, 4), (72, 3), (73, 0), (74, 0), (75, 0)])
def test_a_word_is_not_cut_between_chunks(tokenizer, plain, before, in_first):
    """As in the web UI: if not all of its vectors fit, all of them go into the next chunk."""
    tokens = CAT + plain.encode("b")
    parts = [[320] * before + tokens[:in_first], tokens[in_first:]]
    chunks = chunks_of("a " * before + "(<my-cat>:1.2) b", tokenizer)
    assert [ids(chunk) for chunk in chunks] == [part for part in parts if part]
    weights = {token: weight for chunk in chunks for token, weight in chunk}
    assert [weights[token] for token in tokens] == [1.2, 1.2, 1.2, 1]


def test_a_word_that_does_not_fit_leaves_its_phrase_behind(tokenizer, plain):
    """As in the web UI: only when the chunk is full does the text after a comma move along."""
    start, phrase = "a " * 66 + ",", " b" * 7  # 74 tokens
    parts = [plain.encode(start + phrase), CAT]
    assert [ids(chunk) for chunk in chunks_of(start + phrase + " <my-cat>", tokenizer)] == parts
    parts = [plain.encode(start), plain.encode(phrase + " b") + CAT]
    assert [ids(chunk) for chunk in chunks_of(start + phrase + " b <my-cat>", tokenizer)] == parts


def test_many_words_in_a_row(tokenizer):
    first, second = chunks_of("a " + "<my-cat> " * 30, tokenizer)
    assert [ids(first), ids(second)] == [[320] + CAT * 24, CAT * 6]


def test_a_word_with_too_many_vectors_for_a_chunk_is_cut():
    tokenizer = TokenizerWithWords({"<all>": list(range(49408, 49508))})
    first, second = chunks_of("<all>", tokenizer)
    assert ids(first) + ids(second) == tokenizer.added["<all>"]
    assert len(first) == 75
