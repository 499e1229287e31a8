"""An address and the beginning of a file -> its rest, through dropped connections and busy servers.

`fetch` appends to a `HashedFile` what the server has beyond it. It raises DownloadError, whose message is one sentence,
once asking again is of no use.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

if TYPE_CHECKING:
    from tqdm import tqdm

CHUNK = 1 << 20  # bytes read at once
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 6  # in a row that brought nothing new
LONGEST_WAIT = 300  # seconds that a server may make us wait
LARGEST = 20 << 30  # bytes of a file whose size nobody tells


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
    from tqdm import tqdm  # not before: download.py is to say where it is missing

    return tqdm(desc=label, total=total, initial=start, unit="B", unit_scale=True, disable=total == 0)


def fetch(url: str, part: HashedFile, size: int | None, sleep: Callable[[float], object] = time.sleep) -> None:
    """Receive until the file is as long as it should be: `size` bytes, or what the server says if that is None.

    Raises DownloadError, and OSError where the disk fails.
    """
    failures, furthest = 0, part.size
    while size is None or part.size < size:
        try:
            receive(url, part, size)
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


def receive(url: str, part: HashedFile, size: int | None) -> None:
    """Ask once for what is missing, and append what comes.

    Raises TryAgain if something is still missing, DownloadError if asking again is no use.
    """
    with open_url(url, part.size) as response:
        start, total = offer(response)
        if total is not None and size not in (None, total):
            raise DownloadError(f"{url} offers {total:,} bytes, but the published file has {size:,}.")
        if start != part.size:
            part.clear()
            if start != 0:
                raise TryAgain("the server does not have the rest of what is here, which is dropped")
        total = size if total is None else total
        check_space(part.name.parent, (total or 0) - part.size)
        with progress(part.name.stem, total, part.size) as bar:
            while (total is None or part.size < total) and (chunk := read(response)):
                part.append(chunk)
                bar.update(len(chunk))
                if part.size > LARGEST:
                    raise DownloadError(f"{url} has sent {part.size:,} bytes, and does not say when it will end.")
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
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            why = f"the server's certificate cannot be trusted ({reason.verify_message})"
            raise DownloadError(f"{url}: {why}; check this computer's clock and its certificates.") from error
        if isinstance(error, ValueError):  # of an address, given or redirected to
            raise DownloadError(f"{url} is no address to download from ({_plain(reason)}).") from error
        raise TryAgain(f"no connection ({_plain(reason)})") from error


def read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise TryAgain(f"the connection was dropped ({_plain(error)})") from error


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
    answer = f"the server answered {error.code} {_plain(error.reason)}"
    if error.code in (408, 429) or error.code >= 500:
        wait = error.headers.get("Retry-After", "")
        return TryAgain(answer, float(wait) if wait.isdecimal() else None)
    if error.code in (401, 403):
        return DownloadError(f"{url}: {answer}; get the file with a browser, logged in, or from elsewhere with --url.")
    if error.code in (404, 410):
        return DownloadError(f"{url}: {answer}; give the file's present address with --url.")
    return DownloadError(f"{url}: {answer}.")


def _plain(reason: object) -> str:
    """A reason in one line, whatever it is that the server sent."""
    return "".join(letter if letter.isprintable() else " " for letter in str(reason)[:200]).strip()
