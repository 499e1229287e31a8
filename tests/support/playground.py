"""A playground on a free port, in its own process, and what its clients do; and calls of an application alone."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from scripts.playground.limits import Limits
from scripts.playground.server import Server
from tests import ROOT

HOST = "127.0.0.1:7860"
DEFAULTS = Limits()


def call(app, method="GET", path="/", query="", body=(b"",), **headers):
    """What an ASGI application answers: the status, the headers and the body. `body` comes in parts."""
    headers = {"host": HOST} | {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": pairs}
    sent, parts = [], [{"type": "http.request", "body": part, "more_body": True} for part in body]
    parts[-1]["more_body"] = False

    async def receive():
        if not parts:
            await asyncio.sleep(60)
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answer, b"".join(message.get("body", b"") for message in sent[1:])


class Live:
    """A running playground. `arguments` are flags of playground.py."""

    def __init__(self, *arguments: object, threads: int = 1):
        command = [sys.executable, str(ROOT / "scripts/playground.py"), "--port", "0", "--no-browser"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        line = self.process.stdout.readline()  # "The playground is at http://127.0.0.1:PORT/"
        self.port = int(line.rpartition(":")[2].partition("/")[0])

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()

    def connect(self, timeout: float = 300) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def call(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, object]:
        """The status and the JSON of an answer."""
        connection = self.connect()
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if text else None

    def ask(self, **fields: object) -> str:
        """Asks for a picture -> its id."""
        status, answer = self.call("POST", "/api/jobs", fields)
        assert status == 201, answer
        return answer["id"]

    def events(self, job: str) -> Iterator[tuple[str, dict]]:
        """The events of a picture, as they come. The connection is made now: a picture without a reader is dropped."""
        connection = self.connect()
        connection.request("GET", f"/api/jobs/{job}/events")
        return self._read(connection)

    @staticmethod
    def _read(connection: http.client.HTTPConnection) -> Iterator[tuple[str, dict]]:
        answer, name = connection.getresponse(), ""
        try:
            for line in answer:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key == "event":
                    name = value
                if key == "data":
                    yield name, json.loads(value)
        finally:
            answer.close()
            connection.close()

    def draw(self, **fields: object) -> tuple[str, dict]:
        """Draws a picture -> the event that ended it, and its data."""
        return [*self.events(self.ask(**fields))][-1]

    def workers(self) -> list[int]:
        """The ids of the worker processes (Linux)."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(path) as file:
            return [int(child) for child in file.read().split()]

    def wait_until_ready(self, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while self.call("GET", "/api/status")[1]["worker"] != "ready":
            assert time.monotonic() < until
            time.sleep(0.1)


class FakeServer(Server):
    """A server whose worker answers at once, and draws nothing."""

    def __init__(self, limits: Limits = DEFAULTS):
        super().__init__({}, limits, print)
        samplers = [{"name": "euler", "label": "Euler", "default_steps": 30, "max_steps": None}]
        self.about = {"samplers": samplers, "model": "tiny", "file": "tiny.ckpt", "vae": None}
        self.wrong: Exception | None = None

    async def ready(self) -> None:
        pass

    async def ask(self, what: str, **more: object) -> dict:
        if self.wrong:
            raise self.wrong
        return {"what": what} | ({"loras": []} if what == "files" else {})


def memory(process: int) -> int:
    """Bytes in use by a process (Linux)."""
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
