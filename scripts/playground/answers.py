"""Answers as JSON. Whatever is refused is answered with {"detail": one sentence}."""

from __future__ import annotations

import json

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as HTTPError

from scripts.playground.limits import Wrong
from scripts.playground.server import Unavailable


class Json(Response):
    """JSON that can hold any text, even half a character, and no NaN."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def answer_errors(app: FastAPI) -> None:
    """Registers an answer for each kind of error."""
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPError, refused)
    app.add_exception_handler(Wrong, wrong)
    app.add_exception_handler(Unavailable, unavailable)


async def invalid(_request: Request, error: RequestValidationError) -> Json:
    """One sentence for the first field that is wrong."""
    return Json({"detail": sentence_of(error.errors()[0])}, 422)


def sentence_of(error: dict) -> str:
    """pydantic's description of a wrong field -> "X should be Y, not Z."."""
    name = ".".join(str(part) for part in error["loc"][1:]) or "The body"
    kind, message = error["type"], error["msg"]
    if kind == "missing":
        return f"{name} should be given."
    if kind == "extra_forbidden":
        return f"{name} is not a setting: see /docs for those that there are."
    if kind == "json_invalid":
        return "The body should be JSON, and it cannot be read."
    for beginning in ("Input should ", "String should ", "List should ", "Value should "):
        if message.startswith(beginning):
            value = repr(error.get("input"))
            return f"{name} should {message.removeprefix(beginning)}, not {value:.60}{'...' * (len(value) > 60)}."
    return f"{name}: {message}."


async def refused(_request: Request, error: HTTPError) -> Json:
    return Json({"detail": error.detail}, error.status_code, error.headers)


async def wrong(_request: Request, error: Wrong) -> Json:
    return Json({"detail": str(error)}, 422)


async def unavailable(_request: Request, error: Unavailable) -> Json:
    return Json({"detail": str(error)}, 503, {"Retry-After": "5"})
