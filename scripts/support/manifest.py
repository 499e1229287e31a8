"""The folder of a job of sample.py: its pictures, what they were made from, and which are still missing.

    job.json             what the job is: another one may not continue here
    00012-s123.png       picture 12, with seed 123; in folders of 1000 if there are more pictures
    manifest-RANK.jsonl  a line for each picture that a rank has drawn, or failed to draw
    manifest.jsonl       those lines in the order of the pictures, once the job is done

A picture appears under its name complete or not at all, and it alone says that it is made. Its line is written just
before, so every picture has one; after a kill in between there are two, and the newer one counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scripts.support.output_files import make_folder, write_json
from scripts.support.prompts_files import Item
from sd.files import write_whole
from sd.images import write_png

JOB, MANIFEST, PARTS = "job.json", "manifest.jsonl", "manifest-*.jsonl"
PER_FOLDER = 1000  # every write looks for leftovers in its folder: 1 ms among 1000 files, 50 ms among 10,000
MAX_QUOTED = 40  # characters of a value in an error
PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def check_folder(folder: Path, job: dict[str, str | None]) -> None:
    """Makes the folder if it is missing, and checks that `job`, texts by their names, may write there.

    Raises ValueError for a folder with another job or with other files, and OSError for one that cannot be written to.
    """
    make_folder("--out", folder)
    path = folder / JOB
    if not path.exists():
        if other := next((entry.name for entry in folder.iterdir() if not entry.name.startswith(".")), None):
            raise ValueError(f"--out should be a new folder, or one of an earlier run: {folder} contains {other}.")
        return
    try:
        known = json.loads(path.read_text("utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise ValueError(f"--out should be the folder of an earlier run, but {path} is damaged: choose another folder.")
    if difference := find_difference(known, job):
        name, before, now = difference
        raise ValueError(
            f"--out should be the folder of the same job: {name} was {before} in {folder} and is {now}; choose another "
            "folder."
        )


def claim(folder: Path, job: dict[str, str | None]) -> None:
    """Writes which job the folder belongs to. Raises OSError."""
    write_json(folder / JOB, job)


def find_difference(one: dict[str, object], other: dict[str, object]) -> tuple[str, str, str] | None:
    """The first name with different values, and both values as an error quotes them. None if the dicts are equal."""
    for name in [*one, *other]:
        if one.get(name) != other.get(name):
            return name, *(_quoted(values.get(name)) for values in (one, other))
    return None


def _quoted(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


class Folder:
    """The pictures of a job, as one rank sees and writes them.

    `parameters` gives the text of an item's settings that goes into its picture. Each rank appends to a separate file:
    no two processes ever write to the same one.
    """

    def __init__(self, path: Path, items: Sequence[Item], rank: int, parameters: Callable[[Item], str]):
        self.path, self.items, self.parameters = path, items, parameters
        self.lines = path / PARTS.replace("*", str(rank))

    def name(self, item: Item) -> str:
        """The name of an item's picture, relative to the folder."""
        name = f"{item.index:05d}-s{item.seed}.png"
        return name if len(self.items) <= PER_FOLDER else f"{item.index // PER_FOLDER:04d}/{name}"

    def has(self, item: Item) -> bool:
        """Whether the item's picture is there and complete. `check_folder` has made sure that it is of this job."""
        try:
            with open(self.path / self.name(item), "rb") as file:
                begin = file.read(len(PNG_BEGIN))
                file.seek(-len(PNG_END), 2)
                return begin == PNG_BEGIN and file.read() == PNG_END
        except OSError:  # none, or one that is too short
            return False

    def write(self, item: Item, image: np.ndarray, seconds: float) -> None:
        """Writes a picture, uint8 (H, W, 3), and its line. Raises OSError."""
        self._append(self.record(item, seconds))
        write_png(self.path / self.name(item), image, self.parameters(item), overwrite=True)

    def fail(self, item: Item, error: str) -> None:
        """Writes the line of a picture that cannot be made. Raises OSError."""
        self._append(_failure(item, error))

    def record(self, item: Item, seconds: float | None) -> dict:
        """The line of a picture."""
        return {
            "index": item.index,
            "line": item.line,
            "file": self.name(item),
            "prompt": item.prompt,
            "seed": item.seed,
            "parameters": self.parameters(item),
            "seconds": seconds,
        }

    def merge(self) -> int:
        """Writes manifest.jsonl, removes the ranks' own files, and returns how many pictures failed. Raises OSError."""
        parts = sorted(self.path.glob(PARTS))
        known: dict[tuple[int, bool], bytes] = {}  # the newest line of each picture, by its index and whether it failed
        for path in [self.path / MANIFEST, *sorted(parts, key=lambda path: path.stat().st_mtime)]:
            known |= _read_lines(path)
        lines, failed = [], 0
        for item in self.items:
            made = item.request is not None and self.has(item)
            line = known.get((item.index, not made)) if item.request is not None else None
            if line is None:
                record = self.record(item, None) if made else _failure(item, item.error or "no rank has made it")
                line = _as_line(record)
            lines.append(line)
            failed += not made
        write_whole(self.path / MANIFEST, lambda file: file.writelines(lines), overwrite=True)
        for path in parts:
            path.unlink(missing_ok=True)
        return failed

    def _append(self, record: dict) -> None:
        line = _as_line(record)
        try:
            with open(self.lines, "ab+") as file:
                if file.tell():
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # after a kill in the middle of a line
                file.write(line)
        except OSError as error:
            raise OSError(f"{self.lines} cannot be written ({error.strerror or error}).") from error


def _failure(item: Item, error: str) -> dict:
    return {
        "index": item.index,
        "line": item.line,
        "file": None,
        "prompt": item.prompt,
        "seed": item.seed,
        "error": error,
    }


def _as_line(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _read_lines(path: Path) -> dict[tuple[int, bool], bytes]:
    """The lines of a file, by the index of the picture and whether it failed. Incomplete lines are left out."""
    found = {}
    if path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                found[record["index"], "error" in record] = line
            except (ValueError, TypeError, KeyError):
                continue
    return found
