"""The tokenizer alone: known ids, shapes, decoding, bad input, and speed."""

import json
import math
import pickle
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd import tokenizer as module
from sd.tokenizer import MAX_CHARACTERS, CLIPTokenizer, Tokenizer, read_merges, spell, split

SEA = "painting depicting the sea, sunrise, ship, artstation, 4k, concept art"
SEA_IDS = [3086, 24970, 518, 2102, 267, 5610, 267, 1158, 267, 1486, 2631, 267, 275, 330, 267, 6353, 794]
KNOWN = {
    "": [],
    " \n\t": [],
    "cat": [2368],
    "panda": [12952],
    "A picture of a puppy.": [320, 1674, 539, 320, 6829, 269],
    SEA: SEA_IDS,
    "<|startoftext|>cat<|endoftext|>": [49406, 2368, 49407],
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def write_merges(folder, *lines, header="#version: 0.2"):
    path = folder / "merges.txt"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def test_vocabulary(tokenizer):
    assert len(tokenizer) == len(tokenizer.vocab) == len(tokenizer.symbols) == 49408
    assert len(tokenizer.merges) == len(tokenizer.ranks) == 48894
    assert (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert (tokenizer.symbols[0], tokenizer.symbols[256], tokenizer.symbols[512]) == ("!", "!</w>", "in")
    assert tokenizer.vocab["cat</w>"] == 2368


@pytest.mark.parametrize("text, ids", KNOWN.items())
def test_known_ids(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("pad", [None, 0])
def test_call_adds_start_end_and_padding(pad):
    tokens = Tokenizer(pad_token_id=pad)(["cat", SEA, ""])
    assert tokens.shape == (3, 77)
    assert tokens.dtype == torch.long
    fill = 49407 if pad is None else pad
    for row, ids in zip(tokens.tolist(), [[2368], SEA_IDS, []]):
        assert row == [49406, *ids, 49407] + [fill] * (75 - len(ids))


def test_call_takes_a_prompt_or_a_list(tokenizer):
    assert torch.equal(tokenizer("cat"), tokenizer(["cat"]))
    assert tokenizer([]).shape == (0, 77)
    assert Tokenizer(context_length=5)("cat").tolist() == [[49406, 2368, 49407, 49407, 49407]]


def test_default_merges_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Tokenizer().encode("cat") == [2368]


def test_survives_pickling(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode(SEA) == SEA_IDS


def test_75_ids_fit_without_a_warning(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer("cat " * 75)[0].tolist() == [49406, *[2368] * 75, 49407]


def test_truncation_quotes_what_was_dropped(tokenizer):
    with pytest.warns(UserWarning, match=r"Only 75 of the prompt's 78 tokens fit. Dropped: 'in the rain'") as caught:
        tokens = tokenizer(["cat", "cat " * 75 + "in the Rain"])
    assert tokens[1].tolist() == [49406, *[2368] * 75, 49407]
    assert caught[0].filename == __file__  # the warning points at the caller


def test_a_long_quote_is_shortened(tokenizer):
    with pytest.warns(UserWarning, match=r"dog dog \.\.\.'$") as caught:
        tokenizer("cat " * 75 + "dog " * 2000)
    assert len(str(caught[0].message)) < 400


@pytest.mark.parametrize("text", ["a photo of a cat , 4 k", "naïve café", "水 😀 ю", "</ w >", ""])
def test_decode_returns_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer(text)[0]) == text
    assert tokenizer.decode(np.array(tokenizer.encode(text), dtype=int)) == text


def test_decode_drops_padding_but_no_exclamation_mark():
    tokenizer = Tokenizer(pad_token_id=0)  # 0 is also "!", when a symbol follows it in the same word
    assert tokenizer.encode("!?#")[0] == 0
    assert tokenizer.decode(tokenizer("cat !?#")[0]) == "cat !?#"


def test_decode_replaces_incomplete_utf8(tokenizer):
    assert tokenizer.decode([tokenizer.vocab["ð"], 2368]) == "\ufffdcat"


@pytest.mark.parametrize("ids", [[49408], [-1], [2.0], ["cat"], [[320]], torch.zeros(1, 77, dtype=torch.long)])
def test_decode_refuses_invalid_ids(tokenizer, ids):
    with pytest.raises(ValueError, match="A token id should be an integer from 0 to 49407, not "):
        tokenizer.decode(ids)


@pytest.mark.parametrize("prompt", [None, 7, b"cat", ["cat", None]])
def test_a_prompt_must_be_a_string(tokenizer, prompt):
    with pytest.raises(TypeError, match=r"must be a string, not|takes a prompt or a list of prompts, not"):
        tokenizer(prompt)
    with pytest.raises(TypeError, match="A prompt must be a string, not"):
        tokenizer.encode(prompt)


@pytest.mark.parametrize("text", ["\ud83d", "a \udc80 b", "\ude00\ud83d", "&amp; \udfff"])
def test_half_a_character_is_an_error(tokenizer, text):
    with pytest.raises(ValueError, match="must be valid Unicode; .* has a lone surrogate"):
        tokenizer.encode(text)


def test_an_entity_of_thousands_of_digits_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="HTML entity with more digits"):
        tokenizer.encode("&#" + "9" * 5000 + ";")


def test_a_prompt_may_have_10000_characters(tokenizer):
    assert MAX_CHARACTERS == 10_000
    assert tokenizer.encode(" " * 9_997 + "cat") == [2368]
    for text in ("cat" + " " * 9_998, "é" * 10_001, "&amp;" * 200_000):
        with pytest.raises(ValueError, match=f"^prompt should be at most 10000 characters long, not {len(text)}\\.$"):
            tokenizer.encode(text)


def test_words_and_their_spelling():
    assert split(" It's\n42&amp;! ") == ["it", "'s", "4", "2", "&!"]
    assert spell("é a") == ["Ã", "©", "Ġ", "a</w>"]


def test_merges_apply_in_their_order_and_from_left_to_right(tmp_path):
    tokenizer = Tokenizer(write_merges(tmp_path, "n a", "a n", "an na", "a a"))
    assert list(tokenizer.merge_steps("banana")) == [
        ["b", "a", "n", "a", "n", "a</w>"],
        ["b", "a", "na", "n", "a</w>"],
    ]
    assert list(tokenizer.merge_steps("aaaa!"))[1:] == [["aa", "a", "a", "!</w>"], ["aa", "aa", "!</w>"]]
    assert list(tokenizer.merge_steps("aaab"))[-1] == ["aa", "a", "b</w>"]
    assert len(tokenizer) == tokenizer.end_token_id + 1 == 512 + 4 + 2


def textbook(symbols, ranks):
    """Algorithm 1 of the paper: find the best pair, join all its occurrences, look again."""
    while True:
        pair = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, math.inf), default=None)
        if pair not in ranks:
            return symbols
        joined = []
        while symbols:
            size = 2 if tuple(symbols[:2]) == pair else 1
            joined, symbols = [*joined, "".join(symbols[:size])], symbols[size:]
        symbols = joined


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_merges_give_the_textbook_result(data, tmp_path_factory):
    symbols, lines = ["a", "b", "a</w>", "b</w>"], []
    for _ in range(data.draw(st.integers(0, 12))):
        left, right = data.draw(st.sampled_from(symbols)), data.draw(st.sampled_from(symbols))
        lines.append(f"{left} {right}")
        symbols.append(left + right)
    tokenizer = Tokenizer(write_merges(tmp_path_factory.mktemp("merges"), *lines))
    word = data.draw(st.text("ab", min_size=1, max_size=40))
    assert list(tokenizer.merge_steps(word))[-1] == textbook(spell(word), tokenizer.ranks)


@pytest.mark.parametrize("alphabet", ["ab", "aehnt", "!.-", "a\u0301é"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_clips_merges_give_the_textbook_result(alphabet, tokenizer, data):
    word = data.draw(st.text(alphabet, min_size=1, max_size=60))
    assert list(tokenizer.merge_steps(word))[-1] == textbook(spell(word), tokenizer.ranks)


@pytest.mark.parametrize("line", ["a", "a b c", "", "a bc", "ab c", "水 a", "a  b"])
def test_a_malformed_merge_is_named(tmp_path, line):
    path = write_merges(tmp_path, "b c</w>", line, "a b")
    with pytest.raises(ValueError, match=r"merges\.txt, line 3, should be two known symbols, not "):
        read_merges(path)


def test_files_without_merges(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file of merges at"):
        Tokenizer(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="There is no file of merges at"):
        Tokenizer(tmp_path)
    for header in ("a b", "", "PK\x03\x04"):
        with pytest.raises(ValueError, match="its first line should begin with '#version'"):
            Tokenizer(write_merges(tmp_path, "a b", header=header))
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="is not a file of merges"):
        Tokenizer(tmp_path / "binary")


def test_a_vocabulary_must_fit_the_merges(tmp_path, tokenizer):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(tokenizer.vocab), encoding="utf-8")
    assert Tokenizer(vocab_file=path).encode("cat") == [2368]
    path.write_text(json.dumps(tokenizer.vocab | {"cat</w>": 1, "no symbol": 49408}), encoding="utf-8")
    with pytest.raises(ValueError, match="the id of 'cat</w>' should be 2368, not 1\\.$"):
        Tokenizer(vocab_file=path)
    for text in ('{"a": 1', "[1, 2]", "7", "[" * 100_000, "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"vocab\.json is not a vocabulary: it should be a JSON object"):
            Tokenizer(vocab_file=path)
    with pytest.raises(FileNotFoundError, match="There is no vocabulary file at"):
        Tokenizer(vocab_file=tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"pad_token_id": 49408}, "pad_token_id should be from 0 to 49407, not 49408."),
        ({"pad_token_id": -1}, "pad_token_id should be from 0 to 49407, not -1."),
        ({"context_length": 1}, "context_length should be 2 or more, not 1."),
    ],
)
def test_lengths_and_padding_are_checked(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Tokenizer(**wrong)


def test_the_name_that_the_video_uses(tmp_path):
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), merges_file=str(write_merges(tmp_path, "a b</w>")))
    assert tokenizer.encode("ab") == [512]
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="does not fit the merges"):
        CLIPTokenizer(tmp_path / "vocab.json", merges_file=tmp_path / "merges.txt")


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "CACHED_WORDS", 10)
    tokenizer = Tokenizer()
    for number in range(100):
        tokenizer.encode(f"{'x' * (number % 20 + 1)} {'long' * 10}")
        assert len(tokenizer._cache) <= 10
    assert max(map(len, tokenizer._cache)) <= module.CACHED_LENGTH


def seconds(function, repeats=3):
    """CPU time of the fastest run: a busy machine should not fail the test."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def test_speed_of_typical_prompts(tokenizer):
    """At least 5,000 prompts a second to ids, and 2,500 to rows of 77. One core reaches about ten times as many."""
    prompts = [f"{SEA}, number {n}" for n in range(500)]
    assert seconds(lambda: [tokenizer.encode(prompt) for prompt in prompts]) < 0.1
    assert seconds(lambda: tokenizer(prompts)) < 0.2


def test_loading_is_fast():
    assert seconds(Tokenizer) < 0.3
