"""The prompts of demo.py, from the command line and from a file, with their LoRAs; and notes on other notation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.support.flags import with_flags
from scripts.support.loras import Lora, find, given_loras

MAX_BYTES = 10_000_000


def all_prompts(options: argparse.Namespace) -> tuple[list[str], list[tuple[Lora, ...]], list[str]]:
    """All prompts to draw, the LoRAs of each, and a sentence for each notation without effect. --negative is adapted in
    `options`.

    Raises ValueError for a prompt that cannot be drawn. For one of --prompts-file, the error names its line.
    """
    from sd.prompts.alternatives import expand, without_alternatives
    from sd.prompts.other_tools import adapt, take_loras
    from sd.request import Request

    given = given_loras(options)
    prompts: list[str] = []
    loras: list[tuple[Lora, ...]] = []
    notes: dict[str, str] = {}  # the first of each kind

    def add(text: str) -> Sequence[str]:
        adapted, found = adapt(text)
        if group := without_alternatives(text):
            meant = f"{group[1:-1]}, without its braces; \\{{ is a brace, and {{red|blue}} are alternatives"
            found["braces"] = f"{group} is read as {meant}."
        words, tags = zip(*map(take_loras, expand(adapted)))
        for each in tags:
            used, missing = find(each, given)
            loras.append(used)
            found |= missing
        prompts.extend(words)
        notes.update(found | notes)
        return words

    for text in options.prompts:
        add(text)
    if options.prompts_file:
        for number, line in read_lines(options.prompts_file):
            try:
                for prompt in add(line):
                    Request(prompt).check()
            except ValueError as error:
                raise ValueError(f"{options.prompts_file}, line {number}: {with_flags(str(error))}") from None
    options.negative, found = adapt(options.negative or "")
    options.negative, tags = take_loras(options.negative)
    if tags:
        found["lora"] = f"{tags[0].text} in --negative is left out: a LoRA belongs in the prompt."
    if "{" in options.negative and "|" in options.negative and not options.source:
        found["braces"] = "{ } in --negative are read as text: alternatives belong in the prompt."
    notes.update(found | notes)
    return prompts, loras, list(notes.values())


def read_text(path: Path, flag: str, most: int = MAX_BYTES) -> str:
    """The text of a flag's file of at most so many bytes, with "\\n" at the end of each line. Raises ValueError or
    OSError in one sentence."""
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be read ({error.strerror or error}).") from None
    if len(content) > most:
        raise ValueError(f"{flag} should be at most {most // 10**6} MB long: {path} is longer.")
    try:
        text = content.decode("utf-8-sig")
        wrong = content.find(b"\0")  # in UTF-16 without a mark, every second byte is zero
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = content.count(b"\n", 0, wrong) + 1
        raise ValueError(f"{flag} should be text in UTF-8: {path}, line {line}, is not.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The prompts of a file and the numbers of their lines, from 1. Raises ValueError or OSError in one sentence."""
    lines = read_text(path, "--prompts-file").split("\n")
    found = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, line) for number, line in found if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"--prompts-file should have a prompt in each line: {path} has none.")
    return found
