"""Fonts of labels: every letter is drawn by a font that has it, or written as its escape. No two letters look alike."""

import shutil
from itertools import combinations

import numpy as np
import pytest
from PIL import ImageFont
from PIL.ImageFont import Layout

from sd.inside import label_fonts
from sd.inside.contact_sheet import square_sheet
from sd.inside.label_fonts import pieces

PICTURE = np.zeros((64, 256, 3), np.uint8)


def ink(label: str) -> bytes:
    sheet = square_sheet([PICTURE], [label])
    return sheet.crop((0, 0, sheet.width, sheet.height - 64)).tobytes()


def texts(label: str) -> str:
    return "".join(text for text, _ in pieces(label, 12))


def use_folder(monkeypatch, folder):
    """Use the fonts in this folder instead of the system's."""
    monkeypatch.setattr(label_fonts, "_folders", lambda: [str(folder)])
    label_fonts._system_fonts.cache_clear()


@pytest.fixture(params=["the system's fonts", "no fonts"])
def some_fonts(request, monkeypatch, tmp_path):
    if request.param == "no fonts":
        use_folder(monkeypatch, tmp_path)
    label_fonts._system_fonts.cache_clear()
    yield
    label_fonts._system_fonts.cache_clear()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder whose fonts are used instead of the system's."""
    use_folder(monkeypatch, tmp_path)
    yield tmp_path
    label_fonts._system_fonts.cache_clear()


def make_font(path, letters: str):
    """A font in which each of these letters is a bar of another width. A letter that it lacks is a box."""
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen", reason="fontTools is not installed")
    from fontTools.fontBuilder import FontBuilder

    names = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
    builder, glyphs = FontBuilder(1000, isTTF=True), {}
    for i, name in enumerate(names):
        pen = pens.TTGlyphPen(None)
        width = 900 if i == 0 else 80 * (ord(letters[i - 1]) % 11)
        for number, point in enumerate([(0, 0), (0, 700), (width, 700), (width, 0)]):
            (pen.lineTo if number else pen.moveTo)(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):x}" for letter in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1200, descent=-300)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.mark.usefixtures("some_fonts")
@pytest.mark.parametrize(
    "letters",
    ["éüßñàç", "дж", "猫犬", "שת", "مب", "กข", "हक", "한글", "🐈🐕", "\u0301\u0302", "\x00\x01", "\ud800\udc00"],
)
def test_no_two_letters_look_alike(letters):
    for one, other in combinations(letters, 2):
        assert ink(one) != ink(other)
        assert ink(f"a {one} b") != ink(f"a {other} b")
    lacked = ImageFont.load_default(10).getmask("\U0010ffff")
    for letter in letters:
        for text, font in pieces(letter, 10):
            assert bytes(font.getmask(text)) != bytes(lacked)


@pytest.mark.usefixtures("some_fonts")
@pytest.mark.parametrize(
    "label",
    ["", " ", "\u200d", "\u0301", "a\u0301" * 40, "\u202eabc\u202c", "مرحبا " * 20, "שלום abc 猫 " * 9, "猫" * 500],
)
def test_any_label_is_drawn(label):
    square_sheet([PICTURE] * 2, [label, "b"])


def test_without_fonts_letters_are_escapes(folder):
    assert texts("a café, 猫 🐈 \x00 \ud800") == "a caf\\xe9, \\u732b \\U0001f408 \\x00 \\ud800"
    assert [font.getname() for _, font in pieces("é", 12)] == [ImageFont.load_default(12).getname()]


def test_ascii_needs_no_other_font(monkeypatch):
    monkeypatch.setattr(label_fonts, "_system_fonts", lambda: pytest.fail("the fonts of the system are listed"))
    ((text, font),) = pieces("a red house, 100 %", 12)
    assert (text, font.getname()) == ("a red house, 100 %", ImageFont.load_default(12).getname())


def test_letters_that_are_two_characters_are_one(folder):
    assert texts("cafe\u0301") == "caf\\xe9"


