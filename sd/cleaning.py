"""A prompt as it was typed or pasted -> the text that CLIP's tokenizer was trained on.

In: any text. Out: lower case, single-spaced, and without what copying does to text: wrong encodings ('cafÃ©'), curly
quotes, wide letters, '&eacute;', and so on. The repairs are those of the library ftfy, in its order, line by line and
again until nothing changes, as OpenAI's tokenizer has them done. They are called one by one here because two hostile
contents would keep ftfy itself busy for hours: entities within entities, and thousands of accents on one letter.
"""

from __future__ import annotations

import html
import unicodedata
from itertools import groupby

import ftfy
import regex
from ftfy import fixes

PLAIN = regex.compile(r"[\t\n\r -%'-~]*")  # ASCII without "&" and control characters: nothing to repair
LINE = regex.compile(r"[^\n]{0,999999}\n|[^\n]{1,1000000}")  # what ftfy repairs at a time
LONG_MARKS = regex.compile(r"\p{M}{100,}")
CHARACTER_FIXES = [
    *[fixes.fix_c1_controls, fixes.fix_latin_ligatures, fixes.fix_character_width, fixes.uncurl_quotes],
    *[fixes.fix_line_breaks, fixes.fix_surrogates, fixes.remove_terminal_escapes, fixes.remove_control_chars],
]
# Text from the real world takes two or three passes. More than `FREE_PASSES` of them are made only while all passes
# together look at no more than `MAX_WORK` characters, so that the time does not grow with the square of the length.
FREE_PASSES, MAX_WORK = 8, 1_000_000


def clean(text: str) -> str:
    """A prompt in lower case, single-spaced, its broken encodings and HTML entities repaired.

    Raises TypeError if `text` is not a string, ValueError if it holds half a character (a lone surrogate), an HTML
    entity of thousands of digits, or, in a long text, entities within entities within entities.
    """
    if not isinstance(text, str):
        raise TypeError(f"A prompt must be a string, not {type(text).__name__}.")
    if not PLAIN.fullmatch(text):  # nearly every prompt is plain
        text = repair(text)
    return " ".join(text.split()).lower()


def repair(text: str) -> str:
    """The text that was meant. Raises as `clean` does."""
    try:
        text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError(f"A prompt must be valid Unicode; {text[:80]!a} has a lone surrogate in it.") from None
    passes = max(FREE_PASSES, MAX_WORK // max(len(text), 1))
    unescapes = True  # until the first line with a "<", which looks like HTML that is meant to be read as such
    lines = []
    repaired: dict[tuple[str, bool], str] = {}  # the same line over and over is repaired once
    for line in LINE.findall(text):
        unescapes = unescapes and "<" not in line
        if not PLAIN.fullmatch(line):
            key = (line, unescapes)
            line = repaired.get(key) or repaired.setdefault(key, repair_line(*key, passes))
        lines.append(line)
    try:
        return html.unescape(html.unescape("".join(lines)))  # whatever "<" said: OpenAI's tokenizer does so after ftfy
    except ValueError:
        raise ValueError("The prompt has an HTML entity with more digits than any character's number.") from None


def repair_line(line: str, unescapes: bool, passes: int) -> str:
    """A line repaired again and again, until a pass changes nothing. Raises ValueError if that takes too many."""
    for _ in range(passes):
        before = line
        if unescapes:
            line = fixes.unescape_html(line)
        line = ftfy.fix_encoding(line)
        for fix in CHARACTER_FIXES:
            line = fix(line)
        line = unicodedata.normalize("NFC", LONG_MARKS.sub(sort_marks, line))
        if line == before:
            return line
    raise ValueError(f"The prompt has HTML entities within HTML entities, more than {passes} deep: write plain text.")


def sort_marks(run: regex.Match) -> str:
    """Combining marks in Unicode's canonical order: a stable sort by class of each group that has classes above 0.

    The same text to `normalize`, which would put them in order by insertion sort.
    """
    marks = "".join(unicodedata.normalize("NFD", mark) for mark in run[0])
    groups = groupby(marks, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join("".join(sorted(group, key=unicodedata.combining)) for _, group in groups)
