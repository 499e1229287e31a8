"""A server on this computer that speaks the part of the Hugging Face hub's API that its client uses to fetch files.

with serve({"owner/name": Repository({"unet/config.json": b"{}"})}) as server:
    ...  # HF_ENDPOINT=server.url
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """The files of a model at its only commit, which the branch `main` and the tags name."""

    files: dict[str, bytes]
    gated: bool = False  # needs a token
    tags: tuple[str, ...] = ()


@dataclass
class Server:
    url: str
    downloads: list[str] = field(default_factory=list)  # "owner/name/file" of every GET of a file, in order


@contextmanager
def serve(
    repositories: dict[str, Repository], cut_after: int | None = None, stall: threading.Event | None = None
) -> Iterator[Server]:
    """A running server. With `cut_after`, the first download of each file breaks off after that number of bytes. With
    `stall`, it waits there for this event, and then sends the rest."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.repositories, server.cut_after, server.stall, server.cut = repositories, cut_after, stall, set()
    server.record = Server(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.record
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if repository.gated and not self.headers.get("Authorization"):
            return self.refuse(401, "GatedRepo", "Access to this model is restricted")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT, *repository.tags):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api and rest[:1] == ["tree"]:
            return self.answer_json([self.entry(path, content) for path, content in repository.files.items()])
        if api:
            siblings = [{"rfilename": path} for path in repository.files]
            return self.answer_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        path = "/".join(rest[2:])
        if rest[:1] != ["resolve"] or path not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.send_file(f"{name}/{path}", repository.files[path])

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_file(self, name: str, content: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.record.downloads.append(f"{name}{f' from {start}' if start else ''}")
        if self.server.cut_after in range(len(content)) and name not in self.server.cut:
            self.server.cut.add(name)
            self.wfile.write(content[start : self.server.cut_after])
            if self.server.stall is None:
                self.close_connection = True
                return
            self.server.stall.wait()
            start = max(start, self.server.cut_after)
        self.wfile.write(content[start:])

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.answer(status, body, {"X-Error-Code": code, "X-Error-Message": message})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
