"""The file of prompts of sample.py: .txt, .csv or .jsonl -> an `Item` for each picture, with its settings checked.

.txt    a prompt a line, as in demo.py's --prompts-file: {red|blue} gives two pictures, # begins a comment
.csv    a header with the names of settings of `Request`, and "lora" for FILE:STRENGTH (several with semicolons)
.jsonl  on each line an object of what `Request.from_dict` takes, and "loras": [[path, strength], ...]

Settings that a line leaves out are those of the flags. What is wrong with the file itself is a ValueError that names
the line. What is wrong with one prompt or setting is kept in `Item.error`, and the other pictures can be made.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

from scripts.support.loras import GivenLora, Lora, find, given_loras
from scripts.support.prompts import read_text
from sd.adapters.lora_files import as_lora
from sd.prompts.alternatives import expand
from sd.prompts.other_tools import adapt, take_loras
from sd.request import Request

MAX_BYTES = 2_000_000_000  # images in JSON are large
MAX_PICTURES = 1_000_000
SUFFIXES = (".txt", ".csv", ".jsonl")

WHOLE = ("seed", "width", "height", "n_inference_steps", "clip_skip", "deep_cache")
NUMBERS = ("cfg_scale", "cfg_rescale", "hires_scale", "hires_strength")
COLUMNS = ("prompt", "uncond_prompt", "sampler_name", "timestep_spacing", *WHOLE, *NUMBERS, "lora")

Entry = tuple[int, dict, str]  # a line's number, the settings on it, and what is wrong with them


@dataclass(frozen=True)
class Item:
    """A picture to make. If `error` is not empty, it says why that is impossible, and `request` is None."""

    index: int  # of the picture, from 0
    line: int  # of the file, from 1
    prompt: object  # as it stands in the file
    seed: object
    request: Request | None = None  # with one prompt
    loras: tuple[Lora, ...] = ()
    error: str = ""


class Read(NamedTuple):
    """What `read_items` found in a file."""

    items: list[Item]
    digest: str  # SHA-256 of all settings
    notes: list[str]  # a sentence for each notation that has no effect


NOTHING = Read([], "", [])


def read_items(path: Path, common: dict, seed: int = 0, given: Sequence[GivenLora] = ()) -> Read:
    """The pictures of a file.

    `common` are the settings of `Request` for lines without them. Picture i has the seed `seed + i` unless its line
    says otherwise. `given` are LoRAs for every picture. Raises ValueError or OSError, in one sentence, for a file that
    cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"--prompts should be a .txt, .csv or .jsonl file, not {path}.")
    entries = {".txt": _texts, ".csv": _rows, ".jsonl": _objects}[suffix](path, read_text(path, "--prompts", MAX_BYTES))
    items: list[Item] = []
    digest, notes = hashlib.sha256(), {}
    for line, values, error in entries:
        if len(items) == MAX_PICTURES:
            raise ValueError(f"--prompts should have at most {MAX_PICTURES:,} pictures: {path} has more; split it.")
        values = {"seed": seed + len(items), **common, **values}
        digest.update(json.dumps(values, sort_keys=True).encode() + b"\n")
        items.append(_item(len(items), line, values, error, given, notes))
    if not items:
        raise ValueError(f"--prompts should have a prompt in each line: {path} has none.")
    return Read(items, digest.hexdigest(), list(notes.values()))


def _broken(path: Path, line: int, allowed: str, found: str = "") -> ValueError:
    return ValueError(f"--prompts should have {allowed}: {path}, line {line}, {found or 'does not'}.")


def _texts(path: Path, text: str) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            prompts = expand(line)
        except ValueError as error:
            yield number, {"prompt": line}, str(error)
        else:
            yield from ((number, {"prompt": prompt}, "") for prompt in prompts)


def _rows(path: Path, text: str) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(text), strict=True)
    header: list[str] = []
    while True:
        number = rows.line_num + 1  # where the row begins; a cell in quotes can have several lines
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise _broken(path, number, "rows of comma-separated values", f"is broken ({error})") from None
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            _check_header(path, number, header)
        elif len(cells) != len(header):
            found = f"has {len(cells)}"
            raise _broken(path, number, f"{len(header)} cells in each row, as in its header", found)
        else:
            pairs = {name: cell.strip() for name, cell in zip(header, cells)}
            yield number, {name: _cell(name, text) for name, text in pairs.items() if text or name == "prompt"}, ""


