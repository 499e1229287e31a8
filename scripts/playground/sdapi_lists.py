"""What AUTOMATIC1111's interface says about this server: model, samplers, files, and what does not exist here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from fastapi import APIRouter, FastAPI, HTTPException, Response

from scripts.playground.answers import Json
from scripts.playground.limits import Wrong
from scripts.playground.png_info import settings_in
from scripts.playground.sdapi_forms import check_model
from scripts.playground.server import Server

NO_UPSCALER = "Enlarging a finished image is not supported: txt2img with enable_hr draws large pictures."
NO_CAPTIONS = "Captions for images are not supported."


def add_lists(app: FastAPI, router: APIRouter, server: Callable[[], Server]) -> None:
    """Adds the paths: those of /sdapi/v1 to the router, those of /controlnet to the application."""
    add_model(router, server)
    add_files(app, router, server)
    add_missing(router)


def add_model(router: APIRouter, server: Callable[[], Server]) -> None:
    """The model, and what it can do."""

    @router.get("/options")
    async def options() -> Response:
        """The settings that all requests share: nothing but the model, which cannot be changed here."""
        await server().ready()
        return Json(
            {
                "sd_model_checkpoint": server().about["file"],
                "sd_checkpoint_hash": None,
                "sd_vae": server().about["vae"] or "Automatic",
                "CLIP_stop_at_last_layers": 1,
                "samples_format": "png",
            }
        )

    @router.post("/options")
    async def set_options(given: dict) -> Response:
        """Refuses another model. Other settings belong in the override_settings of each request: one client
        changes nothing for another."""
        await server().ready()
        check_model(given.get("sd_model_checkpoint"), server().about)
        if given.get("CLIP_stop_at_last_layers", 1) != 1:
            raise Wrong("CLIP_stop_at_last_layers should be in the override_settings of each request, not an option.")
        return Json(None)

    @router.get("/samplers")
    async def samplers() -> Response:
        """The samplers, by the names of AUTOMATIC1111's web UI."""
        await server().ready()
        listed = server().about["samplers"]
        return Json([{"name": one["label"], "aliases": [one["name"]], "options": {}} for one in listed])

    @router.get("/schedulers")
    async def schedulers() -> Response:
        """Automatic is each sampler's own."""
        names = {"automatic": "Automatic", "uniform": "Uniform", "karras": "Karras"}
        rest = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return Json([{"name": name, "label": label, **rest} for name, label in names.items()])

    @router.get("/sd-models")
    async def sd_models() -> Response:
        """The one model of this server."""
        await server().ready()
        about = server().about
        rest = {"hash": None, "sha256": None, "filename": about["file"], "config": None}
        return Json([{"title": about["file"], "model_name": about["model"], **rest}])

    @router.get("/sd-vae")
    async def sd_vae() -> Response:
        await server().ready()
        name = server().about["vae"]
        return Json([{"model_name": name, "filename": name}] if name else [])

    @router.get("/upscalers")
    async def upscalers() -> Response:
        """For hr_upscaler."""
        rest = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return Json([{"name": "None", **rest}, {"name": "Lanczos", **rest}])

    @router.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> Response:
        return Json([{"name": "Latent"}])

    @router.get("/scripts")
    async def scripts() -> Response:
        return Json({"txt2img": ["controlnet"], "img2img": ["controlnet"]})

    @router.get("/cmd-flags")
    async def cmd_flags() -> Response:
        await server().ready()
        return Json({"api": True, "ckpt": server().about["file"], "nowebui": False})

    @router.get("/memory")
    async def memory() -> Response:
        """Bytes of this machine's memory."""
        return Json({"ram": ram(), "cuda": {"error": "not measured"}})


def add_files(app: FastAPI, router: APIRouter, server: Callable[[], Server]) -> None:
    """Files that a picture may use, and settings in pictures."""

    @router.get("/loras")
    async def loras() -> Response:
        listed = (await server().ask("files"))["loras"]
        return Json(
            [{"name": one["name"], "alias": one["name"], "path": one["file"], "metadata": {}} for one in listed]
        )

    @router.get("/embeddings")
    async def embeddings() -> Response:
        return Json(await server().ask("embeddings"))

    @router.post("/png-info")
    async def png_info(given: dict) -> Response:
        """The settings in a picture's file."""
        image = given.get("image")
        if not isinstance(image, str):
            raise Wrong("image should be given, in base64.")
        found = await asyncio.to_thread(settings_in, server().limits.image_bytes("image", image.strip()))
        known = {"Prompt": found["prompt"], "Negative prompt": found["negative"], **found["settings"]}
        items = {"parameters": found["info"]} if found["info"] else {}
        return Json({"info": found["info"], "items": items, "parameters": known if found["settings"] else {}})

    @app.get("/controlnet/version", tags=["AUTOMATIC1111"])
    async def controlnet_version() -> Response:
        return Json({"version": 3})

    @app.get("/controlnet/model_list", tags=["AUTOMATIC1111"])
    async def controlnet_models() -> Response:
        return Json({"model_list": [one["name"] for one in (await server().ask("files"))["controls"]]})

    @app.get("/controlnet/module_list", tags=["AUTOMATIC1111"])
    async def controlnet_modules() -> Response:
        return Json({"module_list": ["none"], "module_detail": {}})


def add_missing(router: APIRouter) -> None:
    """What does not exist here: empty lists, and refusals."""

    for path in ("hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "script-info", "extensions"):
        router.add_api_route(f"/{path}", nothing, methods=["GET"])
    for path in ("refresh-checkpoints", "refresh-vae", "refresh-loras"):
        router.add_api_route(f"/{path}", done, methods=["POST"])

    @router.post("/extra-single-image")
    @router.post("/extra-batch-images")
    async def extras() -> Response:
        raise HTTPException(501, NO_UPSCALER)

    @router.post("/interrogate")
    async def interrogate() -> Response:
        raise HTTPException(501, NO_CAPTIONS)


async def nothing() -> Response:
    """An empty list: there are none here."""
    return Json([])


async def done() -> Response:
    """Nothing to do: files are looked up for each request."""
    return Json(None)


def ram() -> dict:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return {"error": "not measured on this system"}
    return {"free": free, "used": total - free, "total": total}
