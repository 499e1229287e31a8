"""Malformed requests: whatever comes, the playground answers with a sentence, never with 500. In one process.

PLAYGROUND_EXAMPLES sets how many requests (default 300).
"""

import argparse
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi")

from scripts.playground.app import make_app  # noqa: E402
from scripts.playground.drawing import Studio  # noqa: E402
from scripts.playground.limits import Limits, Wrong  # noqa: E402
from scripts.playground.questions import QUESTIONS, about  # noqa: E402
from scripts.playground.worker import KNOWN_ERRORS  # noqa: E402
from sd import load_models  # noqa: E402
from tests.support.playground import FakeServer, call  # noqa: E402

LIMITS = Limits(pixels=128 * 128, steps=20)

EXAMPLES = int(os.environ.get("PLAYGROUND_EXAMPLES", 300))
ALLOWED = (501, 503)  # not supported; the queue is full

FIELDS = [
    "prompt",
    "uncond_prompt",
    "input_image",
    "mask_image",
    "strength",
    "do_cfg",
    "cfg_scale",
    "sampler_name",
    "n_inference_steps",
    "seed",
    "height",
    "width",
    "feather",
    "padding_mask_crop",
    "cfg_rescale",
    "cfg_interval",
    "deep_cache",
    "control",
    "clip_skip",
    "freeu",
    "hires_scale",
    "hires_strength",
    "hires_latents",
    "timestep_spacing",
    "loras",
    "fast",
    "previews",
    "attention",
    "features",
    "client",
    "supersedes",
    "negative_prompt",
    "styles",
    "sampler_index",
    "scheduler",
    "batch_size",
    "n_iter",
    "steps",
    "denoising_strength",
    "override_settings",
    "alwayson_scripts",
    "send_images",
    "enable_hr",
    "hr_scale",
    "hr_upscaler",
    "hr_second_pass_steps",
    "init_images",
    "mask",
    "mask_blur",
    "inpainting_fill",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_mask_invert",
    "resize_mode",
    "image",
    "tiling",
    "subseed_strength",
    "sd_model_checkpoint",
]
POSTS = ["/api/jobs", "/api/tokens", "/api/png-info"]
POSTS += [f"/sdapi/v1/{name}" for name in ("txt2img", "img2img", "options", "png-info", "extra-single-image", "skip")]
GETS = [
    "/api/status",
    "/api/loras",
    "/api/jobs/x/events",
    "/api/jobs/x/features",
    "/sdapi/v1/progress?skip_current_image=2",
]
GETS += [
    "/",
    "/docs",
    "/openapi.json",
    "/page.js",
    "/%00",
    "/%ff",
    "/..%2f..%2fREADME.md",
    "/api/%0d%0a",
    "/sdapi/v1/memory",
]

SMALL = {"prompt": "a house", "n_inference_steps": 1, "width": 64, "height": 64}
SMALL_THERE = {"prompt": "a house", "steps": 1, "width": 64, "height": 64}
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)

texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [PICTURE, PICTURE[:60], "\ud800", "\0", "../../etc/passwd", "<lora:x:nan>", "((((", "(a:1e99)", "&#9999999999;"]
    ),
    st.just("x" * 10_001),
)
numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-2, 70),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), 10**400, -0.0, 1e308, 5e-324]),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | texts, inner, max_size=3),
    max_leaves=6,
)
units = st.dictionaries(st.sampled_from(["image", "model", "weight", "control_mode", "module", "enabled"]), values)
special = st.one_of(
    st.fixed_dictionaries({"alwayson_scripts": st.fixed_dictionaries({"ControlNet": st.lists(units, max_size=2)})}),
    st.fixed_dictionaries({"control": st.lists(st.fixed_dictionaries({"net": values, "image": values}), max_size=4)}),
    st.fixed_dictionaries({"init_images": st.just([PICTURE]), "mask": st.just(PICTURE) | values}),
    st.fixed_dictionaries({"input_image": st.just(PICTURE), "mask_image": st.just(PICTURE) | values}),
)
changes = st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3) | special
bodies = st.one_of(
    changes.map(lambda change: json.dumps(SMALL | change).encode()),
    changes.map(lambda change: json.dumps(SMALL_THERE | change).encode()),
    values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=50),
    st.integers(1, 100_000).map(lambda depth: b'{"prompt":' * depth),
)
headers = st.dictionaries(
    st.sampled_from(
        ["Content-Type", "Last-Event-ID", "Authorization", "Cookie", "Origin", "Range", "Accept", "If-None-Match"]
    ),
    st.text("abc;=,\t é/:\"'%0", max_size=20),
    max_size=2,
)
requests = st.one_of(
    st.tuples(st.just("POST"), st.sampled_from(POSTS), bodies, headers),
    st.tuples(st.just("POST"), st.sampled_from(POSTS), bodies, st.just({})),
    st.tuples(
        st.sampled_from(["GET", "DELETE", "PUT", "OPTIONS", "HEAD"]),
        st.sampled_from(GETS + POSTS),
        st.just(b""),
        headers,
    ),
)


class Worker(FakeServer):
    """Answers questions as the worker does, in this process, so that an unexpected error is seen. Draws nothing."""

    def __init__(self, studio):
        super().__init__(LIMITS)
        self.studio, self.about = studio, about(studio)

    async def ask(self, what, **more):
        try:
            return json.loads(json.dumps(QUESTIONS[what](self.studio, more), allow_nan=False))
        except KNOWN_ERRORS as error:
            raise Wrong(str(error)) from None

    def submit(self, job):
        super().submit(job)
        if job.call is not None:
            job.emit("done", {"images": ["data:image/png;base64,AA=="], "seed": job.work["seed"], "parameters": ""})


@pytest.fixture(scope="module")
def studio(demo_checkpoint):
    options = argparse.Namespace(checkpoint=Path("micro.ckpt"), vae=None)
    return Studio(load_models(demo_checkpoint, device="cpu"), options, LIMITS)


@pytest.fixture(scope="module")
def app():
    return make_app({}, LIMITS, "127.0.0.1", 7860, None, print)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
@given(request=requests)
def test_no_request_is_answered_with_500(app, studio, request):
    method, path, body, headers = request
    app.app.state.server = Worker(studio)
    path, _, query = path.partition("?")
    headers = {"content_type": "application/json"} | {key.replace("-", "_").lower(): v for key, v in headers.items()}
    status, answered, content = call(app, method, path, query, [body], **headers)
    assert status < 500 or status in ALLOWED, (status, content)
    if status >= 400 and content and "range" not in headers:  # a wrong range of a file of the page: plain text
        assert answered["content-type"] == "application/json"
        sentence = json.loads(content)["detail"]
        assert isinstance(sentence, str)
        assert len(sentence) < 1000
