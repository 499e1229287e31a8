"""Prompts, settings and commands are shown as text in reports, never as HTML."""

import re

import pytest

from sd.inside.film import frames
from sd.inside.recording import record
from sd.inside.report import report
from sd.inside.tracer import Tracer
from sd.request import Request
from tests.support.pages import OPTIONS, Page, make
from tests.support.synthetic import MICRO, random_models


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.fixture(scope="module")
def page(models):
    return Page(make(models, uncond_prompt="a dog")[1])


HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</script><script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)",
    "&lt;b&gt; &amp;amp; <!-- -->",
    "$style ${data} $$ %s {0}",
    "http://example.com/x.png and //example.com",
    "naïve café 🦊 猫 \u202eright to left\u202c",
    "two\nlines\tand a tab",
    "",
]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_is_text(models, page, prompt):
    _, text = make(models, prompt, prompt or "x", n_inference_steps=1)
    assert text.encode("utf-8")
    found = Page(text)
    harmless = ("button", "small", "bdi", "span", "p", "noscript")  # their number depends on the prompt
    tags, wanted = ([tag for tag, _ in one.elements if tag not in harmless] for one in (found, page))
    assert [tag for tag in tags if tag not in ("dt", "dd")] == [tag for tag in wanted if tag not in ("dt", "dd")]
    shown = " ".join(prompt.split())
    assert "".join(found.texts["h1"]) == (shown or "(an empty prompt)")
    assert shown in found.one(id="image")["alt"]
    assert "".join(found.texts["code"]) == f"demo.py '{prompt}'"
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert len(found.data["maps"]) == len([a for a in found.all("button") if "token" in a.get("class", "")])


def test_a_token_is_text_in_what_its_button_says(models):
    _, text = make(models, 'a " <b> & cat', n_inference_steps=1)
    buttons = [a for a in Page(text).all("button") if "token" in a.get("class", "")]
    assert {tuple(a) for a in buttons} == {("type", "class", "aria-pressed", "style", "data-says")}
    said = [re.fullmatch(r"“(.+)” got \d+\.\d% of the attention\.", a["data-says"]) for a in buttons[1:-1]]
    assert [match and match[1] for match in said] == ["a", '"', "<", "b", ">", "&", "cat"]


def test_settings_and_commands_are_text(models):
    with Tracer(models, attention=True) as trace:
        recorded = record(Request("a cat", **OPTIONS | {"n_inference_steps": 1}), models)
    half = "\ud83d.png"  # a file name can contain it, UTF-8 cannot
    page = Page(
        report(recorded, frames(recorded), trace, {"<b>": "<i>", "Image": half}, f"demo.py --image {half} '<b>'")
    )
    assert "".join(page.texts["code"]) == "demo.py --image ?.png '<b>'"
    assert page.one(**{"class": "flag"})  # --image, in which no line breaks
    assert page.texts["dt"] == ["<b>", "Image"]
    assert page.texts["dd"] == ["<i>", "?.png"]
