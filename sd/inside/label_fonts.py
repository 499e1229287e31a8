"""A label in any script -> pieces of text, each with a font that has its letters.

Pillow's own font has little more than ASCII. For other letters, the fonts of the system are searched. A letter that no
font has is written as its escape, such as \\u732b: otherwise, all such letters would be drawn as the same box.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import regex
from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont, Layout

# Fonts to try first, by how their file names begin: plain ones with many letters.
PREFERRED = ("dejavusans", "notosans", "arial", "segoeui", "helvetica", "hiragino", "pingfang", "msyh", "meiryo")
# Parts of file names: of fonts to try last among those, and of fonts not to use.
STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "narrow", "mono", "serif")
PLACEHOLDERS = ("lastresort", "blank")  # these draw the same sign for many letters
INVISIBLE = r"[\s\p{Default_Ignorable_Code_Point}]"  # spaces, and what only joins or orders letters
MISSING = "\U0010ffff"  # no font has it


class Font:
    """A font file of the system, or if the path is None, the font that is part of Pillow."""

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, bool] = {}  # whether the font has a letter

    def supported(self, letters: set[str]) -> set[str]:
        """The letters that the font has."""
        if new := letters - self.known.keys():
            try:
                # Raqm would add a circle to a mark without a letter, which would then not look missing.
                font = _read(self.path, 24, Layout.BASIC)
                self.known |= {letter: _mask(font, letter) != _mask(font, MISSING) for letter in new}
            except OSError:  # a damaged font, or one of bitmaps
                self.known |= dict.fromkeys(new, False)
        return {letter for letter in letters if self.known[letter]}


PILLOW_FONT = Font(None)


def pieces(text: str, size: int) -> list[tuple[str, FreeTypeFont]]:
    """A text -> pieces of it, each with its font of this size in pixels.

    Text from right to left needs a Pillow with Raqm. Without it, the letters are in the wrong order.
    """
    text = unicodedata.normalize("NFC", text)
    fonts, missing = [], _visible(text)
    for font in _fonts():
        if found := font.supported(missing):
            fonts.append(font)
            missing -= found
        if not missing:
            break
    if missing:
        text = "".join(_escape(letter) if letter in missing else letter for letter in text)
        fonts.append(PILLOW_FONT)  # for the escapes
    letters = _visible(text)
    whole = next((font for font in fonts if font.supported(letters) == letters), None)
    if whole:  # looks better than a mixture of fonts
        fonts = [whole]
    chosen, font = [], (fonts or [PILLOW_FONT])[0]
    for letter in text:
        if needed := _visible(letter):  # an invisible letter, or one that the font has, does not change the font
            font = next(each for each in (font, *fonts) if each.supported(needed))
        chosen.append(font)
    runs = groupby(zip(text, chosen), lambda pair: pair[1])
    return [_piece("".join(letter for letter, _ in run), _open(font.path, size)) for font, run in runs]


def _piece(text: str, font: FreeTypeFont) -> tuple[str, FreeTypeFont]:
    """Without Raqm, Pillow draws invisible letters as boxes."""
    if font.layout_engine == Layout.BASIC:
        text = regex.sub(r"\p{Default_Ignorable_Code_Point}", "", text)
    return text, font


def _visible(text: str) -> set[str]:
    """The letters that a font should have."""
    return set(regex.sub(INVISIBLE, "", text))


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _fonts() -> Iterator[Font]:
    yield PILLOW_FONT
    yield from _system_fonts()


@cache
def _system_fonts() -> list[Font]:
    """The fonts of the system, those that look best first."""
    paths = [Path(where, name) for folder in _folders() for where, _, names in os.walk(folder) for name in names]
    return [Font(path) for path in sorted(paths, key=_rank) if _is_font(path)]


def _folders() -> list[str]:
    """Where the system and the user keep fonts."""
    if sys.platform == "win32":
        folders = [r"%WINDIR%\Fonts", r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"]
    elif sys.platform == "darwin":
        folders = ["/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"]
    else:
        folders = ["/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"]
    return [os.path.expandvars(os.path.expanduser(folder)) for folder in folders]


def _is_font(path: Path) -> bool:
    is_placeholder = any(part in path.name.lower() for part in PLACEHOLDERS)
    return path.suffix.lower() in (".ttf", ".ttc", ".otf") and not is_placeholder


def _rank(path: Path) -> tuple[int, int, int, str]:
    """Sorts fonts: preferred ones first, then regular styles, then short names."""
    name = path.stem.lower().replace(" ", "").replace("-", "")
    place = next((i for i, beginning in enumerate(PREFERRED) if name.startswith(beginning)), len(PREFERRED))
    return place, sum(style in name for style in STYLES), len(name), str(path)


@lru_cache(maxsize=32)  # an open font keeps its file open
def _open(path: Path | None, size: int) -> FreeTypeFont:
    return _read(path, size)


def _read(path: Path | None, size: int, layout: Layout | None = None) -> FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=layout) if path else ImageFont.load_default(size)


def _mask(font: FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
