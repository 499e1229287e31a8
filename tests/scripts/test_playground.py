"""The playground's parts: its queue, its limits, its two interfaces, and the flags of playground.py.

`test_playground_live.py` starts the whole server.
"""

import argparse
import asyncio
import base64
import importlib.util
import io
import json
import random
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image, PngImagePlugin

from scripts.playground import files
from scripts.playground.jobs import EMPTY, Job, Queue, Store
from scripts.playground.limits import Limits, Wrong
from tests import ROOT


def data_url(size=(16, 8), kind="PNG", **info):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format=kind, **info)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def names(jobs):
    return "".join(job.work["name"] for job in jobs)


def waiting(*clients):
    """A queue with a job for each letter: "aab" are two of client a and one of b. They are named by numbers."""
    queue = Queue()
    for number, client in enumerate("".join(clients)):
        queue.put(Job({"name": str(number)}, client))
    return queue


def test_clients_take_turns():
    async def order():
        queue = waiting("aaaabbc")
        assert names(queue) == "0461523"
        assert [job.position for job in queue] == [1, 2, 3, 4, 5, 6, 7]
        first = queue.pop()
        queue.put(Job({"name": "9"}, "a"))  # comes behind the others' turns, and behind its own
        return names([first, *[queue.pop() for _ in range(len(queue))]])

    assert asyncio.run(order()) == "04615239"


def test_the_order_is_the_one_that_was_foretold():
    async def same(seed):
        draw = random.Random(seed)
        queue = waiting(*draw.choices("abcd", k=12))
        queue.remove(draw.choice([*queue]))
        foretold = names(queue)
        assert names([queue.pop() for _ in range(len(queue))]) == foretold

    for seed in range(20):
        asyncio.run(same(seed))


def test_an_empty_queue_waits():
    async def first():
        queue = Queue()
        waiting = asyncio.ensure_future(queue.filled())
        await asyncio.sleep(0)
        queue.put(Job({"name": "1"}, "a"))
        await waiting
        return names([queue.pop()])

    assert asyncio.run(first()) == "1"


def test_nothing_follows_the_end_of_a_job():
    async def events():
        job = Job({"prompt": "x"}, "a")
        job.emit("started", {"steps": 2})
        job.emit("cancelled", {})
        job.emit("step", {"index": 0})
        assert (job.state, job.work) == ("cancelled", {})
        return [name for name, _ in job.events]

    assert asyncio.run(events()) == ["started", "cancelled"]


def test_finished_jobs_are_kept_up_to_a_size():
    async def kept():
        store = Store(3 * EMPTY + 3000)
        jobs = [Job({}, "a") for _ in range(5)]
        jobs[1].watchers = 1
        for job in jobs:
            store.add(job)
            job.emit("done", {"text": "x" * 400, "attention": "x" * 400})
        store.trim()
        return [jobs.index(job) for job in store]

    assert asyncio.run(kept()) == [1, 3, 4]


def test_jobs_that_were_cancelled_at_once_are_not_kept_without_end():
    async def kept():
        store = Store(100_000)
        for _ in range(1000):
            job = Job({}, "a")
            job.emit("cancelled", {})
            store.add(job)
        return len([*store])

    assert 10 < asyncio.run(kept()) < 100


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_come_as_data_urls_or_in_base64(kind):
    url = data_url(kind=kind)
    for text in (url, url.partition(",")[2]):
        assert Image.open(Limits().image_bytes("image", text)).size == (16, 8)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "http://169.254.169.254/",
            "image should be the image itself as a data URL, not an address: nothing is fetched.",
        ),
        ("file:///etc/passwd", "image should be the image itself as a data URL, not an address: nothing is fetched."),
        ("data:text/html,x", "image should be a data URL of a PNG, JPEG or WebP image, not 'data:text/html,x'."),
        ("/etc/passwd", "image should be a PNG, JPEG or WebP image in base64, and this is not one."),
        ("", "image should be a PNG, JPEG or WebP image in base64, and this is not one."),
        (data_url(kind="GIF"), "image should be a data URL of a PNG, JPEG or WebP image, not '"),
        (
            data_url(kind="TIFF").partition(",")[2],
            "image should be a PNG, JPEG or WebP image in base64, and this is not one.",
        ),
        (data_url((40, 40)), "image should have at most 1,000 pixels, the limit of this server, not 40 x 40."),
    ],
)
def test_other_images(text, sentence):
    with pytest.raises(Wrong) as error:
        Limits(upload_pixels=1000).image_bytes("image", text)
    assert str(error.value).startswith(sentence)


