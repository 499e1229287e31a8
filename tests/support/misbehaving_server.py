"""A local web server that serves one file, and misbehaves on demand."""

import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scripts.download import Weights, download

BODY = bytes(range(256)) * 800  # 204,800 bytes
WRONG = BODY[::-1]


def weights(size: int | None = len(BODY)) -> Weights:
    """The file that the server has."""
    return Weights("https://example.invalid/model.ckpt", hashlib.sha256(BODY).hexdigest(), size)


class Handler(BaseHTTPRequestHandler):
    """Behaves as the next entry of `server.script` says. Without an entry, it serves ranges of BODY."""

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range", "")
        server.ranges.append(wanted)
        behaviour = server.script.pop(0) if server.script else "ranges"
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if isinstance(behaviour, tuple):  # (status, headers)
            self.answer(*behaviour)
        elif behaviour == "ranges" and start >= len(BODY):
            self.answer(416, {"Content-Range": f"bytes */{len(BODY)}", "Content-Type": "text/html"}, b"none")
        elif behaviour in ("ranges", "drop"):
            end = len(BODY) if behaviour == "ranges" else (start + len(BODY)) // 2
            headers = {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"}
            self.answer(206, headers, BODY[start:end], len(BODY) - start)
        elif behaviour == "reset":
            self.answer(200, {}, BODY[:50_000], len(BODY))
            # Unsent bytes are discarded, so the client sees a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif behaviour == "hang up":
            self.close_connection = True
        elif behaviour == "without length":
            self.answer(200, {}, BODY[: len(BODY) // 2], length=None)
        elif behaviour == "unknown size":
            self.answer(200, {}, BODY, length=None)
        elif behaviour == "stall":
            self.answer(200, {}, BODY[:50_000], len(BODY))
            server.stopped.wait(10)
        elif behaviour == "endless":
            self.answer(200, {}, BODY, length=None)
            while not server.stopped.wait(0):
                self.wfile.write(BODY)
        elif behaviour == "no HTTP":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            self.close_connection = True
        elif behaviour == "shifted range":
            self.answer(206, {"Content-Range": f"bytes 5-{len(BODY) - 1}/{len(BODY)}"}, BODY[5:])
        else:
            body = {"ignores ranges": BODY, "wrong": WRONG, "short": BODY[:-100]}[behaviour]
            self.answer(200, {}, body)

    def answer(self, status, headers, body=b"", length=-1):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(body), 2000):
            time.sleep(self.server.pause)
            self.wfile.write(body[start : start + 2000])

    def log_message(self, *_):
        pass


@contextmanager
def running() -> Iterator[ThreadingHTTPServer]:
    """Serves on a free port. `script`: what to do with the next requests. `ranges`: the ranges that were requested.
    `pause`: seconds between every 2,000 bytes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.ranges, server.pause, server.stopped = [], [], 0, threading.Event()
    server.handle_error = lambda *_: None  # do not print when a client hangs up
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def run(server: ThreadingHTTPServer, folder: Path, size: int | None = len(BODY)) -> tuple[str, list[float]]:
    """Downloads. Returns the script's sentence, and the seconds that it slept before each new attempt."""
    slept: list[float] = []
    said = download(weights(size), folder, f"http://127.0.0.1:{server.server_port}/model.ckpt", slept.append)
    return said, slept


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
