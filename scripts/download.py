"""Downloads the weights of Stable Diffusion 1.5 into data/ (4.3 GB) and checks their SHA-256.

    python scripts/download.py
    python scripts/download.py inpainting --out FOLDER
    python scripts/download.py ckpt --url ADDRESS

Until its SHA-256 has been checked, the file's name ends in .part. An interrupted download is resumed by the next run.
Exit status: 0 if the file is complete, 2 after an error, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where two downloads of one file at the same time are not detected
    fcntl = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, run
from scripts.support.transfer import DownloadError, HashedFile, fetch

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Weights:
    """A published file. `size` is in bytes, None if unknown."""

    url: str
    sha256: str
    size: int | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


HUB = "https://huggingface.co/stable-diffusion-v1-5"
WEIGHTS = {
    "safetensors": Weights(
        f"{HUB}/stable-diffusion-v1-5/resolve/main/v1-5-pruned-emaonly.safetensors",
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        4_265_146_304,
    ),
    "ckpt": Weights(
        f"{HUB}/stable-diffusion-v1-5/resolve/main/v1-5-pruned-emaonly.ckpt",
        "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
        4_265_380_512,
    ),
    "inpainting": Weights(
        f"{HUB}/stable-diffusion-inpainting/resolve/main/sd-v1-5-inpainting.ckpt",
        "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
    ),
}


def download(weights: Weights, folder: Path, url: str, sleep: Callable[[float], object] = time.sleep) -> str:
    """Downloads `weights` from `url` into `folder`, unless they are there. Returns a sentence that says what was done.

    Raises DownloadError, or OSError if the disk fails.
    """
    target, partial = folder / weights.name, folder / f"{weights.name}.part"
    if target.exists():
        with open(target, "rb") as file:
            if wrong := difference(HashedFile(file), weights):
                raise DownloadError(f"{wrong}: move it away and run this again.")
        return f"{target} already exists, and its SHA-256 is right."
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"{url} is not an address to download from: it should start with https:// or http://.")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(partial) as file:
        complete(file, weights, url, sleep)
        if fcntl:  # while it is locked, so that no other download starts in between
            os.replace(partial, target)
    if not fcntl:  # Windows cannot rename an open file
        os.replace(partial, target)
    return f"{target} is complete, and its SHA-256 is right."


def complete(file: BinaryIO, weights: Weights, url: str, sleep: Callable[[float], object]) -> None:
    """Downloads the missing part of an open file, or the whole file if what is there is not its beginning."""
    part = HashedFile(file)
    resumed = part.size
    if resumed:
        print(f"Resuming after the {resumed:,} bytes of an earlier run.")
    fetch(url, part, weights.size, sleep)
    wrong = difference(part, weights)
    if wrong and resumed:
        print("The bytes of the earlier run are not the beginning of this file: starting again.")
        part.clear()
        fetch(url, part, weights.size, sleep)
        wrong = difference(part, weights)
    if wrong:
        part.clear()
        raise DownloadError(f"{wrong}: it was deleted, so the next run starts from the beginning.")
    file.flush()
    os.fsync(file.fileno())


def difference(file: HashedFile, weights: Weights) -> str:
    """Describes how a file's SHA-256 differs from the published one. Empty if it does not."""
    found = file.digest.hexdigest()
    if found == weights.sha256:
        return ""
    return f"{file.name} ({file.size:,} bytes) has SHA-256 {found}, but the published file has {weights.sha256}"


@contextmanager
def locked(partial: Path) -> Iterator[BinaryIO]:
    """Opens and locks the partial file for appending. If the process dies, the system unlocks the file."""
    empty = False
    try:
        with open(partial, "a+b") as file:
            if fcntl:
                _lock(file, partial)
            try:
                yield file
            finally:
                file.flush()
                empty = os.fstat(file.fileno()).st_size == 0
                if fcntl and empty:  # while it is locked
                    partial.unlink(missing_ok=True)
    finally:
        if empty and not fcntl:  # Windows cannot delete an open file
            partial.unlink(missing_ok=True)


def _lock(file: BinaryIO, partial: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DownloadError(f"Another download into {partial} is running: wait until it ends.") from None
    except OSError:
        pass  # a network drive that does not support locks
    # Between open and lock, another download may have finished and given the file its final name.
    if not partial.exists() or not os.path.samestat(os.stat(partial), os.fstat(file.fileno())):
        raise DownloadError(f"Another download into {partial} has just ended: run this again.")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("download.py", __doc__, packages=["tqdm"])
    parser.add_argument("which", nargs="?", choices=WEIGHTS, default="safetensors", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DATA, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--url", metavar="ADDRESS", help="download the file from this address instead")
    options = parser.parse_args(arguments)
    weights = WEIGHTS[options.which]

    def explain(error: Exception) -> str:
        wrong = isinstance(error, OSError)
        return f"{options.out} cannot be written to ({error.strerror or error})." if wrong else str(error)

    def work() -> None:
        print(download(weights, options.out, options.url or weights.url))

    return run("download.py", work, "interrupted; the next run resumes the download.", explain)


if __name__ == "__main__":
    sys.exit(main())
