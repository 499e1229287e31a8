"""What stands before the application: who may speak to it, how much, and what browsers may do with its answers.

A web page elsewhere must not be able to use this server through its reader's browser. Two ways are closed:
DNS rebinding (the page's own name now points to 127.0.0.1) by the Host header, and requests across sites by the Origin
and Sec-Fetch-Site headers, which browsers add and pages cannot change.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import ipaddress
import json
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from urllib.parse import parse_qs, urlsplit

from scripts.playground.limits import Limits

COOKIE = "playground_token_"  # and the port: servers of one machine share its cookies
LOCAL = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Message = MutableMapping
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """The status and the sentence with which a request is refused."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Guard:
    """ASGI middleware. `host` and `port` are where the server listens, `token` what clients must have, or None."""

    def __init__(self, app: Callable, host: str, port: int, token: str | None, limits: Limits):
        self.app, self.host, self.port, self.token, self.limits = app, host, port, token, limits
        self.local = host in LOCAL
        self.cookie = hashlib.sha256((token or "").encode()).hexdigest()  # any token fits into a cookie like that

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no web sockets
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() != b"server"]
                if not any(name.lower() == b"cache-control" for name, _ in kept):
                    added.append((b"cache-control", b"no-store"))
                message = {**message, "headers": kept + added}
            await send(message)

        try:
            self.check_host(headers)
            self.check_origin(scope["method"], headers)
            if self.is_given_in_address(scope):
                await _redirect(guarded, f"{COOKIE}{self.port}={self.cookie}")
                return
            self.check_token(headers)
            body = await self.read(headers, receive)
        except Refused as refused:
            asks = headers.get("sec-fetch-mode", "navigate") == "navigate"  # not for what a page asks by itself
            await answer(guarded, refused.status, str(refused), asks)
            return
        await self.app(scope, _replay(body, receive), guarded)

    def check_host(self, headers: dict[str, str]) -> None:
        """Against DNS rebinding: the name must be one that only this machine has, or a number."""
        given = headers.get("host", "")
        try:
            parts = urlsplit(f"//{given}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            name, port = "", 0
        known = name in LOCAL if self.local else name in self._names() or _is_address(name)
        if not known or port != self.port or _has_more_than_a_host(given):
            example = f"{'127.0.0.1' if self.local else self.host}:{self.port}"
            raise Refused(421, f"The Host header should name this server, such as {example}, not {given[:100]!r}.")

    def check_origin(self, method: str, headers: dict[str, str]) -> None:
        """Against requests of pages elsewhere."""
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{headers['host']}", f"https://{headers['host']}"):
            raise Refused(403, f"Requests should come from this server's own page, not from {origin[:100]!r}.")
        site = headers.get("sec-fetch-site", "none")
        link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        link &= headers.get("sec-fetch-dest", "document") == "document"
        if site not in ("none", "same-origin") and not link:
            raise Refused(403, "Requests should come from this server's own page, not from another site.")

    def is_given_in_address(self, scope: Message) -> bool:
        """Whether the address is /?token=... with the right token, for which a browser then gets a cookie."""
        if self.token is None or scope["path"] != "/" or scope["method"] != "GET":
            return False
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return _equal(given, self.token)

    def check_token(self, headers: dict[str, str]) -> None:
        """The token as a bearer, as the password of basic authentication (as clients of AUTOMATIC1111 send it), or in
        the cookie."""
        if self.token is None:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip() if kind.lower() == "bearer" else ""
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        # Not http.cookies, which drops all cookies if it cannot read one. Other servers of this host may have any.
        cookie = re.search(rf"(?:^|;)\s*{COOKIE}{self.port}=([^;\s]*)", headers.get("cookie", ""))
        if not _equal(given, self.token) and not (cookie and _equal(cookie[1], self.cookie)):
            how = "open /?token=... in a browser, or send it as a bearer or as the password of basic authentication"
            raise Refused(401, f"The token that the server was started with should be given: {how}.")

    async def read(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The body. It is read here, so that its size and time have limits for every path."""
        most = self.limits.body
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise Refused(413, f"A request should have at most {most:,} bytes, the limit of this server.")
        try:
            body = await asyncio.wait_for(self._read(receive), self.limits.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            seconds = f"{self.limits.body_seconds:g}"
            raise Refused(408, f"A request should arrive within {seconds} seconds, the limit of this server.") from None
        if body.count(b",") > self.limits.commas:
            raise Refused(
                413, f"A request should have at most {self.limits.commas:,} commas, the limit of this server."
            )
        return body

    async def _read(self, receive: Receive) -> bytes:
        parts, size, more, most = [], 0, True, self.limits.body
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Refused(400, "The request ended early.")
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > most:
                raise Refused(413, f"A request should have at most {most:,} bytes, the limit of this server.")
        return b"".join(parts)

    def _names(self) -> set[str]:
        own = socket.gethostname().lower()
        return {*LOCAL, self.host.lower(), own, f"{own}.local"}


def _has_more_than_a_host(given: str) -> bool:
    """Whether a Host header has more than a name and a port."""
    return any(mark in given for mark in "/\\@?# \t")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def answer(send: Send, status: int, sentence: str, asks: bool = True) -> None:
    """A refusal as JSON, {"detail": sentence}. With `asks`, a browser asks its reader for the token."""
    headers = [(b"content-type", b"application/json")]
    if status == 401 and asks:
        headers.append((b"www-authenticate", b'Basic realm="playground"'))
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": sentence}).encode()})


async def _redirect(send: Send, cookie: str) -> None:
    cookie = f"{cookie}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
    headers = [(b"location", b"/"), (b"set-cookie", cookie.encode())]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
