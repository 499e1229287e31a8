"""The interface of AUTOMATIC1111's web UI, /sdapi/v1, for the clients that exist: calls that draw, and their progress.

sdapi_lists.py has the rest. README.md says what differs.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, field
from datetime import datetime

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response

from scripts.playground.answers import Json
from scripts.playground.forms import MAX_SEED
from scripts.playground.jobs import Job
from scripts.playground.limits import Wrong
from scripts.playground.sdapi_forms import ImageToImage, Picture, TextToImage, renamed, work_of
from scripts.playground.sdapi_lists import add_lists
from scripts.playground.server import DIED, Server, Unavailable

POLL = 1.0  # seconds between looks whether a client is still there


@dataclass
class Call:
    """One call of txt2img or img2img: its pictures are drawn one after the other."""

    count: int
    number: int = 0  # pictures that are complete
    interrupted: bool = False
    skipped: bool = False
    begun: str = field(default_factory=lambda: datetime.now().strftime("%Y%m%d%H%M%S"))


def add_sdapi(app: FastAPI) -> None:
    """Adds the paths to the application."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    calls: list[Call] = []

    def server() -> Server:
        return app.state.server

    async def draw(form: Picture, request: Request) -> Json:
        await server().ready()
        call = Call(form.batch_size * form.n_iter)
        if call.count > server().limits.images:
            most = f"at most {server().limits.images}, the limit of this server"
            raise Wrong(f"batch_size times n_iter should be {most}, not {call.count}.")
        work = work_of(form, server().about)
        first = secrets.randbelow(2**32) if form.seed == -1 else form.seed
        if first + call.count - 1 > MAX_SEED:
            raise Wrong(f"seed should be at most {MAX_SEED - call.count + 1}, not {first}.")
        try:
            checked = await server().ask("check", work=work | {"seed": first})
        except Wrong as error:
            raise Wrong(renamed(str(error))) from None
        calls.append(call)
        try:
            results = await draw_all(server(), call, work, first, request)
        finally:
            calls.remove(call)
        images = [one["images"][0].partition(",")[2] for one in results] if form.send_images else []
        given = json.loads(json.dumps(form.model_dump()), parse_constant=lambda _: None)  # JSON has no NaN
        if not getattr(form, "include_init_images", True):
            given |= {"init_images": None, "mask": None}
        return Json({"images": images, "parameters": given, "info": json.dumps(info(form, checked, results, server()))})

    @router.post("/txt2img")
    async def txt2img(form: TextToImage, request: Request) -> Response:
        """Pictures for a prompt. The answer has images in base64, parameters, and info as a text of JSON."""
        return await draw(form, request)

    @router.post("/img2img")
    async def img2img(form: ImageToImage, request: Request) -> Response:
        """Pictures that start from an image. With a mask, only what is white in it is repainted."""
        return await draw(form, request)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> Response:
        """How far the call is that is being drawn."""
        job = server().running
        job = job if job is not None and job.call is not None else None
        call = job.call if job else (calls[0] if calls else None)
        share = eta = 0.0
        if job is not None and job.steps:
            share = min((call.number + job.step / job.steps) / call.count, 1.0)
            seconds = time.monotonic() - job.begun
            eta = seconds / max(job.step / job.steps, 0.01) - seconds
        state = {
            "skipped": bool(call and call.skipped),
            "interrupted": bool(call and call.interrupted),
            "stopping_generation": False,
            "job": "" if call is None else f"Batch {call.number + 1} out of {call.count}",
            "job_count": call.count if call else 0,
            "job_timestamp": call.begun if call else "0",
            "job_no": call.number if call else 0,
            "sampling_step": job.step if job else 0,
            "sampling_steps": job.steps if job else 0,
        }
        image = job.preview.partition(",")[2] if job and job.preview and not skip_current_image else None
        answer = {"progress": share, "eta_relative": eta, "state": state, "current_image": image, "textinfo": None}
        return Json(answer)

    @router.post("/interrupt")
    async def interrupt() -> Response:
        """Ends the call that is being drawn. It returns what has been drawn so far."""
        end(server(), interrupted=True)
        return Json({})

    @router.post("/skip")
    async def skip() -> Response:
        """Ends the picture that is being drawn, and goes on with the next one of its call."""
        end(server(), interrupted=False)
        return Json(None)

    add_lists(app, router, server)
    app.include_router(router)


async def draw_all(server: Server, call: Call, work: dict, first: int, request: Request) -> list[dict]:
    """The results of all pictures of a call. Each picture takes its own turn in the queue."""
    connection = f"{request.client.host}:{request.client.port}" if request.client else ""
    results: list[dict] = []
    while call.number < call.count and not call.interrupted:
        job = Job(work | {"seed": first + call.number}, f"sdapi {connection}", call)
        await submit(server, job, request, waits=bool(results))
        try:
            while not job.over:
                await job.changed(POLL)
                if not job.over:
                    await check_client(request)
        finally:
            server.cancel(job)  # if it is not over
            server.jobs.remove(job)
        if job.state != "done":
            sentence = job.result.get("sentence", "This picture was cancelled.")
            raise HTTPException(503 if sentence == DIED else 422, sentence)
        results.append(job.result)
        call.number, call.skipped = call.number + 1, False
    return results


async def submit(server: Server, job: Job, request: Request, waits: bool) -> None:
    """Puts a job into the queue. With `waits`, as soon as there is room: the pictures of its call that are complete
    would be lost with an error."""
    while True:
        try:
            return server.submit(job)
        except Unavailable:
            if not waits:
                raise
        await asyncio.sleep(POLL)
        await check_client(request)


async def check_client(request: Request) -> None:
    """Raises HTTPException if the client has gone."""
    if await request.is_disconnected():
        raise HTTPException(499, "The client went away.")


def end(server: Server, interrupted: bool) -> None:
    """Ends the picture of /sdapi that is being drawn, and with `interrupted` its call."""
    job = server.running
    if job is None or job.call is None:
        return
    job.call.interrupted |= interrupted
    job.call.skipped = not interrupted
    server.finish(job)


def info(form: Picture, checked: dict, results: list[dict], server: Server) -> dict:
    """What the web UI calls info."""
    prompts, negatives = [form.prompt] * len(results), [form.negative_prompt or ""] * len(results)
    seeds, texts = [one["seed"] for one in results], [one["parameters"] for one in results]
    labels = {one["name"]: one["label"] for one in server.about["samplers"]}
    return {
        "prompt": form.prompt,
        "all_prompts": prompts,
        "negative_prompt": form.negative_prompt or "",
        "all_negative_prompts": negatives,
        "seed": checked["seed"],
        "all_seeds": seeds,
        "subseed": checked["seed"],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": checked["width"],
        "height": checked["height"],
        "sampler_name": labels[checked["sampler_name"]],
        "cfg_scale": checked["cfg_scale"],
        "steps": checked["n_inference_steps"],
        "batch_size": form.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": server.about["model"],
        "sd_model_hash": None,
        "sd_vae_name": server.about["vae"],
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": form.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": datetime.now().strftime("%Y%m%d%H%M%S"),
        "clip_skip": (form.override_settings or {}).get("CLIP_stop_at_last_layers", 1),
        "is_using_inpainting_conditioning": bool(getattr(form, "mask", None)),
        "version": "playground",
        "notes": checked["notes"],
    }
