"""Download the real weights of Stable Diffusion 1.5 into data/ (4.3 GB).

    python scripts/download.py [safetensors | ckpt | inpainting] [--out FOLDER] [--url ADDRESS]

In: an address. Out: the file that was published, checked by its SHA-256; until then its name ends in .part, and a run
that was stopped is taken up where it ended. Exit status: 0 if the file is there, 2 if not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two downloads at once go unnoticed there
    fcntl = None

DATA = Path(__file__).resolve().parents[1] / "data"
CHUNK = 1 << 20  # bytes read at once
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 6  # in a row that brought nothing new
LONGEST_WAIT = 300  # seconds that a server may make us wait


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


class DownloadError(Exception):
    """The file cannot be had; the message is one sentence for the user."""


class TryAgain(Exception):
    """A failure that may pass. `wait`: seconds that the server asks for, None if it does not say."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class HashedFile:
    """An open file with its size in bytes and its SHA-256, which grow with it."""

    def __init__(self, file: BinaryIO):
        self.file, self.name = file, Path(file.name)
        self.digest, self.size = hashlib.sha256(), 0
        file.seek(0)
        with progress(f"Checking {self.name.name}", os.fstat(file.fileno()).st_size) as bar:
            while chunk := file.read(CHUNK):
                self.count(chunk)
                bar.update(len(chunk))

    def count(self, chunk: bytes) -> None:
        self.digest.update(chunk)
        self.size += len(chunk)

    def append(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.count(chunk)

    def clear(self) -> None:
        self.file.truncate(0)
        self.digest, self.size = hashlib.sha256(), 0


def progress(label: str, total: int | None, start: int = 0) -> tqdm:
    return tqdm(desc=label, total=total, initial=start, unit="B", unit_scale=True, disable=total == 0)


def download(weights: Weights, folder: Path, url: str, sleep: Callable[[float], object] = time.sleep) -> str:
    """Have `weights` in `folder`, from `url` unless they are there already; return a sentence that says which.

    Raises DownloadError, and OSError where the disk fails.
    """
    target, partial = folder / weights.name, folder / f"{weights.name}.part"
    if target.exists():
        with open(target, "rb") as file:
            check(HashedFile(file), weights, "move it away and run this again")
        return f"{target} is there already, and its SHA-256 is right."
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"{url} is no address to download from: it must start with https:// or http://.")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(partial) as file:
        part = HashedFile(file)
        if part.size:
            print(f"{part.size:,} bytes are there from an earlier run: going on from there.")
        fetch(url, part, weights, sleep)
        try:
            check(part, weights, "it was removed, so the next run starts from nothing")
        except DownloadError:
            partial.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)
    return f"{target} is complete, and its SHA-256 is right."


def check(file: HashedFile, weights: Weights, advice: str) -> None:
    """Raise DownloadError unless the file is what was published."""
    found = file.digest.hexdigest()
    if found != weights.sha256:
        what = f"{file.name} ({file.size:,} bytes) has the SHA-256 {found}"
        raise DownloadError(f"{what}, the published file {weights.sha256}: {advice}.")


@contextmanager
def locked(partial: Path) -> Iterator[BinaryIO]:
    """Open the partial file for appending, for one process at a time. If the process dies, the system unlocks it."""
    with open(partial, "a+b") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DownloadError(f"Another download into {partial} is under way: wait for its end.") from None
            except OSError:
                pass  # a network drive without locks
        try:
            yield file
        finally:
            file.flush()
            if os.fstat(file.fileno()).st_size == 0:
                partial.unlink(missing_ok=True)


def fetch(url: str, part: HashedFile, weights: Weights, sleep: Callable[[float], object]) -> None:
    """Receive until the file is as long as it should be, through dropped connections and busy servers."""
    failures, furthest = 0, part.size
    while weights.size is None or part.size < weights.size:
        try:
            receive(url, part, weights)
            return
        except TryAgain as error:
            # Only a new byte counts as success: a server that cannot resume brings the same ones again and again.
            failures = 1 if part.size > furthest else failures + 1
            furthest = max(furthest, part.size)
            wait = 2 ** (failures - 1) if error.wait is None else error.wait
            if failures == ATTEMPTS or wait > LONGEST_WAIT:
                when = "later" if error.wait is None else f"in {wait:.0f} s"
                raise DownloadError(f"{url}: {error}; run this again {when}, it goes on from here.") from None
            print(f"{url}: {error}; trying again in {wait:.0f} s.")
            sleep(wait)


