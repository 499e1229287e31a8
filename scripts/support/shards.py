"""The pictures of a finished job -> tar files in the layout of WebDataset, for training from them.

A shard has two files for each picture, next to each other and with one name: 00012-s123.png and 00012-s123.json, which
is its line of the manifest. This is all that WebDataset expects, so Python's own tarfile writes it.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import BinaryIO

from scripts.support.manifest import MANIFEST
from sd.files import write_whole

SHARDS = "shards"


def write_shards(folder: Path, size: int) -> int:
    """Writes the pictures of a job's manifest into shards/00000.tar, ..., `size` to each. Returns the number of shards.

    Pictures that failed are left out. Earlier shards are replaced, or deleted. Raises OSError.
    """
    with open(folder / MANIFEST, encoding="utf-8") as lines:
        made = [line for line in lines if json.loads(line)["file"]]
    starts = range(0, len(made), size)
    for number, start in enumerate(starts):
        path = folder / SHARDS / f"{number:05d}.tar"
        write_whole(path, partial(_write, folder, made[start : start + size]), overwrite=True)
    for path in (folder / SHARDS).glob("[0-9]" * 5 + ".tar"):
        if int(path.stem) >= len(starts):  # of an earlier run with smaller shards
            path.unlink()
    return len(starts)


def _write(folder: Path, lines: list[str], file: BinaryIO) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for line in lines:
            path = folder / json.loads(line)["file"]
            for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.json", line.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
