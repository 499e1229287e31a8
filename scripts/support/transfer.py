"""Downloads a file over HTTP: resumes it, and tries again after dropped connections and when the server is busy.

`fetch` appends the missing bytes to a `HashedFile`. It raises DownloadError, with a message of one sentence, when
another attempt would not help.
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
TIMEOUT = 30  # seconds without a byte before a connection counts as dropped
ATTEMPTS = 6  # give up after this many in a row without a new byte
LONGEST_WAIT = 300  # seconds: give up if the server asks for a longer wait
LARGEST = 20 << 30  # bytes: give up beyond this if the server does not state the file's size


class DownloadError(ValueError):
    """The file cannot be downloaded. The message is one sentence for the user."""


class TryAgain(Exception):
    """A failure that may be temporary. `wait`: the seconds that the server asks us to wait, or None."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class HashedFile:
    """An open file, with its size in bytes and its SHA-256 kept up to date as it grows."""

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
    from tqdm import tqdm  # imported late: download.py first checks that it is installed

    return tqdm(desc=label, total=total, initial=start, unit="B", unit_scale=True, disable=total == 0)


def fetch(url: str, part: HashedFile, size: int | None, sleep: Callable[[float], object] = time.sleep) -> None:
    """Downloads until the file has `size` bytes, or the server's size if `size` is None.

    Raises DownloadError, or OSError if the disk fails.
    """
    failures, furthest = 0, part.size
    while size is None or part.size < size:
        try:
            receive(url, part, size)
            return
        except TryAgain as error:
            # Only new bytes count as progress: a server that cannot resume sends the same ones every time.
            failures = 1 if part.size > furthest else failures + 1
            furthest = max(furthest, part.size)
            wait = 2 ** (failures - 1) if error.wait is None else error.wait
            if failures == ATTEMPTS or wait > LONGEST_WAIT:
                when = "later" if error.wait is None else f"in {wait:.0f} s"
                raise DownloadError(f"{url}: {error}; run this again {when} to resume.") from None
            print(f"{url}: {error}; trying again in {wait:.0f} s.")
            sleep(wait)


def receive(url: str, part: HashedFile, size: int | None) -> None:
    """Makes one request for the missing bytes, and appends what arrives.

    Raises TryAgain if bytes are still missing afterwards, DownloadError if another attempt would not help.
    """
    with open_url(url, part.size) as response:
        start, total = offer(response)
        if total is not None and size not in (None, total):
            raise DownloadError(f"{url} offers {total:,} bytes, but the published file has {size:,}.")
        if start != part.size:
            part.clear()
            if start != 0:
                raise TryAgain("the server did not send the missing bytes, so the download starts from the beginning")
        total = size if total is None else total
        check_space(part.name.parent, (total or 0) - part.size)
        with progress(part.name.stem, total, part.size) as bar:
            while (total is None or part.size < total) and (chunk := read(response)):
                part.append(chunk)
                bar.update(len(chunk))
                if part.size > LARGEST:
                    raise DownloadError(f"{url} has sent {part.size:,} bytes without stating the file's size.")
    if total is not None and part.size < total:
        raise TryAgain("the connection was dropped")


def check_space(folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if missing > free:
        needs = f"{folder} has {free:,} bytes free, but {missing:,} are needed"
        raise DownloadError(f"{needs}: free some space, or choose another folder with --out.")


class HttpOnly(HTTPRedirectHandler):
    """Refuses redirections to ftp:, which urllib would follow."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(("http://", "https://")):
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is neither https:// nor http://.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, start: int) -> HTTPResponse:
    """Requests the bytes from `start` on. Returns a response of status 200 (the whole file), 206 (these bytes) or 416
    (the file is not longer than `start`)."""
    request = Request(url, headers={"User-Agent": "stable-diffusion-from-scratch", "Range": f"bytes={start}-"})
    try:
        return build_opener(HttpOnly).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            return error  # urllib raises it, but it is a normal response here
        raise explain(url, error) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            why = f"the server's certificate cannot be trusted ({reason.verify_message})"
            raise DownloadError(f"{url}: {why}; check this computer's clock and its certificates.") from error
        if isinstance(error, ValueError):  # an invalid address: the user's, or one that the server redirects to
            raise DownloadError(f"{url} is not an address to download from ({_plain(reason)}).") from error
        raise TryAgain(f"no connection ({_plain(reason)})") from error


def read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise TryAgain(f"the connection was dropped ({_plain(error)})") from error


def offer(response: HTTPResponse) -> tuple[int | None, int | None]:
    """Where in the file the response starts, and the size of the file. None for what the server does not state."""
    if response.status == 200:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(f"{response.url} is a web page, not the file: give the file's own address with --url.")
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    # "bytes 100-199/200" with status 206. With 416 "bytes */200": no bytes follow, as if it started at the end.
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", response.headers.get("Content-Range", ""))
    start, total = (None if n is None else int(n) for n in match.groups()) if match else (None, None)
    return total if start is None else start, total


def explain(url: str, error: HTTPError) -> Exception:
    """The exception for an HTTP error."""
    if error.code < 400:
        return DownloadError(f"{url} redirects in a loop: give the file's own address with --url.")
    answer = f"the server answered {error.code} {_plain(error.reason)}"
    if error.code in (408, 429) or error.code >= 500:
        wait = error.headers.get("Retry-After", "")
        return TryAgain(answer, float(wait) if wait.isdecimal() else None)
    if error.code in (401, 403):
        return DownloadError(f"{url}: {answer}; log in and get it with a browser, or give another address with --url.")
    if error.code in (404, 410):
        return DownloadError(f"{url}: {answer}; give the file's current address with --url.")
    return DownloadError(f"{url}: {answer}.")


def _plain(reason: object) -> str:
    """A reason as one line of at most 200 printable characters, whatever the server sent."""
    return "".join(letter if letter.isprintable() else " " for letter in str(reason)[:200]).strip()
