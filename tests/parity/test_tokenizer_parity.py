"""The same ids as OpenAI's own tokenizer, which the package clip-anytorch contains unchanged."""

import gzip
import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.tokenizer import Tokenizer

PACKAGE = "clip-anytorch==2.6.0"


@pytest.fixture(scope="module")
def original_module():
    """Loaded by its path, because the package `clip` imports torchvision."""
    package = importlib.util.find_spec("clip")
    folder = Path(next(iter(package.submodule_search_locations))) if package else Path()
    if not (folder / "simple_tokenizer.py").is_file():
        pytest.skip(f"needs OpenAI's tokenizer: pip install --no-deps {PACKAGE}")
    spec = importlib.util.spec_from_file_location("original_tokenizer", folder / "simple_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def original(original_module):
    return original_module.SimpleTokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


CORPUS = [
    "",
    " \t\r\n\x0b\x0c\x1c\x85\u00a0\u2028\u3000",
    "A picture of a puppy.",
    "it's they'll we'VE i'd i'm don't 'tis 's' ''ll ’s ‘quoted’ “curly” 'ſ K",
    "snake_case __init__ 3.14159 ½ ² Ⅷ ٣ 1234567890 4k 8K",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇯🇵 ☕️ 😀😀😀",
    "水墨画 山水 日本語のテキスト 한국어 ｶﾀｶﾅ Ｆｕｌｌ　ｗｉｄｔｈ",
    "e\u0301 E\u0301 o\u0308\u0301 \u0301start क्षि สวัสดี עִבְרִית عَرَبِيّ İstanbul ẞ ǅ ﬁ ﬆ",
    "Z\u0351\u036b\u0343a\u0327\u0301\u0316l\u0322\u0315g\u0334o\u0489",
    "\x00a\x01b\x7fc\x80d\x9fe\ufefff\u200bg\u202eh\ufffei\U0010ffffj \x1b[31mred\x1b[0m",
    "&amp; &lt;b&gt; &amp;lt; &amp;amp;lt; &eacute; &EACUTE; &#233; &#xe9; &#0; &#xD800; &#x110000; &notit; &amp",
    "<b>&amp;amp;lt;</b>\n&amp;amp;amp;lt;",
    "first &amp;amp;amp;amp;lt;\nthen <i>&amp;amp;amp;amp;lt;",
    "cafÃ© naÃ¯ve donâ€™t Ð¿Ñ€Ð¸Ð²ÐµÑ‚ ð\x9f\x98\x80 schÃ¶n voilÃ le travail",
    "<|startoftext|>cat<|endoftext|> <|StartOfText|> <|endoftext|><|endoftext|> <|ſtartoftext|> <| startoftext |> </w>",
    "\ud83d\ude00 two halves",
    "word " * 2000,
    "a" * 10_000,
    "ab" * 5_000,
    "!?" * 5_000,
    "水" * 10_000,
    "incomprehensibilities" * 400,
]


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_fixed_corpus(tokenizer, original, text):
    assert tokenizer.encode(text) == original.encode(text)


def test_vocabulary(tokenizer, original):
    assert tokenizer.vocab == original.encoder
    assert tokenizer.ranks == original.bpe_ranks


@pytest.mark.parametrize("pattern", ["{0}", "a{0}B'{0} 1{0}{0}", "x&#{1};y", "<&amp;#{1};"])
def test_every_character_of_the_first_planes(tokenizer, original, pattern):
    """The first 768 characters and general punctuation, then every 37th character."""
    for code in [*range(0x300), *range(0x2000, 0x2100), *range(0x300, 0xD800, 37), *range(0xE000, 0x20000, 37)]:
        text = pattern.format(chr(code), code)
        assert tokenizer.encode(text) == original.encode(text), ascii(text)


PLANES = [(0x20, 0x7F), (0x20, 0x7F), (0, 0x100), (0x100, 0x600), (0x600, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000)]
PLANES += [(plane << 16, (plane + 1) << 16) for plane in range(1, 17)]
PIECES = [
    "&amp;",
    "&#38;",
    "&lt;",
    "&eacute;",
    "<",
    "\n",
    "'s",
    "<|startoftext|>",
    "Ã©",
    "â€™",
    "\u0301",
    "\u200d",
    "＆",
]
PIECES += [" ", " ", "the ", "painting ", "12", "!!!"]


def random_text(rng):
    """Up to 24 characters of one to three planes, mixed with pieces that the cleaning repairs."""
    planes = rng.choices(PLANES, k=rng.randint(1, 3))
    length = rng.randint(0, 24)
    return "".join(
        rng.choice(PIECES) if rng.random() < 0.2 else chr(rng.randrange(*rng.choice(planes))) for _ in range(length)
    )


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_texts(count, tokenizer, original):
    rng = random.Random(count)
    for _ in range(count):
        text = random_text(rng)
        assert tokenizer.encode(text) == original.encode(text), ascii(text)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(text=st.text())
def test_any_text(tokenizer, original, text):
    assert tokenizer.encode(text) == original.encode(text)


@pytest.mark.parametrize("alphabet", ["ab", "aehnt", "!.-", "é\u0301", "水火"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_words_of_few_letters(alphabet, tokenizer, original, data):
    """Pairs repeat and overlap, so only the right order of the merges gives the right ids."""
    word = data.draw(st.text(alphabet, max_size=120))
    assert tokenizer.encode(word) == original.encode(word)


@pytest.mark.slow
def test_entities_within_entities_and_heaps_of_accents(tokenizer, original):
    rng = random.Random(1)
    for _ in range(300):
        levels = "".join(rng.choices(["amp;", "AMP;", "#38;", "#x026;"], k=rng.randint(10, 60)))
        marks = "".join(rng.choices("\u0301\u0327\u0316\u0344\u034f\u0f73\u0f71\u0b3e", k=rng.randint(90, 300)))
        ends = rng.choices(["lt;", "eacute;", "#38;", " ", "é", "<b>", "\n", "cafÃ©"], k=3)
        text = f"{ends[0]}&{levels}{ends[1]}e{marks}{ends[2]}&{levels}"
        assert tokenizer.encode(text) == original.encode(text), ascii(text)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_list_of_merges(original_module, tmp_path_factory, data):
    """Including lists that training does not produce: the same pair twice, or two pairs with one result."""
    symbols, lines = ["a", "b", "a</w>", "b</w>"], ["#version: 0.2"]
    for _ in range(data.draw(st.integers(1, 12))):
        pair = data.draw(st.tuples(st.sampled_from(symbols), st.sampled_from(symbols)))
        lines.append(" ".join(pair))
        symbols.append("".join(pair))
    folder = tmp_path_factory.mktemp("merges")
    (folder / "merges.txt").write_text("\n".join(lines))
    (folder / "merges.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    tokenizer, original = Tokenizer(folder / "merges.txt"), original_module.SimpleTokenizer(folder / "merges.gz")
    word = data.draw(st.text("ab", max_size=40))
    assert tokenizer.encode(word) == original.encode(word)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49405), max_size=20))
def test_decoding(tokenizer, original, ids):
    assert tokenizer.decode(ids) == original.decode(ids).rstrip(" ")
