"""The playground's application without its worker: what it answers, and what it refuses."""

import asyncio
import json
from unittest.mock import AsyncMock, Mock

import pytest

pytest.importorskip("fastapi")

from scripts.playground import sdapi
from scripts.playground.app import make_app
from scripts.playground.jobs import Job
from scripts.playground.limits import Limits, Wrong
from scripts.playground.server import Unavailable
from tests.support.playground import FakeServer, call


@pytest.fixture(scope="module")
def app():
    return make_app({}, Limits(), "127.0.0.1", 7860, None, print)


@pytest.fixture
def server(app):
    app.app.state.server = FakeServer()
    return app.app.state.server


def ask(app, method, path, body=None):
    """The status and the JSON of an answer."""
    content = [body if isinstance(body, bytes) else json.dumps(body).encode()]
    status, _, content = call(app, method, path, body=content, content_type="application/json")
    return status, json.loads(content) if content else None


def test_a_picture_is_asked_for(app, server):
    status, answer = ask(app, "POST", "/api/jobs", {"prompt": "a house", "client": "me"})
    assert (status, answer["position"]) == (201, 1)
    (job,) = server.jobs
    assert (job.id, job.client.split()[-1]) == (answer["id"], "me")
    assert 0 <= job.work["seed"] < 2**32
    assert ask(app, "DELETE", f"/api/jobs/{job.id}") == (200, {"state": "cancelled"})
    assert not len(server.queue)


def test_the_events_of_a_picture(app, server):
    job = Job({}, "me")
    server.jobs.add(job)
    job.emit("step", {"index": 0})
    job.emit("done", {"images": [], "attention": {"tokens": []}})
    path = f"/api/jobs/{job.id}"
    status, headers, body = call(app, "GET", f"{path}/events")
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert body.decode() == 'id: 1\nevent: step\ndata: {"index": 0}\n\nid: 2\nevent: done\ndata: {"images": []}\n\n'
    assert call(app, "GET", f"{path}/events", last_event_id="1")[2].startswith(b"id: 2\n")
    assert call(app, "GET", f"{path}/events", last_event_id="2")[0] == 204
    assert ask(app, "GET", f"{path}/attention") == (200, {"tokens": []})
    assert ask(app, "GET", f"{path}/features")[0] == 404


def test_maps_of_a_picture_that_is_not_ready(app, server):
    job = Job({}, "me")
    server.jobs.add(job)
    assert ask(app, "GET", f"/api/jobs/{job.id}/attention")[0] == 409
    assert ask(app, "GET", "/api/jobs/unknown/attention")[0] == 404


@pytest.mark.parametrize(
    "body, sentence",
    [
        ({}, "prompt should be given."),
        ({"prompt": "x", "colour": 1}, "colour is not a setting: see /docs for those that there are."),
        ({"prompt": "x" * 10_001}, "prompt should have at most 10000 characters, not 'xxx"),
        ({"prompt": "x", "width": 100}, "width should be a multiple of 8, not 100."),
        ({"prompt": "x", "cfg_scale": float("nan")}, "cfg_scale should be a finite number, not nan."),
        (
            {"prompt": "x", "control": [{"net": "a", "image": "b", "end": 2}]},
            "control.0.end should be less than or equal",
        ),
        (b"{", "The body should be JSON, and it cannot be read."),
        (b'{"prompt": "\\ud800"}', "prompt should be a valid string"),
    ],
)
def test_wrong_fields_are_one_sentence(app, server, body, sentence):
    status, answer = ask(app, "POST", "/api/jobs", body)
    assert status == 422
    assert answer["detail"].startswith(sentence)


def test_errors_of_the_worker(app, server):
    server.wrong = Wrong("n_inference_steps should be smaller.")
    assert ask(app, "POST", "/api/tokens", {"prompt": "x"}) == (422, {"detail": "n_inference_steps should be smaller."})
    answer = ask(app, "POST", "/sdapi/v1/txt2img", {"prompt": "x"})
    assert answer == (422, {"detail": "steps should be smaller."})
    server.wrong = Unavailable("Not now.")
    assert ask(app, "POST", "/api/jobs", {"prompt": "x"}) == (503, {"detail": "Not now."})


def test_a_full_queue(app, server):
    for _ in range(server.limits.queue_each):
        assert ask(app, "POST", "/api/jobs", {"prompt": "x", "client": "greedy"})[0] == 201
    status, answer = ask(app, "POST", "/api/jobs", {"prompt": "x", "client": "greedy"})
    assert status == 503
    assert answer["detail"] == "A client should have at most 16 pictures in the queue: wait for one of them."
    assert ask(app, "POST", "/api/jobs", {"prompt": "x", "client": "another"})[0] == 201


def test_a_call_of_several_pictures_waits_for_room_once_it_has_one(server, monkeypatch):
    """AUTOMATIC1111's interface gives all pictures of a call, or none."""
    monkeypatch.setattr(sdapi, "POLL", 0.01)

    def submit(job):
        if next(full):
            raise Unavailable("The queue is full.")
        job.emit("done", {"seed": job.work["seed"]})

    monkeypatch.setattr(server, "submit", submit)
    request = Mock(client=None, is_disconnected=AsyncMock(return_value=False))
    full = iter([False, True, True, False])
    results = asyncio.run(sdapi.draw_all(server, sdapi.Call(2), {}, 5, request))
    assert [result["seed"] for result in results] == [5, 6]
    full = iter([True])
    with pytest.raises(Unavailable):
        asyncio.run(sdapi.draw_all(server, sdapi.Call(2), {}, 5, request))


def test_what_does_not_exist(app, server):
    assert ask(app, "GET", "/nothing")[0] == 404
    assert ask(app, "PUT", "/api/jobs")[0] == 405
    assert ask(app, "GET", "/%2e%2e/app.py")[0] == 404
    status, answer = ask(app, "POST", "/sdapi/v1/extra-single-image", {})
    assert (status, answer["detail"][:37]) == (501, "Enlarging a finished image is not sup")


def test_the_reference_has_every_path_and_nothing_from_elsewhere(app, server):
    page = call(app, "GET", "/docs")[2].decode()
    paths = ask(app, "GET", "/openapi.json")[1]["paths"]
    assert {"/api/jobs", "/sdapi/v1/txt2img", "/sdapi/v1/progress"} <= paths.keys()
    assert all(path in page for path in paths)
    assert "//" not in page


def test_source_files_are_served_from_a_list(app, server):
    status, headers, body = call(app, "GET", "/source/sd/noise.py")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b'<span id="make_generators">' in body
    assert b'"/source/sd/samplers/euler.py"' in call(app, "GET", "/source/")[2]
    for path in (
        "../README.md",
        "sd/../README.md",
        "/etc/passwd",
        "sd",
        "sd/",
        "data/tiny.ckpt",
        "sd/noise.py/",
        "sd//noise.py",
    ):
        assert ask(app, "GET", f"/source/{path}")[0] == 404, path
    assert ask(app, "POST", "/source/sd/noise.py")[0] == 405
    assert call(app, "HEAD", "/source/sd/noise.py")[0] == 200


def test_settings_of_a_request_are_never_html(app, server):
    """They come back as JSON, which browsers do not render."""
    _, headers, body = call(app, "POST", "/api/jobs", body=[b'{"prompt": "x", "<script>": 1}'])
    assert headers["content-type"] == "application/json"
    assert b"<script>" in body
