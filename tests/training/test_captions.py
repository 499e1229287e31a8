"""Captions as editors, data sets and systems write them: read as they show them, or refused in one sentence."""

import hashlib
import json
import os

import pytest
from PIL import Image

from sd.training.captions import DataError, read_captions, unreadable_images
from sd.training.data import fingerprint, load_folder


def save(path, colour="red"):
    Image.new("RGB", (8, 8), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """One image, cat.png, without a caption."""
    save(tmp_path / "cat.png")
    return tmp_path


@pytest.mark.parametrize(
    "data",
    [
        "a café\nein Käse".encode(),
        "a café\r\nein Käse\r\n".encode(),
        "a café\rein Käse\r".encode(),
        "\ufeffa café\n\n  ein Käse \n".encode(),
        "a café\nein Käse".encode("utf-16"),  # with a mark, as Notepad and PowerShell write it
        "\ufeffa café\r\nein Käse".encode("utf-16-be"),
    ],
)
@pytest.mark.parametrize("name", ["cat.txt", "cat.caption", "cat.TXT"])
def test_one_caption_a_line(folder, name, data):
    (folder / name).write_bytes(data)
    assert read_captions(folder) == {"cat.png": ["a café", "ein Käse"]}


@pytest.mark.parametrize("blank", ["\x85", "\u2028", "\u2029", "\f", "\v", "\x1c", "\x1d", "\x1e"])
def test_only_line_ends_end_a_caption(folder, blank):
    """`str.splitlines` splits at these characters, and editors do not."""
    (folder / "cat.txt").write_text(f"a cat{blank}on a mat", encoding="utf-8")
    assert read_captions(folder) == {"cat.png": [f"a cat{blank}on a mat"]}
    line = json.dumps({"file": "cat.png", "caption": f"a cat{blank}on a mat"}, ensure_ascii=False)
    if blank >= " ":  # JSON has to escape the others
        (folder / "captions.jsonl").write_text(line, encoding="utf-8")
        assert read_captions(folder) == {"cat.png": [f"a cat{blank}on a mat"]}


@pytest.mark.parametrize(
    "data, line",
    [
        ("a cat\na café".encode("cp1252"), 2),
        ("un café".encode("mac-roman"), 1),
        ("猫".encode("shift-jis"), 1),
        ("a cat".encode("utf-16-le"), 1),  # without a mark
        ("a\ncat".encode("utf-16-be"), 1),
        ("a cat".encode("utf-32"), 1),
        (b"\xff\xfea", 1),
    ],
)
@pytest.mark.parametrize("name", ["cat.txt", "cat.caption", "captions.jsonl", "metadata.jsonl"])
def test_another_encoding_is_named_with_its_file(folder, name, data, line):
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} should be text in UTF-8, but line {line} is not: save it again"):
        read_captions(folder)


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_lists(folder, name, mark, end):
    lines = [
        {"file": "cat.png", "caption": "a cat"},
        {"file_name": "cat.png", "text": ["a grey cat", None, " ", "a 😀"], "height": 8},
        {"caption": "two", "file": "images/dog.png"},
    ]
    (folder / name).write_bytes((mark + end.join(map(json.dumps, lines))).encode())
    assert read_captions(folder) == {"cat.png": ["a cat", "a grey cat", "a 😀"], "images/dog.png": ["two"]}


def test_our_own_list_comes_first_and_any_list_before_texts(folder):
    (folder / "cat.txt").write_text("text")
    (folder / "cat.caption").write_text("caption")
    assert read_captions(folder) == {"cat.png": ["text"]}
    (folder / "metadata.jsonl").write_text('{"file_name": "cat.png", "text": "metadata"}')
    assert read_captions(folder) == {"cat.png": ["metadata"]}
    (folder / "captions.jsonl").write_text('{"file": "cat.png", "caption": "list"}')
    assert read_captions(folder) == {"cat.png": ["list"]}


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "cat.png", "caption": null}',
        '{"file": "cat.png", "caption": []}',
        '{"file": "cat.png", "caption": [null, ""]}',
        '{"file": "cat.png", "caption": 5}',
        '{"file": "cat.png", "caption": ["a cat", 5]}',
        '{"file": "cat.png", "caption": {"en": "a cat"}}',
        '{"file": null, "caption": "a cat"}',
        '{"file": "", "caption": "a cat"}',
        '{"file": ["cat.png"], "caption": "a cat"}',
        '{"file": "cat.png"}',
        '{"caption": "a cat"}',
        '["cat.png", "a cat"]',
        "null",
        "[" * 100_000,
        "cat.png: a cat",
    ],
)
def test_a_line_without_a_file_or_a_caption_is_named(folder, line):
    (folder / "captions.jsonl").write_text('{"file": "cat.png", "caption": "a cat"}\n' + line)
    with pytest.raises(DataError, match=r'Line 2 of .*captions\.jsonl should be like {"file": "cat\.png", "caption"'):
        read_captions(folder)


