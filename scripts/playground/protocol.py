"""Connections that send no whole request are closed, or a few hundred of them would shut everyone else out."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

IDLE_SECONDS = 20  # between two looks


class Protocol(AutoHTTPProtocol):
    """uvicorn's own, which waits for the end of a request's headers without a limit."""

    seen: object = None  # the request that the last look found

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.look = self.loop.call_later(IDLE_SECONDS, self.close_if_idle)

    def connection_lost(self, error: Exception | None) -> None:
        self.look.cancel()
        super().connection_lost(error)

    def close_if_idle(self) -> None:
        """Closes the connection if it has no request to answer, and has begun none since the last look."""
        request = self.cycle
        if request is self.seen and (request is None or request.response_complete):
            self.transport.close()
            return
        self.seen = request
        self.look = self.loop.call_later(IDLE_SECONDS, self.close_if_idle)