def receive(url: str, part: HashedFile, weights: Weights) -> None:
    """Ask once for what is missing, and append what comes.

    Raises TryAgain if something is still missing, DownloadError if asking again is no use.
    """
    with open_url(url, part.size) as response:
        start, total = offer(response)
        if total is not None and weights.size not in (None, total):
            raise DownloadError(f"{url} offers {total:,} bytes, but the published file has {weights.size:,}.")
        if start != part.size:
            part.clear()
            if start != 0:
                raise TryAgain("the server does not have the rest of what is here, which is dropped")
        total = weights.size if total is None else total
        check_space(part.name.parent, (total or 0) - part.size)
        with progress(weights.name, total, part.size) as bar:
            while (total is None or part.size < total) and (chunk := read(response)):
                part.append(chunk)
                bar.update(len(chunk))
    if total is not None and part.size < total:
        raise TryAgain("the connection was dropped")


def check_space(folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if missing > free:
        needs = f"{folder} has room for {free:,} bytes, but {missing:,} are missing"
        raise DownloadError(f"{needs}: make room, or choose another folder with --out.")


class HttpOnly(HTTPRedirectHandler):
    """Follows no redirection to ftp:, which urllib would."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(("http://", "https://")):
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is neither https:// nor http://.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, start: int) -> HTTPResponse:
    """Ask for the bytes from `start` on. The answer's status is 200 (the whole file), 206 (these) or 416 (no such)."""
    request = Request(url, headers={"User-Agent": "stable-diffusion-from-scratch", "Range": f"bytes={start}-"})
    try:
        return build_opener(HttpOnly).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            return error  # an answer as good as any
        raise explain(url, error) from error
    except (OSError, HTTPException) as error:
        raise TryAgain(f"no connection ({getattr(error, 'reason', error)})") from error


def read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise TryAgain(f"the connection was dropped ({error})") from error


def offer(response: HTTPResponse) -> tuple[int | None, int | None]:
    """Where in the file the answer starts, and the size of the file; None for what the server does not say."""
    if response.status == 200:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(f"{response.url} is a web page, not the file: give the file's own address with --url.")
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    # "bytes 100-199/200" with status 206, "bytes */200" with 416: nothing comes, as if it started at the end
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", response.headers.get("Content-Range", ""))
    start, total = (None if n is None else int(n) for n in match.groups()) if match else (None, None)
    return total if start is None else start, total


def explain(url: str, error: HTTPError) -> Exception:
    """What to raise for an answer that is no file."""
    if error.code < 400:
        return DownloadError(f"{url} redirects without end: give the file's own address with --url.")
    answer = f"the server answered {error.code} {error.reason}"
    if error.code in (408, 429) or error.code >= 500:
        wait = error.headers.get("Retry-After", "")
        return TryAgain(answer, float(wait) if wait.isdecimal() else None)
    if error.code in (401, 403):
        return DownloadError(f"{url}: {answer}; get the file with a browser, logged in, or from elsewhere with --url.")
    if error.code in (404, 410):
        return DownloadError(f"{url}: {answer}; give the file's present address with --url.")
    return DownloadError(f"{url}: {answer}.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Download the weights of Stable Diffusion 1.5, and check them.")
    parser.add_argument("which", nargs="?", choices=WEIGHTS, default="safetensors", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DATA, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--url", metavar="ADDRESS", help="another place where the same file is")
    options = parser.parse_args(arguments)
    weights = WEIGHTS[options.which]
    try:
        print(download(weights, options.out, options.url or weights.url))
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.out} cannot be written to ({error.strerror or error}).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; what has come is kept, and the next run goes on from there.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
