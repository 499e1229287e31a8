"""Who may speak to the playground, and how much. Needs no web framework."""

import asyncio
import base64
import json

import pytest

from scripts.playground.limits import Limits
from scripts.playground.security import COOKIE, Guard
from tests.support.playground import HOST, call

TOKEN = "a long password"


def guard(host="127.0.0.1", token=None, **limits):
    """A guard before an application that answers with the length of the body."""

    async def app(scope, receive, send):
        length = len((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"server", b"x")]})
        await send({"type": "http.response.body", "body": str(length).encode()})

    return Guard(app, host, 7860, token, Limits(**limits))


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860"])
def test_this_machine_may(host):
    assert call(guard(), host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:7860",
        "127.0.0.1:80",
        "127.0.0.1",
        "127.0.0.1:7860@evil.example",
        "a:b:c",
        "",
        "127.0.0.1.evil.example",
    ],
)
def test_dns_rebinding(host):
    """A page at evil.example, whose name now points to 127.0.0.1, cannot change what the browser sends as Host."""
    status, _, body = call(guard(), host=host)
    assert status == 421
    sentence = json.loads(body)["detail"]
    assert sentence == f"The Host header should name this server, such as 127.0.0.1:7860, not {host!r}."


def test_a_server_for_others_knows_its_names_and_addresses():
    public = guard("0.0.0.0", TOKEN)
    assert call(public, host="192.168.1.5:7860", authorization=f"Bearer {TOKEN}")[0] == 200
    assert call(public, host="evil.example:7860", authorization=f"Bearer {TOKEN}")[0] == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:8000", "http://127.0.0.1:7860.evil"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_pages_of_other_sites(origin, method):
    assert call(guard(), method, origin=origin)[0] == 403


@pytest.mark.parametrize(
    "site, mode, dest, method, status",
    [
        ("cross-site", "no-cors", "image", "GET", 403),  # <img src="http://127.0.0.1:7860/...">
        ("same-site", "cors", "empty", "POST", 403),  # another port of this machine
        ("cross-site", "navigate", "iframe", "GET", 403),
        ("cross-site", "navigate", "document", "POST", 403),  # a form
        ("cross-site", "navigate", "document", "GET", 200),  # a link to the page
        ("same-origin", "cors", "empty", "POST", 200),
        ("none", "navigate", "document", "GET", 200),  # typed into the address bar
    ],
)
def test_what_browsers_say_about_requests(site, mode, dest, method, status):
    headers = {"sec_fetch_site": site, "sec_fetch_mode": mode, "sec_fetch_dest": dest}
    assert call(guard(), method, **headers)[0] == status


def test_the_own_page_may():
    assert call(guard(), "POST", origin=f"http://{HOST}")[0] == 200


def basic(password):
    return f"Basic {base64.b64encode(f'user:{password}'.encode()).decode()}"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 401),
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"authorization": "Bearer another password"}, 401),
        ({"authorization": basic(TOKEN)}, 200),
        ({"authorization": basic("wrong")}, 401),
        ({"authorization": "Basic é"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"cookie": f"{COOKIE}7860=x"}, 401),
        ({"cookie": "=;=\t;" * 20}, 401),
        ({"cookie": f"{COOKIE}7860=x; more={COOKIE}"}, 401),
    ],
)
def test_the_token(headers, status):
    assert call(guard(token=TOKEN), "GET", "/api/status", **headers)[0] == status


def test_a_browser_gets_a_cookie_for_the_token_in_the_address():
    status, headers, _ = call(guard(token=TOKEN), query="token=a+long%20password")
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert TOKEN not in cookie
    assert call(guard(token=TOKEN), cookie=cookie.partition(";")[0])[0] == 200
    for other in ('prefs={"a":1}', "x", "path=/x", "name=é"):  # of another server on this machine
        assert call(guard(token=TOKEN), cookie=f"{other}; {cookie.partition(';')[0]}")[0] == 200
        assert call(guard(token=TOKEN), cookie=f"{cookie.partition(';')[0]}; {other}")[0] == 200
    assert call(guard(token=TOKEN), query="token=wrong")[0] == 401


def test_headers_of_every_answer():
    for host in (HOST, "evil.example"):
        _, headers, _ = call(guard(), host=host)
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("length", [None, "101", "9" * 5000])
def test_a_body_that_is_too_long(length):
    status, _, body = call(guard(body=100), "POST", body=[b"x" * 60, b"x" * 60], content_length=length)
    assert status == 413
    assert json.loads(body) == {"detail": "A request should have at most 100 bytes, the limit of this server."}


def test_a_body_of_too_many_values():
    """Each wrong one becomes an error, in the process that answers everyone: a million of them took a minute."""
    assert call(guard(commas=2), "POST", body=[b"[1,2", b",3]"])[0] == 200
    status, _, body = call(guard(commas=2), "POST", body=[b"[1,2", b",3,4]"])
    assert status == 413
    assert json.loads(body) == {"detail": "A request should have at most 2 commas, the limit of this server."}


def test_a_body_in_parts_reaches_the_application():
    assert call(guard(body=100), "POST", body=[b"x" * 60, b"x" * 40])[2] == b"100"


def test_a_body_that_does_not_come():
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": [(b"host", HOST.encode())]}
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard(body_seconds=0.01)(scope, lambda: asyncio.sleep(60), send))
    assert sent[0]["status"] == 408


def test_web_sockets_are_refused():
    asyncio.run(guard()({"type": "websocket"}, None, None))