def test_what_only_joins_letters_is_no_letter(folder):
    assert texts("a\u200db\u200ec\u00adde\ufe0f") == "abcde"


def test_the_fonts_of_the_system_are_used(folder):
    make_font(folder / "Cats.ttf", "猫犬")
    (folder / "new").mkdir()
    make_font(folder / "new/Birds.TTF", "鳥猫 ")
    names = [(text, font.getname()[0]) for text, font in pieces("a 猫 and 鳥!", 12)]
    pillows = ImageFont.load_default(12).getname()[0]
    assert names == [("a ", pillows), ("猫 ", "Cats"), ("and ", pillows), ("鳥", "Birds"), ("!", pillows)]
    assert len({ink("猫"), ink("犬"), ink("鳥"), ink("魚")}) == 4
    assert texts("猫魚") == "猫\\u9b5a"


def test_one_font_for_all_letters_is_better_than_two(folder):
    make_font(folder / "Cats.ttf", "猫")
    make_font(folder / "Latin and cats.ttf", "aé猫 ")
    assert [(text, font.getname()[0]) for text, font in pieces("é 猫a", 12)] == [("é 猫a", "Latin and cats")]
    assert [font.getname()[0] for _, font in pieces("猫", 12)] == ["Cats"]


def test_damaged_fonts_and_fonts_of_placeholders_are_passed_over(folder):
    (folder / "A.ttf").write_bytes(b"nonsense")
    (folder / "B.ttc").write_bytes(b"")
    (folder / "C.otf").mkdir()
    (folder / "font.pcf.gz").write_bytes(b"\x1f\x8b")
    make_font(folder / "LastResort.ttf", "猫")
    make_font(folder / "Adobe Blank.ttf", "猫")
    assert texts("猫") == "\\u732b"
    make_font(folder / "Z.ttf", "猫")
    label_fonts._system_fonts.cache_clear()
    assert texts("猫") == "猫"


def test_plain_styles_come_first(folder):
    names = ["Cats.ttf", "NotoSans-Bold.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf"]
    names += ["DejaVuSansMono.ttf", "DejaVuSerif.ttf", "Cats-Italic.otf"]
    for name in names:
        (folder / name).write_bytes(b"")
    assert [font.path.name for font in label_fonts._system_fonts()] == [
        *("DejaVuSans.ttf", "DejaVuSansMono.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc"),
        *("NotoSans-Bold.ttf", "Cats.ttf", "Cats-Italic.otf", "DejaVuSerif.ttf"),
    ]


@pytest.mark.parametrize(
    "platform, folder", [("win32", "Fonts"), ("darwin", "/Library/Fonts"), ("linux", "/usr/share/fonts")]
)
def test_the_folders_of_each_system(monkeypatch, platform, folder):
    monkeypatch.setattr(label_fonts.sys, "platform", platform)
    assert any(path.endswith(folder) for path in label_fonts._folders())


def test_without_raqm_labels_are_drawn_too(folder, monkeypatch):
    read = label_fonts._read
    monkeypatch.setattr(label_fonts, "_read", lambda path, size, layout=None: read(path, size, Layout.BASIC))
    label_fonts._open.cache_clear()
    make_font(folder / "Arabic.ttf", "مرحبا")
    assert texts("مر\u200cحبا") == "مرحبا"
    square_sheet([PICTURE], ["مر\u200cحبا"])
    label_fonts._open.cache_clear()


def test_accents_are_drawn_where_the_system_has_a_plain_font(folder):
    path = next((font for font in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf") if _found(font)), None)
    if path is None:
        pytest.skip("this system has neither DejaVu nor Arial")
    shutil.copy(ImageFont.truetype(path).path, folder)
    assert texts("a café in Zürich, дом") == "a café in Zürich, дом"


def _found(name: str) -> bool:
    try:
        return bool(ImageFont.truetype(name))
    except OSError:
        return False
