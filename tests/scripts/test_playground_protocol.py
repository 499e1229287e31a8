"""Connections of the playground's server that send no whole request."""

import asyncio

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: see requirements-playground.txt")

from scripts.playground import protocol  # noqa: E402
from scripts.playground.protocol import Protocol  # noqa: E402

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def app(scope, receive, send):
    await asyncio.sleep(1)  # longer than some looks
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answers(*requests):
    """What a server sends on each connection until it closes it."""
    config = uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_level="error", port=0)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    async def answer(request):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()

    try:
        return await asyncio.gather(*map(answer, requests))
    finally:
        server.should_exit = True
        await running


def test_a_request_without_an_end_is_closed_and_a_slow_answer_is_not(monkeypatch):
    monkeypatch.setattr(protocol, "IDLE_SECONDS", 0.2)
    whole = HEAD + b"\r\n"
    nothing, half, slow, then_half = asyncio.run(answers(b"", HEAD, whole, whole + HEAD))
    assert nothing == half == b""
    for one in (slow, then_half):
        assert one.endswith(b"ok")
