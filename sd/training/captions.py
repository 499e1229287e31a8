"""The captions of a folder of images -> for each image, by its file name, one or more captions.

They are in a list for all images, captions.jsonl or metadata.jsonl, or in a text file beside each image.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

from sd.images import FORMATS
from sd.tokenizer import clean

LISTS = ("captions.jsonl", "metadata.jsonl")  # the second is the convention of Hugging Face's ImageFolder
EXAMPLE = '{"file": "cat.png", "caption": "a cat"}'
KEYS = ("file", "file_name"), ("caption", "text")  # in a line of a list: the image, and its caption or captions
TEXTS = (".txt", ".caption")
# Common image formats that `read_image` does not read. Pillow reads AVIF since version 11.3.
UNREADABLE = {".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".xcf", ".kra", ".exr", ".dng", ".cr2", ".nef", ".arw"}


class DataError(ValueError):
    """The images or captions cannot be used for training. The message is one sentence."""


def read_captions(folder: Path, usual: str | None = None) -> dict[str, list[str]]:
    """The captions of each image in a folder, by file name. Hidden files and subfolders are ignored. With `usual`, that
    is the caption of every image in a folder without any captions.

    Raises DataError if the folder does not exist or has no images, if an image has no caption or one that the tokenizer
    refuses, or if a file of captions cannot be read.
    """
    files = _visible_files(folder)
    listed = next((folder / name for name in LISTS if folder / name in files), None)
    if usual and not listed and not any(path.suffix.lower() in TEXTS for path in files):
        captions = {path.name: [usual] for path in files if path.suffix.lower() in _suffixes()}
    else:
        captions = _read_list(listed) if listed else _read_texts(files)
    if captions:
        _check(folder, captions)
        return captions
    if unread := unreadable_images(folder):
        raise DataError(f"{folder} should have images in a format such as PNG, not only files such as {unread[0]}.")
    raise DataError(
        f"{folder} has no captioned images: add some, such as cat.png with its captions in cat.txt, one a line, or "
        f"a file {LISTS[0]} with lines such as {EXAMPLE}."
    )


def unreadable_images(folder: Path) -> list[str]:
    """The names of the images in a folder that are in a format that `read_image` does not read."""
    return [path.name for path in _visible_files(folder) if path.suffix.lower() in UNREADABLE - _suffixes()]


def _read_list(path: Path) -> dict[str, list[str]]:
    """The captions of a JSON-lines file: in each line the name of an image, and its caption or a list of captions."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_split_lines(_read_text(path)), 1):
        if not line.strip():
            continue
        name, texts = _parse(line)
        if not (name and texts):
            raise DataError(f"Line {number} of {path} should be like {EXAMPLE}, not {line[:60]!r}.")
        captions.setdefault(name, []).extend(texts)
    return captions


def _parse(line: str) -> tuple[str, list[str]]:
    """A line of JSON -> the name of the image and its captions; one of them is empty if the line is invalid."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return "", []
    name, texts = (_first(entry, keys) for keys in KEYS)
    texts = [text for text in (texts if isinstance(texts, list) else [texts]) if text is not None]
    if not all(isinstance(text, str) for text in (name, *texts)):
        return "", []
    return name, [text for text in texts if text.strip()]


def _first(entry: object, keys: tuple[str, ...]) -> object:
    """The first of these keys that a JSON object has, or None."""
    return next((entry[key] for key in keys if key in entry), None) if isinstance(entry, dict) else None


def _read_texts(files: list[Path]) -> dict[str, list[str]]:
    """The captions in the text files beside the images, one a line."""
    texts = {(path.stem, path.suffix.lower()): path for path in files}
    suffixes, captions = _suffixes(), {}
    for path in (path for path in files if path.suffix.lower() in suffixes):
        text = next((texts[path.stem, suffix] for suffix in TEXTS if (path.stem, suffix) in texts), None)
        lines = _split_lines(_read_text(text)) if text else []
        captions[path.name] = [line.strip() for line in lines if line.strip()]
        if not captions[path.name]:
            raise DataError(
                f"{path} has no caption: write one in {path.stem}.txt in the same folder, or list the captions of all "
                f"images in {LISTS[0]}, with lines such as {EXAMPLE}."
            )
    return captions


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark. Raises DataError for another encoding."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        wrong = text.find("\0")  # in UTF-16 without a mark, every second byte is zero
        lines = text.count("\n", 0, wrong)
    except UnicodeDecodeError as error:
        wrong, lines = error.start, data.count(b"\n", 0, error.start)
    if wrong >= 0:
        raise DataError(f"{path} should be text in UTF-8, but line {lines + 1} is not: save it again as UTF-8.")
    return text


def _split_lines(text: str) -> list[str]:
    """The lines of a text as editors show them. `str.splitlines` also splits at U+0085, U+2028 and form feeds."""
    return re.split(r"\r\n|\r|\n", text)


def _check(folder: Path, captions: dict[str, list[str]]) -> None:
    """Raise DataError for a caption that the tokenizer would refuse, perhaps after an hour of training."""
    for name, texts in captions.items():
        for text in texts:
            try:
                clean(text)
            except ValueError as error:
                raise DataError(f"{folder / name} has a caption that cannot be used: {error}") from error


def _suffixes() -> set[str]:
    """The suffixes of the formats that `read_image` reads."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def _visible_files(folder: Path) -> list[Path]:
    """The files of a folder in order of their names, without hidden ones such as ._cat.png, which macOS writes."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: choose one with images and captions.")
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror or error}).") from error
