"""Malformed requests: whatever comes, the playground answers with a sentence, never with 500, and draws on.

PLAYGROUND_EXAMPLES sets how many requests (default 300).
"""

import http.client
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi")

from tests.support.playground import Live  # noqa: E402

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


@pytest.fixture(scope="module")
def live():
    with Live("--max-pixels", 128 * 128, "--max-steps", 20) as live:
        live.wait_until_ready()
        yield live


def send(live, method, path, body, headers):
    """The status and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    headers = {"Content-Type": "application/json"} | {key: value.strip() for key, value in headers.items()}
    try:
        connection.request(method, path, body, {key: value.encode("latin-1") for key, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.getheader("content-type", ""), answer.read()
    finally:
        connection.close()


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
@given(request=requests)
def test_no_request_is_answered_with_500(live, request):
    status, kind, content = send(live, *request)
    assert status < 500 or status in ALLOWED, (status, content)
    if status >= 400 and content and "Range" not in request[3]:  # a wrong range of a file of the page: plain text
        assert kind == "application/json"
        sentence = json.loads(content)["detail"]
        assert isinstance(sentence, str)
        assert len(sentence) < 1000


def test_the_server_still_draws(live):
    while live.call("GET", "/api/status")[1]["waiting"]:
        pass
    event, data = live.draw(**SMALL, seed=1)
    assert event == "done", data
    assert live.call("GET", "/api/status")[1]["started"] == 1  # the worker has survived all of it
