"""What `generate` may be asked for."""

import base64
import inspect
import io
import json
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from sd import generate, model_loader, pipeline
from sd.request import Request
from sd.request_json import PNG_URL


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("prompt", 3, "a text or a list"),
        ("prompt", [], "a text or a list"),
        ("prompt", ["a cat", None], "a text or a list"),
        ("uncond_prompt", 3, "a text or a list"),
        ("uncond_prompt", ["a", "b"], "one text"),
        ("strength", 0, "above 0 and at most 1"),
        ("strength", 1.2, "above 0 and at most 1"),
        ("strength", "half", "above 0 and at most 1"),
        ("cfg_scale", float("nan"), "a number"),
        ("cfg_scale", "7", "a number"),
        ("sampler_name", "magic", "one of ddpm"),
        ("sampler_name", ["ddpm"], "one of ddpm"),
        ("cfg_rescale", 1.5, "a number from 0 to 1"),
        ("cfg_interval", (0.5, 0.2), "two numbers from 0 to 1, the smaller first"),
        ("deep_cache", 0, "a whole number from 1 to 1000"),
        ("feather", -1, "a number of pixels"),
        ("n_inference_steps", 0, "a whole number from 1 to 1000"),
        ("n_inference_steps", 1001, "a whole number from 1 to 1000"),
        ("n_inference_steps", 2.5, "a whole number from 1 to 1000"),
        ("timestep_spacing", "karras", "one of leading, trailing, linspace"),
        ("seed", -1, "a whole number from 0"),
        ("seed", 1.5, "a whole number from 0"),
        ("seed", 2**64, "a whole number from 0"),
        ("height", 100, "a multiple of 8"),
        ("height", 0, "a multiple of 8"),
        ("width", -8, "a multiple of 8"),
        ("width", 64.0, "a multiple of 8"),
        ("height", 8200, "at most 8192 pixels"),
        ("width", 8 * 10**30, "at most 8192 pixels"),
        ("feather", 1e300, "at most 1000 pixels"),
        ("cfg_scale", 1e30, "from -1000 to 1000"),
        ("strength", True, "above 0 and at most 1"),
        ("seed", True, "a whole number from 0"),
        ("do_cfg", "no", "True or False"),
        ("do_cfg", 1, "True or False"),
        ("models", "tiny.ckpt", "what load_models returns"),
        ("tokenizer", "cat", "a Tokenizer"),
        ("device", "gpu", "one that torch can use here"),
        ("device", 1.5, "one that torch can use here"),
        ("idle_device", "disk", "one that torch can use here"),
        ("input_image", 3, "a path, an open file, a PIL image or an array"),
        ("mask_image", [1], "a path, an open file, a PIL image or an array"),
    ],
)
def test_bad_arguments_are_named_before_any_work(monkeypatch, name, value, allowed):
    monkeypatch.setattr(model_loader, "load_models", lambda **_: pytest.fail("loaded before checking"))
    with pytest.raises(ValueError, match=f"^{name} should be .*{allowed}") as error:
        generate(**({"prompt": "a cat"} | {name: value}))
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_samplers_of_few_steps_say_how_many(name):
    sentence = f"^n_inference_steps should be at most 50 with the sampler {name}, not 51.$"
    with pytest.raises(ValueError, match=sentence):
        Request("a cat", sampler_name=name, n_inference_steps=51).check()
    Request("a cat", sampler_name=name, n_inference_steps=50).check()


def test_generate_takes_every_setting_of_a_request_with_its_default():
    settings, arguments = (inspect.signature(function).parameters for function in (Request, generate))
    assert set(arguments) - set(settings) == {"models", "device", "idle_device", "tokenizer"}
    assert all(arguments[name].default == parameter.default for name, parameter in settings.items())


def test_generate_passes_every_setting_on(monkeypatch):
    """Each value comes out of the request as it went into `generate`."""
    values = {field.name: object() for field in fields(Request)}
    requests = []
    monkeypatch.setattr(pipeline, "draw", lambda request, *rest: requests.append((request, rest)) or [None])
    others = {"models": 1, "device": 2, "idle_device": 3, "tokenizer": 4}
    generate(**values, **others)
    assert requests == [(Request(**values), (1, 2, 3, 4))]


def test_a_request_travels_as_json():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    request = Request(["a cat", "a dog"], "", image, Image.fromarray(image), seed=np.int64(7), strength=0.5, height=16)
    text = json.dumps(request.to_dict())
    back = Request.from_dict(json.loads(text))
    back.check()
    assert np.array_equal(np.asarray(back.input_image), image)
    assert np.array_equal(np.asarray(back.mask_image), image)
    assert back.to_dict() == request.to_dict()
    plain = Request("a cat", seed=3)
    assert Request.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain


def test_transparent_is_black_in_a_mask_from_json_too():
    layer = Image.new("RGBA", (16, 16))
    layer.paste("white", (4, 4, 12, 12))
    with io.BytesIO() as file:
        layer.save(file, format="PNG")
        url = PNG_URL + base64.b64encode(file.getvalue()).decode()
    request = Request.from_dict({"prompt": "a cat", "input_image": url, "mask_image": url})
    assert request.input_image.getpixel((0, 0)) == (255, 255, 255)
    assert request.mask_image.getpixel((0, 0)) == (0, 0, 0)
    assert request.mask_image.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"prompt": "a cat", "colour": "red"}, r"request should be a dict of prompt, .* not \['colour'\]"),
        (None, "request should be a dict of prompt, .* not None"),
        ([1], r"request should be a dict of prompt, .* not \[1\]"),
        ({"seed": 1}, "prompt should be given"),
        (
            {"prompt": "a cat", "input_image": "/etc/passwd"},
            "input_image should be a text that begins with 'data:image/png",
        ),
        ({"prompt": "a cat", "mask_image": 3}, "mask_image should be a text that begins with"),
        ({"prompt": "a cat", "input_image": "data:image/png;base64,AAAA"}, "is not an image"),
        ({"prompt": "a cat", "input_image": "data:image/png;base64,&"}, "input_image should be"),
    ],
)
def test_a_request_from_json_is_checked(values, problem):
    with pytest.raises(ValueError, match=problem):
        Request.from_dict(values)


@pytest.mark.parametrize("name", ["prompt", "uncond_prompt"])
@pytest.mark.parametrize(
    "text, reason",
    [
        ("x" * 10_001, "at most 10000 characters long, not 10001."),
        ("a \ud83d", r"a prompt must be valid Unicode; 'a \ud83d' has a lone surrogate in it."),
        ("&#" + "9" * 5000 + ";", "an HTML entity with more digits"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_before_any_work(monkeypatch, name, text, reason):
    monkeypatch.setattr(model_loader, "load_models", lambda **_: pytest.fail("loaded before checking"))
    with pytest.raises(ValueError, match=f"^{name} should be ") as error:
        generate(**({"prompt": "a cat"} | {name: text}))
    assert reason in str(error.value)


def test_a_value_is_quoted_on_one_line_and_not_all_of_it():
    class Strange:
        def __repr__(self):
            raise RuntimeError

    for value, quote in (
        (Strange(), "this Strange"),
        ("x\ny" * 1000, r"'x\nyx\nyx"),
        (10**400, "1000000"),
        (10**5000, "this int"),
    ):
        with pytest.raises(ValueError, match="^strength should be") as error:
            generate("a cat", strength=value)
        assert quote in str(error.value)
        assert len(str(error.value)) < 300
