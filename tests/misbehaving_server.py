"""A web server on this machine that serves one file, and misbehaves on demand."""

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = bytes(range(256)) * 800  # 204,800 bytes
WRONG = BODY[::-1]


class Handler(BaseHTTPRequestHandler):
    """Behaves as the next entry of `server.script` says, and serves ranges of BODY when there is none."""

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
            # No waiting for what was not sent yet: the client sees a reset, not an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif behaviour == "hang up":
            self.close_connection = True
        elif behaviour == "without length":
            self.answer(200, {}, BODY[: len(BODY) // 2], length=None)
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
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def running() -> Iterator[ThreadingHTTPServer]:
    """Serve on a free port; `script` is what to do with the next requests, `ranges` what they asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.ranges = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
