"""The web application: the page, and its own interface under /api, which README.md describes."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from scripts.playground.answers import Json, answer_errors
from scripts.playground.forms import NewJob, Picture, Text
from scripts.playground.jobs import Job
from scripts.playground.limits import Limits
from scripts.playground.png_info import settings_in
from scripts.playground.reference import reference
from scripts.playground.sdapi import add_sdapi
from scripts.playground.security import Guard
from scripts.playground.server import Server
from scripts.playground.sources import index, source_files, source_page

PAGE = Path(__file__).with_name("page")
HEARTBEAT = 15  # seconds between signs of life on a stream of events


def make_app(
    settings: dict, limits: Limits, host: str, port: int, token: str | None, stop: Callable[[str], None]
) -> Guard:
    """The application, behind its guard. `settings` are those of the worker, and `stop` is called with a sentence if
    it cannot be used."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Server(settings, limits, stop) as app.state.server:
            yield

    app = FastAPI(title="Playground", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    answer_errors(app)
    add_api(app)
    add_sdapi(app)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(reference(app.openapi()))

    sources = source_files()

    @app.api_route("/source/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    def source(name: str) -> HTMLResponse:
        if not name:
            return HTMLResponse(index(list(sources)))
        try:
            return HTMLResponse(source_page(name, sources[name]))
        except (KeyError, OSError):
            raise HTTPException(404, "This is not one of the files that /source/ lists.") from None

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return Guard(app, host, port, token, limits)


def add_api(app: FastAPI) -> None:
    """The page's own interface."""

    def server() -> Server:
        return app.state.server

    def job_of(name: str) -> Job:
        job = server().jobs.get(name)
        if job is None:
            raise HTTPException(404, "There is no such picture, or it is no longer kept.")
        return job

    @app.get("/api/status")
    async def status() -> Response:
        """Whether the model is ready, and how many pictures wait."""
        here = server()
        values = {"worker": here.state, "problem": here.problem, "started": here.started}
        return Json(values | {"waiting": len(here.queue), "running": here.running is not None})

    @app.get("/api/models")
    async def models() -> Response:
        """The model, its defaults, its noise schedule, and the limits of this server."""
        await server().ready()
        limits = server().limits
        shown = {name: getattr(limits, name) for name in ("steps", "pixels", "queue_each", "body", "seconds")}
        about = {key: value for key, value in server().about.items() if key != "samplers"}
        return Json(about | {"limits": shown})

    @app.get("/api/samplers")
    async def samplers() -> Response:
        """The samplers: names for sampler_name, labels as other tools write them, and their default steps."""
        await server().ready()
        return Json(server().about["samplers"])

    @app.get("/api/{kind}")
    async def files(kind: Literal["loras", "controls", "embeddings"]) -> Response:
        """The files in data/ that a picture may use: each has a name, which requests give, and its file's name."""
        return Json((await server().ask("files"))[kind])

    @app.post("/api/tokens")
    async def tokens(text: Text) -> Response:
        """The tokens of a prompt, as the text encoder gets them."""
        return Json(await server().ask("tokens", prompt=text.prompt))

    @app.post("/api/png-info")
    async def png_info(picture: Picture) -> Response:
        """The settings in a picture's file, from this tool or from AUTOMATIC1111's web UI."""
        content = server().limits.image_bytes("image", picture.image)
        return Json(await asyncio.to_thread(settings_in, content))

    @app.post("/api/jobs", status_code=201)
    async def new_job(form: NewJob, request: Request) -> Response:
        """Asks for a picture. Whoever asks should then read its events: without a reader, it is dropped."""
        here = server()
        work = form.model_dump(exclude={"client", "supersedes"})
        work["seed"] = secrets.randbelow(2**32) if form.seed is None else form.seed
        client = f"{request.client.host if request.client else ''} {form.client}"
        checked = await here.ask("check", work=work)
        dropped = {"nothing": (), "queued": ("queued",), "all": ("queued", "running")}[form.supersedes]
        for earlier in here.jobs:
            if earlier.client == client and earlier.state in dropped:
                here.cancel(earlier)
        job = Job(work, client)
        here.submit(job)
        here.expect_watcher(job)
        return Json({"id": job.id, "position": job.position} | checked, 201)

    @app.get("/api/jobs/{name}/events")
    async def events(name: str, request: Request) -> Response:
        """Server-sent events, from the first one or from that after Last-Event-ID: see README.md."""
        job = job_of(name)
        last = request.headers.get("last-event-id", "")
        sent = int(last[:9]) if last.isdecimal() else 0
        if job.over and sent >= len(job.events):
            return Response(status_code=204)  # a browser then stops reconnecting
        return StreamingResponse(stream(server(), job, sent), media_type="text/event-stream")

    @app.delete("/api/jobs/{name}")
    async def cancel(name: str) -> Response:
        """Cancels a picture, waiting or being drawn."""
        job = job_of(name)
        server().cancel(job)
        return Json({"state": job.state})

    @app.get("/api/jobs/{name}/attention")
    async def attention(name: str) -> Response:
        """The tokens of the prompt, each with a map of where the U-Net attended to it, averaged over all steps."""
        return Json(recorded(job_of(name), "attention"))

    @app.get("/api/jobs/{name}/features")
    async def features(name: str) -> Response:
        """Pictures of the U-Net's feature maps, for some steps of the run: similar features have similar colours."""
        return Json(recorded(job_of(name), "features"))


def recorded(job: Job, what: str) -> object:
    """What was recorded of a finished picture. Raises HTTPException if it was not."""
    if not job.over:
        raise HTTPException(409, f"The {what} maps are complete when the picture is: wait for the event done.")
    if what not in job.recorded:
        raise HTTPException(404, f"The picture should be asked for with {what}: true to have these maps.")
    return job.recorded[what]


async def stream(server: Server, job: Job, sent: int) -> AsyncIterator[str]:
    """The events of a job as text, until the one that ends it."""
    position = state = None
    with server.watching(job):
        while True:
            if job.state == "queued" and (position, state) != (job.position, server.state):
                position, state = job.position, server.state
                yield f"event: queued\ndata: {json.dumps({'position': position, 'worker': state})}\n\n"
            while sent < len(job.events):
                event, text = job.events[sent]
                sent += 1
                yield f"id: {sent}\nevent: {event}\ndata: {text}\n\n"
            if job.over:
                return
            if not await job.changed(HEARTBEAT):
                yield ": still here\n\n"