@pytest.mark.parametrize("text", ["x" * 10_001, "&#" + "1" * 5000 + ";"])
def test_a_caption_that_no_tokenizer_takes_is_named_before_training(folder, text):
    (folder / "cat.txt").write_text(text)
    with pytest.raises(DataError, match=r"cat\.png has a caption that cannot be used: .*"):
        read_captions(folder)


def test_half_a_character_is_named(folder):
    (folder / "captions.jsonl").write_text(r'{"file": "cat.png", "caption": "a cat \ud83d"}')
    with pytest.raises(DataError, match=r"cat\.png has a caption that cannot be used: .*lone surrogate"):
        read_captions(folder)


def test_hidden_and_system_files_are_passed_over(folder):
    (folder / "cat.txt").write_text("a cat")
    for name in ("._cat.png", ".DS_Store", ".hidden.png", "._captions.jsonl", "Thumbs.db", "desktop.ini", "Icon\r"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(66))
    for name in ("old.png", "__MACOSX", ".git", "@eaDir", "metadata.jsonl"):
        (folder / name).mkdir()
        save(folder / name / "._cat.png")
    assert read_captions(folder) == {"cat.png": ["a cat"]}


def test_pictures_of_every_format_are_used(folder, caplog):
    (folder / "cat.txt").write_text("a cat")
    names = ["a.gif", "b.tif", "c.TIFF", "d.jfif", "e.jpe", "f.jp2", "g.tga", "h.ppm", "i.ico", "j.pcx", "k.apng"]
    for name in names:
        image = Image.new("RGB", (16, 16), "red")
        image.save(folder / name, format="PNG" if name == "k.apng" else None)
        (folder / name).with_suffix(".txt").write_text(f"picture {name}")
    images = load_folder(folder, folder / "out", 8)
    captions = {name: [f"picture {name}"] for name in names} | {"cat.png": ["a cat"]}
    assert images.captions == [captions[name] for name in sorted(captions)]
    assert caplog.text == ""


def test_pictures_of_other_formats_are_listed_as_left_out(folder, caplog):
    (folder / "cat.txt").write_text("a cat")
    for name in ("a.heic", "b.HEIF", "c.jxl", "d.svg"):
        (folder / name).write_bytes(b"something")
    assert load_folder(folder, folder / "out", 8).captions == [["a cat"]]
    assert [record.getMessage() for record in caplog.records] == [
        f"Images in {folder} are left out because their format cannot be read: a.heic, b.HEIF, c.jxl, ..."
    ]
    (folder / "cat.png").unlink()
    with pytest.raises(DataError, match=r"should have images in a format such as PNG, not only files such as a\.heic"):
        read_captions(folder)


def test_avif_is_used_where_pillow_reads_it(folder, monkeypatch):
    (folder / "a.avif").write_bytes(b"something")
    known = Image.registered_extensions()
    monkeypatch.setattr(Image, "registered_extensions", lambda: known | {".avif": "AVIF"})
    assert unreadable_images(folder) == []
    monkeypatch.setattr(Image, "registered_extensions", lambda: {k: v for k, v in known.items() if v != "AVIF"})
    assert unreadable_images(folder) == ["a.avif"]


def test_errors_say_how_captions_are_written(folder):
    lines = r'captions\.jsonl.*with lines such as {"file": "cat\.png", "caption": "a cat"}'
    with pytest.raises(
        DataError, match=rf"cat\.png has no caption: write one in cat\.txt in the same folder, or .*{lines}"
    ):
        read_captions(folder)
    (folder / "cat.png").unlink()
    with pytest.raises(
        DataError, match=rf"no captioned images: add some.*captions in cat\.txt, one a line, or.*{lines}"
    ):
        read_captions(folder)


def test_files_that_cannot_be_read_are_named(folder):
    (folder / "cat.txt").mkdir()
    with pytest.raises(DataError, match=r"cat\.png has no caption"):
        read_captions(folder)
    (folder / "cat.txt").rmdir()
    os.symlink(folder / "nowhere", folder / "cat.txt")
    with pytest.raises(DataError, match=r"cat\.txt cannot be read \(No such file"):
        read_captions(folder)


def test_the_fingerprint_is_that_of_earlier_versions(folder):
    """Otherwise a run that was started with them could not be resumed."""
    save(folder / "dog.png", "blue")
    (folder / "cat.txt").write_text(" a cat \n\na café\n", encoding="utf-8")
    (folder / "dog.txt").write_text("a dog", encoding="utf-8")
    captions = {"cat.png": ["a cat", "a café"], "dog.png": ["a dog"]}
    digest = hashlib.sha256(json.dumps(captions).encode())
    for name in captions:
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    assert fingerprint(folder, read_captions(folder)) == digest.hexdigest()
