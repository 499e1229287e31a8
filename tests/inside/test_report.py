"""Reports: pages that need no other file, with and without JavaScript."""

import base64
import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate
from sd.inside import recording
from sd.inside.film import frames
from sd.inside.preview import preview_for
from sd.inside.recording import record
from sd.inside.report import report
from sd.inside.tracer import Tracer
from sd.request import Request
from tests.support.pages import OPTIONS, RED, Page, make, pixels
from tests.support.synthetic import INPAINTING_MICRO, MICRO, random_models

MASK = Image.linear_gradient("L").resize((40, 32))


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


@pytest.fixture(scope="module")
def made(models):
    return make(models, uncond_prompt="a dog")


@pytest.fixture(scope="module")
def page(made):
    return Page(made[1])


def test_a_deep_cache_shows_all_stages(models):
    _, text = make(models, deep_cache=2)
    _, plain = make(models)
    table = [one[one.index("<svg") :].count('scope="row"') for one in (text, plain)]
    assert table[0] == table[1] > 27


def test_everything_is_in_the_page(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert attributes.get(name, "data:image/").startswith(("data:image/", "#"))
    style = page.texts["style"][0]
    assert "url(" not in style
    assert "@import" not in style
    assert not [text for text in page.texts["script"] if "http" in text]
    assert len(page.all("script")) == 2


def test_only_the_script_of_the_page_may_run(page):
    policy = page.one(**{"http-equiv": "Content-Security-Policy"})["content"]
    digest = hashlib.sha256(page.texts["script"][1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none';")


def test_the_page_is_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    assert page.one(name="viewport")["content"] == "width=device-width, initial-scale=1"
    assert len(page.all("h1")) == 1
    assert [tag for tag, _ in page.elements if tag in ("h1", "h2", "h3")] == ["h1"] + ["h2"] * 6
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(name, ids[0]) in ids
        if tag == "img":
            assert attributes["alt"]
    (slider,) = page.all("input")
    assert slider["type"] == "range"
    assert page.one(**{"for": slider["id"], "id": "now"})
    assert {"for": slider["id"]} in page.all("label")
    assert all(button["type"] == "button" for button in page.all("button"))
    assert "role" in page.one(**{"class": "plot"})


def test_one_entry_for_every_step(made, page):
    steps = page.data["steps"]
    assert [step["title"] for step in steps] == [f"{i + 1} of 3, t = {t:g}" for i, t in enumerate([999, 666, 333])]
    assert page.one(id="step")["max"] == "2"
    recorded = made[0]
    for step, moment, expected in zip(steps, recorded.moments, frames(recorded)):
        assert np.array_equal(pixels(step["expected"]), expected)
        for name in ("latents", "uncond", "cond", "push"):
            assert pixels(step[name]).shape == (4, 5, 3)
        assert step["signal"] ** 2 + step["noise"] ** 2 == pytest.approx(1, abs=1e-3)
        assert step["x"] == pytest.approx(100 * (1 - moment.timestep / 999), abs=0.01)
    assert [step["noise"] for step in steps] == sorted((step["noise"] for step in steps), reverse=True)
    panels = [image for image in page.all("img") if image["id"] != "image"]
    assert [image["id"] for image in panels] == ["expected", "latents", "uncond", "cond", "push"]
    assert all(image["src"] == steps[1][image["id"]] for image in panels)  # before any script has run


def test_without_scripts_the_step_shown_first_is_complete(page):
    slider, step = page.one(id="step"), page.data["steps"][1]
    assert slider["value"] == "1"
    assert page.texts["output"] == [step["title"]]
    assert slider["aria-valuetext"] == step["title"]
    assert step["mixture"] in page.texts["figcaption"]
    left = f"left:{step['x']:.2f}%"
    assert page.one(id="mark")["style"] == left
    assert page.one(id="signal-dot")["style"] == f"{left};top:{100 - 100 * step['signal']:.2f}%"
    assert page.one(id="noise-dot")["style"] == f"{left};top:{100 - 100 * step['noise']:.2f}%"


def test_latents_are_explained_where_they_first_appear(models, page):
    text = " ".join(" ".join(page.texts["main"]).split())
    first = text.index("latents")
    assert text[first:].startswith("latents. They are a compressed form of an image: the encoder computes them from")
    assert "40 × 32 pixels are 5 × 4 positions with 4 numbers each. Sampling starts from noise." in text
    _, late = make(models, input_image=RED, strength=0.7)
    assert "Sampling starts from the latents of the input image with noise added." in late


def test_play_is_hidden_until_the_script_runs(page):
    play = page.one(id="play")
    assert play["type"] == "button"
    assert "hidden" in play


def test_without_scripts_the_page_says_what_does_not_work_and_shows_the_shares(page):
    tags = [tag for tag, a in page.elements if tag in ("noscript", "input") or "token" in a.get("class", "").split()]
    shares = ["button", "noscript"] * 5  # start, a, red, cat, end
    assert tags == ["noscript", *shares, "noscript", "input"]
    said = [re.search(r"\d+\.\d%", a["data-says"])[0] for a in page.all("button") if "data-says" in a]
    assert [text for text in page.texts["noscript"] if text.endswith("%")] == said
    assert len([text for text in page.texts["noscript"] if "JavaScript" in text]) == 2


def test_what_the_prompt_adds_is_as_strong_as_noise(models, made, page):
    pushes = [moment.noise_cond - moment.noise_uncond for moment in made[0].moments]
    strongest = max(push.std() for push in pushes)
    assert strongest < 0.9  # otherwise this test would show nothing
    preview = preview_for(models)
    for step, push in zip(page.data["steps"], pushes, strict=True):
        assert np.array_equal(pixels(step["push"]), preview(push / strongest)[0])


def test_the_image_is_that_of_generate(models, made, page):
    picture = pixels(page.one(id="image")["src"])
    assert np.array_equal(picture, made[0].image)
    assert np.array_equal(picture, generate("a red cat", "a dog", models=models, **OPTIONS))


def test_only_some_steps_are_guided(models):
    recorded, text = make(models, cfg_interval=(0, 0.5), n_inference_steps=4)
    assert [moment.noise_uncond is None for moment in recorded.moments] == [False, False, True, True]
    assert "Some steps have no guidance" in text
    assert "ran 4 times, 2 times on a batch of two: with and without the prompt" in " ".join(text.split())
    steps = Page(text).data["steps"]
    assert steps[2]["push"] == steps[3]["push"] != steps[0]["push"]


def test_without_guidance_there_is_one_prediction(models):
    _, text = make(models, uncond_prompt="a dog", do_cfg=False)
    page = Page(text)
    assert page.data["steps"][0].keys() & {"latents", "uncond", "cond", "push"} == {"latents", "cond"}
    assert page.one(id="cond")
    assert "a dog" not in text
    assert "on a batch of two" not in text


def test_pieces_of_a_word_are_joined(models):
    _, text = make(models, "a (red:1.5) antidisestablishmentarianism", n_inference_steps=1)
    kinds = [a["class"] for a in Page(text).all("button") if "token" in a.get("class", "")]
    pieces = len(kinds) - 6
    assert kinds == [
        *("token group", "token", "token", "token ongoing"),
        *["token joined ongoing"] * pieces,
        *("token joined", "token group"),
    ]
    assert "<bdi>red</bdi><small>736 × 1.5</small>" in text


def test_long_prompts(models):
    prompt = "a red cat, " * 90  # 360 tokens
    _, text = make(models, prompt, n_inference_steps=1)
    assert len(Page(text).data["maps"]) == 302
    assert "Only the first 300 tokens are shown." in text


def test_shapes_of_the_unet(made, page):
    titles = [text for text in page.texts["title"] if text.startswith(("in:", "down.", "middle", "up.", "conv_out"))]
    assert titles[:2] == ["in: 4 channels, height 4, width 5", "down.0: 16 channels, height 4, width 5"]
    assert len(titles) == 27
    blocks = {title.partition(":")[0]: a for title, a in zip(titles, page.all("rect"))}
    assert {name for name, a in blocks.items() if a["class"] == "block reads"} >= {"down.1", "middle", "up.11"}
    assert blocks["down.0"]["class"] == blocks["down.3"]["class"] == "block"
    assert float(blocks["down.9"]["width"]) == pytest.approx(2 * float(blocks["down.0"]["width"]), abs=0.11)
    assert float(blocks["down.3"]["height"]) == pytest.approx(float(blocks["down.0"]["height"]) / 2, abs=0.11)
    assert len([a for a in page.all("path") if a.get("class") == "skip"]) == 12
    assert len(page.all("rect")) == 27
    assert "The U&#8209;Net ran 3 times, each time on a batch of two" in " ".join(made[1].split())


@pytest.mark.parametrize("config", [MICRO, INPAINTING_MICRO])
def test_from_a_picture(config):
    more = {"input_image": RED, "mask_image": MASK, "strength": 0.7}
    models = random_models(config)
    recorded, text = make(models, **more)
    assert np.array_equal(recorded.image, generate("a red cat", models=models, **OPTIONS | more))
    page = Page(text)
    assert [step["title"] for step in page.data["steps"]] == ["1 of 2, t = 666", "2 of 2, t = 333"]
    assert "unvisited" in [a.get("class") for a in page.all("span")]
    assert f"in: {config.unet.in_channels} channels, height 4, width 5" in page.texts["title"]


def test_maps_lie_on_the_region_that_was_repainted_alone(models):
    mask = Image.new("L", (160, 128))
    mask.paste(255, (80, 96, 120, 128))
    picture = {"input_image": RED.resize(mask.size), "mask_image": mask, "padding_mask_crop": 0}
    recorded, text = make(models, **picture)
    assert recorded.inpainting.region.box == (80, 96, 120, 128)
    data = Page(text).data
    # CSS places a mask of 25 % by a share of the other 75 %, of which 80 / 120 and 96 / 96 are to its left and above.
    assert (data["position"], data["size"]) == ("66.67% 100%", "25% 25%")
    assert "Here, 40 × 32 pixels are 5 × 4 positions" in text
    assert "They show only the part of the image that was repainted" in text
    whole, text = make(models, **picture | {"padding_mask_crop": 200})
    assert whole.inpainting.region.box == (0, 0, 160, 128)
    assert (Page(text).data["position"], Page(text).data["size"]) == ("0% 0%", "100% 100%")


def test_maps_lie_on_the_whole_image(made, page):
    assert (page.data["position"], page.data["size"]) == ("0 0", "100% 100%")


PICTURE = {"input_image": RED, "strength": 0.7}


@pytest.mark.parametrize(
    "more, late",
    [
        ({"sampler_name": "ddpm"}, False),  # its first timestep is 666, and no step is skipped
        ({"sampler_name": "ddim", "strength": 0.7}, False),  # without an input image, strength has no effect
        ({"sampler_name": "plms"}, False),
        ({"sampler_name": "ddpm", **PICTURE}, True),
        ({"sampler_name": "heun", **PICTURE}, True),
        ({"sampler_name": "ddpm", **PICTURE, "mask_image": MASK}, True),
        ({"sampler_name": "ddpm", **PICTURE, "strength": 1}, False),
        ({"n_inference_steps": 1, **PICTURE}, False),  # the only step is never skipped
    ],
)
def test_only_what_strength_skips_is_said_to_be_skipped(models, more, late):
    recorded, text = make(models, **more)
    assert ("sampling starts late" in text) == late
    hatched = [a for a in Page(text).all("span") if a.get("class") == "unvisited"]
    start = 100 * (1 - recorded.moments[0].timestep / 999)
    assert [a["style"] for a in hatched] == [f"width:{start:.2f}%"] * late


def test_long_runs_show_some_of_their_steps(models, monkeypatch):
    monkeypatch.setattr(recording, "MAX_MOMENTS", 4)
    _, text = make(models, n_inference_steps=9, height=8, width=8)
    steps = Page(text).data["steps"]
    assert [step["title"].split(",")[0] for step in steps] == [f"{i} of 9" for i in (1, 4, 6, 9)]
    assert "Of the 9 steps, 4 are shown, evenly spaced." in text


@pytest.mark.slow
def test_large_pictures_of_many_steps_stay_small(models):
    with Tracer(models, attention=True) as trace:
        recorded = record(Request("a " * 75, **OPTIONS | {"n_inference_steps": 1, "height": 512, "width": 512}), models)
    noise = torch.randn(60, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    names = ("latents", "denoised", "noise_uncond", "noise_cond")
    moments = [replace(recorded.moments[0], **dict.fromkeys(names, x)) for x in noise]
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    recorded = replace(recorded, moments=moments, image=picture)
    small = [picture[:128, :128]] * 61
    text = report(recorded, small, trace, {}, "")
    assert 1_000_000 < len(text.encode()) < 5_000_000
    assert "WebP quality" in text
    assert np.array_equal(pixels(Page(text).one(id="image")["src"]), picture)


def test_a_large_image_that_is_not_exact_says_so(models, monkeypatch):
    monkeypatch.setitem(report.__globals__["BUDGETS"], "image", 1000)
    _, text = make(models, n_inference_steps=1)
    assert "the image on it is not exact: WebP quality" in text
    assert "has exactly the pixels" not in text


def test_previews_are_said_to_be_previews(models, monkeypatch):
    sentence = "The expected images are made by the same map"
    assert sentence not in make(models, n_inference_steps=1)[1]
    monkeypatch.setitem(report.__globals__, "shows_previews", lambda models: True)
    assert sentence in make(models, n_inference_steps=1)[1]