def _check_header(path: Path, line: int, header: list[str]) -> None:
    for name in header:
        if name not in COLUMNS:
            raise _broken(path, line, f"columns named {', '.join(COLUMNS)}", f"has {name!r:.80}")
        if header.count(name) > 1:
            raise _broken(path, line, "each column once", f"has {name} twice")
    if "prompt" not in header:
        raise _broken(path, line, "a column named prompt", "has none")


def _cell(name: str, text: str) -> object:
    """A cell's value. A text that should be a number stays a text: `Request.check` refuses it."""
    kind = int if name in WHOLE else float if name in NUMBERS else str
    try:
        return kind(text)
    except ValueError:
        return text


def _objects(path: Path, text: str) -> Iterator[Entry]:
    known = {field.name for field in fields(Request)} | {"loras"}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"is broken ({error})" if isinstance(error, ValueError) else "is nested too deeply"
            raise _broken(path, number, "a JSON object in each line", reason) from None
        if not isinstance(values, dict):
            raise _broken(path, number, "a JSON object in each line", f"has a {type(values).__name__}")
        if unknown := next((name for name in values if name not in known), None):
            raise _broken(path, number, f"settings named {', '.join(sorted(known))}", f"has {unknown!r:.80}")
        yield number, values, ""


def _item(index: int, line: int, values: dict, error: str, given: Sequence[GivenLora], notes: dict[str, str]) -> Item:
    prompt, seed = values.get("prompt"), values["seed"]
    if not error:
        try:
            request, loras = _request(dict(values), given, notes)
            return Item(index, line, prompt, seed, request, loras)
        except (ValueError, TypeError) as problem:
            error = str(problem)
    return Item(index, line, prompt, seed, error=error)


def _request(values: dict, given: Sequence[GivenLora], notes: dict[str, str]) -> tuple[Request, tuple[Lora, ...]]:
    """The checked request of a line, without the notation of other tools, and its LoRAs: those of `given` first."""
    more = [*_of_cell(values.pop("lora", "")), *_of_list(values.pop("loras", None))]
    tags = {"prompt": (), "uncond_prompt": ()}
    for name in tags:
        text = values.get(name, "")
        if not isinstance(text, str) and not (text is None and name == "uncond_prompt"):
            raise ValueError(f"{name} should be one text, not {text!r:.80}.")
        if text:
            text, found = adapt(text)
            values[name], tags[name] = take_loras(text)
            notes.update(found | notes)
    if tags["uncond_prompt"]:
        raise ValueError(f"uncond_prompt should have no LoRA, not {tags['uncond_prompt'][0].text}.")
    request = Request.from_dict(values)
    request.check()
    used, missing = _find(tuple(tags["prompt"]), (*given, *more))
    if missing:
        raise ValueError(next(iter(missing.values())).replace(" is left out:", " should name a file:", 1))
    return request, used


def _of_cell(text: str) -> list[GivenLora]:
    """The LoRAs of a cell, as --lora takes them, with semicolons between them."""
    try:
        return given_loras(argparse.Namespace(lora=[part.strip() for part in text.split(";") if part.strip()]))
    except ValueError as error:
        raise ValueError(str(error).replace("--lora", "lora", 1)) from None


def _of_list(values: object) -> list[GivenLora]:
    """The LoRAs of JSON: paths, or lists of a path and its strengths."""
    if values is None:
        return []
    if not isinstance(values, list):
        raise ValueError(f"loras should be a list such as [[path, 0.8]], not {values!r:.80}.")
    loras = [as_lora(value) for value in values]
    for lora in loras:
        if not lora.path.is_file():
            raise ValueError(f"loras should be files: there is none at {lora.path}.")
    return [tuple(lora) for lora in loras]


@cache
def _find(tags: tuple, given: tuple[GivenLora, ...]) -> tuple[tuple[Lora, ...], dict[str, str]]:
    """`find`, which searches folders, once for equal arguments."""
    return find(tags, given)