def test_settings_in_a_picture():
    from scripts.playground.png_info import settings_in

    def picture(text):
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        return Limits().image_bytes("image", data_url(pnginfo=info))

    text = "a house\nNegative prompt: fog\nSteps: 20, Sampler: Euler a, Seed: 7"
    settings = {"Steps": "20", "Sampler": "Euler a", "Seed": "7"}
    assert settings_in(picture(text)) == {"info": text, "prompt": "a house", "negative": "fog", "settings": settings}
    assert settings_in(picture("a photo")) == {"info": "a photo", "prompt": "", "negative": "", "settings": {}}
    with pytest.raises(Wrong, match="image should have settings of at most 50,000 characters, 12,000 to a line"):
        settings_in(picture("x" * 20_000))
    damaged = picture(text).getvalue()[:50]
    with pytest.raises(Wrong, match="image should be a picture that can be read, and this one is damaged"):
        settings_in(io.BytesIO(damaged))


@pytest.mark.parametrize("name", ["../tiny", "/etc/passwd", "tiny.ckpt", "", "tiny-lcm/../tiny-lcm", "x" * 1000])
def test_names_never_become_paths(name):
    with pytest.raises(ValueError, match=r"loras should be one of those in data/ \(.*tiny-lcm.*\), not '.*"):
        files.choose("loras", name, files.lora_files())


def test_files_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.support.loras.folder", lambda: tmp_path / "loras")
    for name in ("loras/people/ann.safetensors", "loras/notes.txt", "controls/canny.pth", "tiny-word.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    header = json.dumps({"control_model.zero_convs.0.0.weight": {}}).encode()
    (tmp_path / "tiny-scribble.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert [*files.lora_files()] == ["tiny-lcm", "tiny-windmill", "people/ann"]  # not the tiny model's word
    assert [*files.control_files()] == ["tiny-scribble", "canny"]
    other = tmp_path / "sd15.safetensors"  # what is the tiny model's own fits no other
    assert ([*files.lora_files(other)], [*files.control_files(other)]) == (["people/ann"], ["canny"])


SAMPLERS = [
    {"name": name, "label": label}
    for name, label in [("euler", "Euler"), ("euler_karras", "Euler Karras"), ("euler_a", "Euler a"), ("lcm", "LCM")]
]
ABOUT = {"samplers": SAMPLERS, "model": "tiny", "file": "tiny.ckpt"}


def translated(kind="TextToImage", **fields):
    pytest.importorskip("pydantic")
    from scripts.playground import sdapi_forms

    return sdapi_forms.work_of(getattr(sdapi_forms, kind)(**fields), ABOUT)


@pytest.mark.parametrize(
    "fields, name",
    [
        ({}, "euler"),
        ({"sampler_name": "Euler a"}, "euler_a"),
        ({"sampler_name": "euler A", "scheduler": "automatic"}, "euler_a"),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, "euler_karras"),
        ({"sampler_name": "Euler Karras"}, "euler_karras"),
        ({"sampler_index": "LCM"}, "lcm"),
    ],
)
def test_samplers_of_the_web_ui(fields, name):
    assert translated(**fields)["sampler_name"] == name


def test_a_call_of_txt2img():
    work = translated(
        prompt="a house",
        negative_prompt="fog",
        steps=4,
        cfg_scale=6,
        width=128,
        height=64,
        enable_hr=True,
        denoising_strength=0.5,
        override_settings={"CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "tiny.ckpt [0123456789]"},
        save_images=True,
        eta=1.0,
        something_new=[1],
    )
    assert work == {
        "prompt": "a house",
        "uncond_prompt": "fog",
        "cfg_scale": 6,
        "sampler_name": "euler",
        "n_inference_steps": 4,
        "width": 128,
        "height": 64,
        "previews": "small",
        "clip_skip": 2,
        "hires_scale": 2,
        "hires_latents": True,
        "hires_strength": 0.5,
        "control": None,
    }


def test_a_call_of_img2img():
    unit = {"model": "canny [0a1b]", "image": "...", "weight": 0.5, "control_mode": "ControlNet is more important"}
    scripts = {"ControlNet": {"args": [unit, {"model": "None"}, {"model": "pose", "enabled": False}]}}
    work = translated("ImageToImage", init_images=["i"], mask="m", inpainting_mask_invert=1, alwayson_scripts=scripts)
    assert work["control"] == [
        {"net": "canny", "image": "...", "guess_mode": True, "strength": 0.5, "start": 0.0, "end": 1.0}
    ]
    expected = {"input_image": "i", "mask_image": "m", "invert_mask": True, "feather": 8, "padding_mask_crop": 0}
    assert expected.items() <= work.items()
    assert work["strength"] == 0.75


@pytest.mark.parametrize(
    "kind, fields, sentence",
    [
        ("TextToImage", {"tiling": True}, "tiling should be False, not True: it is not supported here."),
        (
            "TextToImage",
            {"sampler_name": "UniPC"},
            "sampler_name should be one of Euler, Euler Karras, Euler a, LCM, not",
        ),
        ("TextToImage", {"sampler_name": "LCM", "scheduler": "Karras"}, "sampler_name should be one of"),
        (
            "TextToImage",
            {"scheduler": "Exponential"},
            "scheduler should be Automatic, Uniform or Karras, not 'Exponential'.",
        ),
        (
            "TextToImage",
            {"enable_hr": True, "hr_upscaler": "ESRGAN_4x"},
            "hr_upscaler should be 'Latent' or 'Lanczos', not",
        ),
        ("TextToImage", {"enable_hr": True, "hr_second_pass_steps": 3}, "hr_second_pass_steps should be 0, "),
        (
            "TextToImage",
            {"override_settings": {"sd_model_checkpoint": "v1-5"}},
            "sd_model_checkpoint should be 'tiny.ckpt'",
        ),
        ("TextToImage", {"alwayson_scripts": {"ADetailer": []}}, "alwayson_scripts should be ControlNet, the only one"),
        (
            "TextToImage",
            {"alwayson_scripts": {"ControlNet": {"args": [{"model": "x"}]}}},
            "image should be given for each",
        ),
        (
            "TextToImage",
            {"alwayson_scripts": {"ControlNet": {"args": [{"model": "x", "image": "i"}] * 4}}},
            "ControlNet should have at most 3 units, not 4.",
        ),
        ("ImageToImage", {}, "init_images should be one image, not 0."),
        ("ImageToImage", {"init_images": ["i"], "resize_mode": 2}, "resize_mode should be 0 or 1, not 2: "),
        (
            "ImageToImage",
            {"init_images": ["i"], "mask": "m", "inpainting_fill": 2},
            "inpainting_fill should be 0 or 1, not 2",
        ),
    ],
)
def test_what_the_web_ui_has_and_the_playground_has_not(kind, fields, sentence):
    with pytest.raises(Wrong) as error:
        translated(kind, **fields)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("n_inference_steps should be at most 150.", "steps should be at most 150."),
        ("width should be a multiple of 8 pixels.", "width should be a multiple of 8 pixels."),
        ("", ""),
    ],
)
def test_errors_have_the_web_uis_names(ours, theirs):
    pytest.importorskip("pydantic")
    from scripts.playground.sdapi_forms import renamed

    assert renamed(ours) == theirs


