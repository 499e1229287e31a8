"""What `generate` may be asked for."""

import inspect

import pytest

from sd import generate, pipeline


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
        ("sampler_name", None, "one of ddpm"),
        ("sampler_name", ["ddpm"], "one of ddpm"),
        ("cfg_rescale", 1.5, "a number from 0 to 1"),
        ("feather", -1, "a number of pixels"),
        ("n_inference_steps", 0, "a whole number from 1 to 1000"),
        ("n_inference_steps", 1001, "a whole number from 1 to 1000"),
        ("n_inference_steps", 2.5, "a whole number from 1 to 1000"),
        ("seed", -1, "a whole number from 0"),
        ("seed", 1.5, "a whole number from 0"),
        ("seed", 2**64, "a whole number from 0"),
        ("height", 100, "a multiple of 8"),
        ("height", 0, "a multiple of 8"),
        ("width", -8, "a multiple of 8"),
        ("width", 64.0, "a multiple of 8"),
    ],
)
def test_bad_arguments_are_named_before_any_work(monkeypatch, name, value, allowed):
    monkeypatch.setattr(pipeline, "load_models", lambda **_: pytest.fail("loaded before checking"))
    with pytest.raises(ValueError, match=f"^{name} should be .*{allowed}") as error:
        generate(**({"prompt": "a cat"} | {name: value}))
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_check_request_knows_the_arguments_of_generate():
    checked = dict(inspect.signature(pipeline.check_request).parameters)
    del checked["_"]
    arguments = inspect.signature(generate).parameters
    assert all(arguments[name].default == parameter.default for name, parameter in checked.items())
    unchecked = {"do_cfg", "models", "device", "idle_device", "tokenizer"}
    assert arguments.keys() - checked.keys() == unchecked