@pytest.mark.parametrize("name", ["tiny.ckpt", "tiny", "tiny.ckpt [0a1B2c]", "tiny [0]"])
def test_names_of_the_model(name):
    pytest.importorskip("pydantic")
    from scripts.playground.sdapi_forms import check_model

    check_model(name, {"model": "tiny", "file": "tiny.ckpt"})


@pytest.mark.parametrize("name", [" " * 1_000_000, "[" * 1_000_000, "[a" * 500_000, " [" + "a" * 1_000_000])
def test_a_long_name_takes_no_time(name):
    """The web process reads it, and answers nobody else meanwhile."""
    pytest.importorskip("pydantic")
    from scripts.playground.sdapi_forms import check_model

    begun = time.process_time()
    with pytest.raises(Wrong):
        check_model(name, {"model": "tiny", "file": "tiny.ckpt"})
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("field", ["batch_size", "n_iter"])
def test_a_number_of_pictures_that_has_no_end(field):
    """The product of two integers with 4,000 digits is one that Python refuses to print."""
    pydantic = pytest.importorskip("pydantic")
    from scripts.playground.sdapi_forms import TextToImage

    with pytest.raises(pydantic.ValidationError):
        TextToImage(**{field: 10**4000})


@pytest.mark.parametrize("token", ["a long password", "a+b&c#d%41?e/f=g"])
def test_the_address_holds_the_token(token, monkeypatch, capsys):
    module = script()
    options = module.parse(["--token", token, "--no-browser"])
    asyncio.run(module.announce(options, argparse.Namespace(started=True), 7860))
    query = urlsplit(capsys.readouterr().out.removeprefix("The playground is at ").strip()).query
    assert parse_qs(query) == {"token": [token]}


def script():
    """playground.py, beside the package of the same name."""
    spec = importlib.util.spec_from_file_location("playground_script", ROOT / "scripts/playground.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--host", "0.0.0.0"], "--token should be given with --host 0.0.0.0: others could use this server."),
        (["--token", "short"], "--token should be at least 12 characters of ASCII, not 5."),
        (["--port", "70000"], "--port should be from 0 to 65535, not 70000."),
        (["--max-queue", "0"], "--max-queue should be above 0, not 0."),
        (["--checkpoint", "missing.ckpt"], "--checkpoint should be a file or a folder: there is none at missing.ckpt."),
        (["--preview", "taesd.pth"], "--preview should be a file or a folder: there is none at taesd.pth."),
        (
            ["--preview", "owner/taesd"],
            "--checkpoint should be given with --preview: the tiny model's own decoder is quick enough.",
        ),
    ],
)
def test_flags(arguments, sentence, monkeypatch, capsys):
    module = script()
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr("sys.argv", ["playground.py", *arguments])
    assert module.main() == 2
    assert capsys.readouterr().err == f"playground.py: {sentence}\n"


def test_a_missing_package(monkeypatch, capsys):
    module = script()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["playground.py"])
    assert module.main() == 2
    assert capsys.readouterr().err == (
        "playground.py: The playground needs fastapi and uvicorn: pip install -r requirements-playground.txt, or start "
        "it by `sh scripts/playground.sh`.\n"
    )
