"""The playground's page in a real browser: drawing, scrubbing, masks, dropped pictures, and what fails."""

import base64
import os
import signal
import socket

import numpy as np
import pytest

from scripts.playground.drawing import png_url
from tests.support.browser import (
    Keys,
    emulate,
    foreign_requests,
    in_colours,
    loaded,
    needs_chromium,
    opened,
    playground_browser,
    until,
)
from tests.support.playground import Live

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def live():
    with Live() as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playground_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, live):
    with loaded(browser, live.port) as page:
        yield in_colours(page)


def test_the_picture_follows_the_drawing(page):
    first = page.source("live-picture")
    assert "from the stroke" in page.text("live-time")
    page.stroke("sketch-shapes", (-200, 150), (-100, 100), (0, 150), (100, 100), (150, 150), (50, 50))
    assert until(lambda: page.source("live-picture") != first)
    drawing = page.source("live-picture")
    page.set("live-prompt", "a red house in the snow at night")
    assert until(lambda: page.source("live-picture") != drawing)
    assert until(lambda: page.find("live").get_attribute("aria-busy") == "false")
    asked, shown = page.script("return [window.sent.length, window.shown]")
    assert len(shown) == asked  # each was shown,
    assert all(begun <= i + 1 for i, begun in enumerate(shown, 1))  # and at most the next one was asked for before
    page.find("undo").click()
    assert until(lambda: len(page.sent()) > asked)
    assert {job["seed"] for job in page.sent()} == {6}
    assert all(job["previews"] == "none" for job in page.sent())
    drawings = page.drawings()
    assert drawings[-1] == drawings[0] != drawings[-2]


def test_drawing_by_keyboard(page):
    first, canvas = page.source("live-picture"), page.find("sketch-shapes")
    page.script("arguments[0].focus()", canvas)
    for key in (" ", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " "):
        page.press(key)
    assert page.find(".board .pen").is_displayed()
    assert until(lambda: page.source("live-picture") != first)
    held = "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: ' ', repeat: true, bubbles: true}))"
    page.script(held, canvas)
    assert "down" not in page.find(".board .pen").get_attribute("class")


def test_steps_appear_one_by_one_and_can_be_gone_back_to(page):
    page.set("steps-count", 8)
    page.find("submit").click()
    assert until(lambda: page.source("image"))
    assert page.find("picture").is_displayed()
    assert page.script("return window.states[0]") == "Drawing …"  # a first step is visible long before the end
    assert until(lambda: page.step() >= 3)
    page.set("step", 0)
    early = {name: page.source(name) for name in ("image", "latents", "uncond", "cond", "push")}
    assert len(set(early.values())) == 5
    assert page.text("now").startswith("1 of 8, t = 999")
    assert until(lambda: page.text("state").startswith("Drawn"))
    assert page.text("now").startswith("1 of 8")  # the reader's place is kept
    places = []
    for value in range(9):
        page.set("step", value)
        places.append(page.script("return parseFloat(document.getElementById('mark').style.left)"))
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 100)
    assert page.text("now") == "finished"
    assert page.text("mixture").startswith("latents = 1.00")
    assert len(page.find_all("#ticks .visited")) == 8
    late = {name: page.source(name) for name in early}
    assert all(late[name] != early[name] for name in early)
    assert page.source("#shelf img") == late["image"]


def test_a_word_lights_up_where_the_u_net_looked(page):
    page.draw(prompt="a red house")
    assert until(lambda: page.find("words").is_displayed())
    tokens = page.find_all(".token")
    assert [token.text.split()[0] for token in tokens] == ["start", "a", "red", "house", "end"]
    masks = []
    for token in tokens[1:4]:
        page.hover(token)
        assert page.find("lit").is_displayed()
        masks.append(page.script("return document.getElementById('lit').style.maskImage"))
        assert token.text.split()[0] in page.text("share")
    assert len(set(masks)) == 3
    page.hover(page.find("studio-title"))
    assert not page.find("lit").is_displayed()
    tokens[3].click()
    page.hover(page.find("studio-title"))
    assert page.find("lit").is_displayed()  # chosen
    page.press(Keys.ESCAPE)
    assert not page.find("lit").is_displayed()


def test_the_stages_of_the_u_net_show_their_feature_maps(page):
    page.draw()
    assert until(lambda: page.find("unet").is_displayed())
    radios, seen = page.find_all("#stages input"), []
    assert len(radios) == 26
    for radio in radios[::6]:
        page.script("arguments[0].click()", radio)
        seen.append(page.source("feature"))
        assert radio.get_attribute("value") in page.text("feature-title")
    assert len(set(seen)) == len(seen)
    before = page.source("feature")
    page.set("step", 0)
    assert page.source("feature") != before
    assert "in step 1." in page.text("feature-text")
    page.press(Keys.ARROW_RIGHT) if page.script("arguments[0].focus()", radios[0]) else None
    assert len(page.find_all("#skips .skip")) == 12


@pytest.mark.parametrize("how", ["button", "escape"])
def test_cancel_stops_at_once_and_the_next_picture_is_drawn(page, live, how):
    page.set("steps-count", 150)
    page.find("submit").click()
    assert until(lambda: page.step() >= 2)
    page.find("cancel").click() if how == "button" else page.press(Keys.ESCAPE)
    assert page.text("state") == "Cancelled."
    assert until(lambda: not live.call("GET", "/api/status")[1]["running"])
    page.draw(steps_count=2)
    assert len(page.find_all("#shelf li")) == 1


def test_tokens_are_coloured_as_one_types(page):
    page.find("prompt").clear()
    page.find("prompt").send_keys("a (red:1.3) antidisestablishment <img src=x onerror=alert(1)>")
    assert until(lambda: page.find_all("#tokens .joined"))
    pieces = page.find_all("#tokens .piece")
    assert page.text("count") == f"{len(pieces)} of 75 tokens"
    assert [piece.text for piece in pieces[:3]] == ["a", "red × 1.3", "anti"]
    assert page.find_all("#tokens .joined")[0].text == "dise"
    assert len({piece.value_of_css_property("background-color") for piece in pieces[:5]}) == 5
    assert "antidisestablishment" in page.text("prompt-notes")
    assert page.find_all("#tokens img") == []
    page.set("prompt", "a (red house")
    assert until(lambda: "brackets in pairs" in page.text("prompt-notes"))
    page.set("prompt", "red " * 100)
    assert until(lambda: page.text("count") == "100 tokens, in 2 parts")


def test_a_downloaded_picture_brings_its_settings_back(page, tmp_path):
    sampler = "euler_a_karras" if page.find_all("#sampler option[value=euler_a_karras]") else "euler_a"
    settings = {"prompt": "a (blue:1.2) tent", "negative": "clouds", "sampler": sampler, "scale": 3.5, "seed": 77}
    settings |= {"clip-skip": 2, "hires-scale": 1.5, "hires-strength": 0.5, "freeu": "1.4 1.6 0.9 0.2"}
    page.draw(**{name.replace("-", "_"): value for name, value in settings.items()}, steps_count=2)
    assert page.source("#shelf img") == page.source("image")
    assert page.script("return document.getElementById('image').naturalWidth") == 192
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    page.find_all("#shelf button.quiet")[1].click()
    (file,) = until(lambda: [*tmp_path.glob("*.png")])
    assert file.name == "a-blue-1-2-tent-77.png"
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    assert url == page.source("#shelf img")
    for name in ("prompt", "negative", "seed", "freeu"):
        page.set(name, "")
    for name in ("scale", "clip-skip", "hires-scale", "hires-strength"):
        page.set(name, 1)
    page.drop("unet" if page.find("unet").is_displayed() else "gallery", url)
    assert until(lambda: "restored" in page.text("draw-notes"))
    assert {name: page.find(name).get_attribute("value") for name in settings} == {
        name: str(value) for name, value in settings.items()
    }
    page.draw()
    assert page.source("#shelf img") == url  # the same picture, to the byte
    assert len(page.find_all("#shelf li")) == 2


def test_a_picture_of_the_web_ui_brings_its_second_pass_back(page):
    parameters = (
        "a red house\nNegative prompt: clouds\nSteps: 3, Sampler: Euler a, CFG scale: 4, Seed: 5, Size: 64x80, "
        "Denoising strength: 0.7, Clip skip: 2, Hires upscale: 2, Hires steps: 4, Hires upscaler: Latent"
    )
    page.drop("gallery", png_url(np.zeros((8, 8, 3), np.uint8), parameters))
    assert until(lambda: page.text("draw-notes"))
    assert page.text("draw-notes").endswith("Not used: Hires steps.")
    wanted = {"hires-scale": "2", "hires-strength": "0.7", "clip-skip": "2", "width": "64", "height": "80", "freeu": ""}
    assert {name: page.find(name).get_attribute("value") for name in wanted} == wanted
    assert page.find("hires-latents").is_selected()
    page.drop("gallery", png_url(np.zeros((8, 8, 3), np.uint8), parameters.partition(", Clip skip")[0]))
    assert until(lambda: "another picture" in page.text("draw-notes"))  # without a second pass, it means image-to-image
    assert page.find("hires-scale").get_attribute("value") == page.find("clip-skip").get_attribute("value") == "1"
    assert page.find("strength").get_attribute("value") == "0.7"
    page.drop("start-frame", png_url(np.zeros((16, 8, 3), np.uint8)))
    assert until(lambda: page.find("mask").is_displayed())
    assert [page.find(side).get_attribute("value") for side in ("width", "height")] == ["64", "80"]  # the restored size


def test_the_gallery_restores_a_picture_with_its_steps(page):
    page.draw(prompt="a red house", seed=1, steps_count=3)
    first = page.source("image")
    page.draw(prompt="a yellow tree", seed=2, steps_count=2)
    page.find_all("#shelf .card")[1].click()
    assert until(lambda: page.source("image") == first)
    assert page.find("prompt").get_attribute("value") == "a red house"
    assert page.find("seed").get_attribute("value") == "1"
    assert page.find("words").is_displayed()
    page.set("step", 0)
    assert page.text("now").startswith("1 of 3")
    for _ in range(12):  # the steps of older pictures are dropped, but not of the one that is shown
        page.find("keep").click()
    page.set("step", 1)
    assert page.text("now").startswith("2 of 3")


def test_a_mask_is_painted_and_only_that_changes(page):
    page.draw(seed=3)
    page.find_all("#shelf button.quiet")[0].click()  # start from it
    assert until(lambda: page.find("mask").is_displayed())
    page.stroke("mask", (-100, -60), (100, -60))
    page.draw(prompt="a yellow tree", strength=1)
    job = page.sent()[-1]
    white = page.browser.execute_async_script(
        """const [url, done] = arguments, image = new Image();
        image.onload = () => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.width, image.height];
            const context = canvas.getContext("2d", {willReadFrequently: true});
            context.drawImage(image, 0, 0);
            const at = (x, y) => [...context.getImageData(x * image.width, y * image.height, 1, 1).data];
            done([at(.5, .5 - .3 * 60 / 100), at(.5, .9)]);
        };
        image.src = url""",
        job["mask_image"],
    )
    assert white[1] == [0, 0, 0, 255]
    assert [255, 255, 255, 255] in white
    assert job["input_image"].startswith("data:image/png;base64,")
    page.find("mask-clear").click()
    page.draw()
    assert page.sent()[-1]["mask_image"] is None
    page.find("start-remove").click()
    page.draw()
    assert "input_image" not in page.sent()[-1]


def test_a_dropped_picture_without_settings_is_where_one_starts(page):
    plain = page.script(
        """const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [200, 100];
        canvas.getContext("2d").fillRect(0, 0, 50, 50);
        return canvas.toDataURL("image/png")"""
    )
    page.drop("gallery", plain)
    assert until(lambda: page.find("mask").is_displayed())
    assert "no settings" in page.text("draw-notes")
    width, height = (int(page.find(name).get_attribute("value")) for name in ("width", "height"))
    assert (width, height) == (184, 88)  # the shape of the picture, with as many pixels as the model has
    page.find("start-remove").click()
    page.drop("start-frame", "data:text/plain;base64,aGVsbG8=", "notes.txt")
    assert until(lambda: "PNG, JPEG or WebP file, not notes.txt" in page.text("start-error"))
    page.drop("start-frame", "data:image/png;base64,aGVsbG8=")
    assert until(lambda: "damaged" in page.text("start-error"))


def test_one_thing_is_changed_and_both_are_compared(page):
    page.draw(seed=5, prompt="a red house")
    page.set("compare-text", "a blue house")
    page.find("compare-draw").click()
    assert until(lambda: page.text("compare-draw") == "Draw the other" and page.source("second-image"))
    first, second = page.source("first-image"), page.source("second-image")
    assert first == page.source("image") != second
    job = page.sent()[-1]
    assert (job["prompt"], job["seed"]) == ("a blue house", 5)
    assert (page.text("first-value"), page.text("second-value")) == ("a red house", "a blue house")
    page.set("compare-step", 0)
    assert page.source("first-image") != first
    page.set("compare-what", "n_inference_steps")
    page.set("compare-number", 100_000)
    page.find("compare-draw").click()
    assert until(lambda: "Steps should be" in page.text("compare-error"))
    assert page.source("second-image") == ""  # not the one before, with the new value
    page.set("compare-what", "freeu")
    page.set("compare-text", "1.2 1.4 0.9 0.2")
    page.find("compare-draw").click()
    assert until(lambda: page.text("compare-draw") == "Draw the other" and page.source("second-image"))
    assert page.sent()[-1]["freeu"] == [1.2, 1.4, 0.9, 0.2]
    assert (page.text("first-value"), page.text("second-value")) == ("(no FreeU)", "1.2 1.4 0.9 0.2")
    page.set("compare-what", "cfg_scale")
    page.set("compare-number", "")
    page.find("compare-draw").click()
    assert page.text("compare-error") == "The new scale should be a number."
    page.set("compare-what", "seed")
    page.set("compare-number", 2**60 + 1)  # JavaScript would make it 2**60
    page.find("compare-draw").click()
    assert page.text("compare-error").startswith("The seed should be a whole number")


def test_watching_how_the_drawing_becomes_a_picture(page):
    page.find("watch").click()
    assert until(lambda: page.text("state").startswith("Drawn"))
    assert page.source("image") == page.source("live-picture")
    assert len(page.find_all("#ticks .unvisited")) == 1  # image-to-image skips the beginning
    page.find("keep").click()
    assert len(page.find_all("#shelf li")) == 2
    page.find_all("#shelf .card")[0].click()
    assert until(lambda: "not kept" in page.text("now"))


def test_everything_by_keyboard(page):
    page.script("document.getElementById('prompt').focus()")
    page.press(Keys.CONTROL, Keys.ENTER)
    assert until(lambda: page.text("state").startswith("Drawn"))
    assert until(lambda: page.find("words").is_displayed())
    page.script("document.querySelector('.skip-link').focus()")
    reached = []
    for _ in range(90):
        page.press(Keys.TAB)
        active = page.browser.switch_to.active_element
        if active.tag_name == "body":
            break
        drawn = [active, *active.find_elements("xpath", "./following-sibling::*[1]")]  # a radio button's swatch
        styles = [one.value_of_css_property("outline-style") for one in drawn]
        assert set(styles) != {"none"}, active.get_attribute("outerHTML")[:200]
        reached.append(active.get_attribute("id") or active.get_attribute("class").split(" ")[0])
    wanted = ["live-prompt", "sketch-shapes", "brush", "watch", "prompt", "submit", "sampler", "seed", "step"]
    assert [name for name in reached if name in wanted] == wanted
    assert {"token", "card", "compare-what"} <= set(reached)


@pytest.mark.parametrize(
    "width, height, colours",
    [(360, 740, "light"), (360, 740, "dark"), (820, 1180, "light"), (1280, 900, "light")],
)
def test_nothing_is_wider_than_the_screen(page, width, height, colours):
    page.draw(prompt="a red house " + "x" * 300)
    emulate(page.browser, width, height, colours, touch=width < 1000)
    page.script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.script("return document.documentElement.scrollWidth") <= width
    small = page.script(
        """return [...document.querySelectorAll("button, select, textarea, input:not([type=radio], [type=checkbox])")]
        .filter((one) => one.offsetParent && Math.min(one.offsetWidth, one.offsetHeight) < 24).map((one) => one.id)"""
    )
    assert small == []


def test_a_finger_draws_and_the_page_does_not_scroll(page):
    emulate(page.browser, 360, 740, touch=True)
    upwards = [[(0, -5 * i)] for i in range(30)]
    page.touch("sketch-shapes")  # scrolls it into view
    place, picture, drawing = page.script("return scrollY"), page.source("live-picture"), page.drawings()[-1]
    page.touch("sketch-shapes", *upwards)
    assert until(lambda: page.source("live-picture") != picture)
    assert page.drawings()[-1] != drawing
    assert page.script("return scrollY") == place
    page.touch("studio-title")
    place = page.script("return scrollY")
    page.touch("studio-title", *upwards)  # elsewhere, the same movement scrolls
    assert until(lambda: page.script("return scrollY") > place)


def test_a_second_finger_does_not_join_in(page):
    """It would otherwise draw lines from one finger to the other."""
    emulate(page.browser, 360, 740, touch=True)
    colour = (
        "return [...document.getElementById('sketch-shapes').getContext('2d').getImageData(...arguments, 1, 1).data]"
    )
    centre, left = page.script(colour, 256, 256), page.script(colour, 100, 256)
    first, second = (-100, 0), (100, 0)
    page.touch("sketch-shapes", [first], [first, second], [first, (101, 0)], [(-101, 0), (101, 0)])
    assert page.script(colour, 256, 256) == centre
    assert page.script(colour, 100, 256) != left


def test_a_browser_that_goes_back_fills_the_fields_in_again(page, live):
    """The page then does what the fields say."""
    if not page.find("modes").is_displayed():
        pytest.skip("there is no ControlNet in data/")
    page.use("lines")
    page.script("document.querySelector('[name=pen][value=\"#ffffff\"]').click()")
    page.set("strength", 0.3)
    page.set("clip-skip", 2)
    page.browser.get(f"http://127.0.0.1:{live.port}/source/sd/noise.py#make_generators")
    assert "def make_generators(" in page.text(":target")
    page.browser.back()
    assert until(lambda: page.find("sketch-lines").is_displayed() and page.source("live-picture"))
    assert page.script("return document.querySelector('[name=pen]:checked').value") == "#ffffff"
    assert page.script("return document.getElementById('strength-now').textContent") == "0.30"
    assert page.find("more").get_attribute("open")
    drawing = "return document.getElementById('sketch-lines').toDataURL()"
    before = page.script(drawing)
    page.stroke("sketch-lines", (50, -200), (100, -200))  # where nothing is drawn, the eraser changes nothing
    assert page.script(drawing) == before


def test_words_can_be_dragged_within_a_prompt(page):
    """A drop of text is the browser's own business."""
    drop = """const dataTransfer = new DataTransfer();
        dataTransfer.items.add(...arguments);
        return document.getElementById("prompt")
            .dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}))"""
    assert page.script(drop, "a red house", "text/plain")
    assert not page.script(drop, "data:image/png;base64,", "text/uri-list")
    assert until(lambda: page.text("draw-error"))


def test_a_picture_that_is_next_to_a_line(page):
    """The canvas for its mask has one pixel at least, so that it can be read."""
    line = page.script(
        """return Object.assign(document.createElement("canvas"), {width: 3000, height: 1}).toDataURL("image/png")"""
    )
    page.drop("start-frame", line)
    assert until(lambda: page.find("start-remove").is_displayed())
    page.draw(width=64, height=64)
    assert page.sent()[-1]["mask_image"] is None


def test_a_wrong_number_in_a_folded_part_is_shown(page):
    """Otherwise the browser refuses to draw, and cannot say why."""
    page.set("clip-skip", 99)
    page.script("document.getElementById('more').open = false")
    page.find("submit").click()
    assert page.find("clip-skip").is_displayed()
    assert page.script("return document.activeElement.id") == "clip-skip"


def test_all_buttons_in_any_order(page, live):
    """400 clicks and values by chance, faster than any reader: no error in the console."""
    page.browser.set_script_timeout(300)
    page.browser.execute_async_script(
        """const [seed, done] = arguments;
        let state = seed;
        const random = () => (state = (state * 16807) % 2147483647) / 2147483647;
        const choose = (values) => values[Math.floor(random() * values.length)];
        const numbers = ["", "1", "2", "8", "64", "-5", "1e9"];
        const texts = ["", "a red house", "(x", "1.5 1.6 .9 .2", "7", "<b>", "🏠"];
        const change = (one, value) => {
            one.value = value;
            for (const name of ["input", "change"]) one.dispatchEvent(new Event(name, {bubbles: true}));
        };
        (async () => {
            for (let i = 0; i < 400; i++) {
                const controls = document.querySelectorAll("button, input:not([type=file]), select, textarea, summary");
                const one = choose([...controls]
                    .filter((one) => one.offsetParent && !one.disabled && one.textContent !== "Download"));
                if (one.matches("button, summary, [type=radio], [type=checkbox]")) one.click();
                else if (one.matches("select")) change(one, choose([...one.options]).value);
                else if (one.type === "range") change(one, Number(one.min) + random() * (one.max - one.min));
                else change(one, choose(one.type === "number" ? numbers : texts));
                const key = choose(["Escape", "Enter", "x"]);
                if (random() < .2) dispatchEvent(new KeyboardEvent("keydown", {key, ctrlKey: true}));
                await new Promise((resolve) => setTimeout(resolve, 20 * random()));
            }
            done();
        })()""",
        20261130,
    )
    assert until(lambda: not live.call("GET", "/api/status")[1]["running"])
    page.set("compare-what", "prompt")
    assert until(lambda: page.find("server").get_attribute("class") == "ready")


def test_a_controlnet_leads_the_picture_along_lines(page):
    if not page.find("modes").is_displayed():
        pytest.skip("there is no ControlNet in data/")
    page.use("lines")
    before = page.source("live-picture")
    page.stroke("sketch-lines", (-150, -150), (150, -150))
    assert until(lambda: page.source("live-picture") != before)
    job = page.sent()[-1]
    assert "input_image" not in job
    assert job["control"][0]["net"]
    dark = page.browser.execute_async_script(
        """const [url, done] = arguments, image = new Image();
        image.onload = () => {
            const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
            context.drawImage(image, 0, 0);
            done(context.getImageData(0, image.height - 1, 1, 1).data[0]);
        };
        image.src = url""",
        job["control"][0]["image"],
    )
    assert dark == 0  # paper is black, and lines are white
    page.find("watch").click()
    assert until(lambda: page.text("state").startswith("Drawn"))
    assert page.source("image") == page.source("live-picture")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_has_enough_contrast(page, colours):
    emulate(page.browser, 1280, 900, colours)
    pairs = page.script(
        """const colour = (one, name) => getComputedStyle(one)[name].match(/[\\d.]+/g).slice(0, 3).map(Number);
        const paper = colour(document.body, "backgroundColor");
        return [...document.querySelectorAll("h1, h2, a, label, .help, code, summary, .quiet, #submit, .piece, #count")]
            .filter((one) => one.offsetParent)
            .map((one) => [one.outerHTML.slice(0, 80), colour(one, "color"),
                one.matches("#submit, .piece") ? colour(one, "backgroundColor") : paper])"""
    )
    assert len(pairs) > 50
    assert (luminance(pairs[0][2]) < 0.05) == (colours == "dark")
    for element, text, paper in pairs:
        high, low = sorted((luminance(text), luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, element


def test_two_tabs_draw_at_once(page, live):
    first = page.browser.current_window_handle
    page.draw(seed=11, prompt="a red house")
    alone = page.source("image")
    page.browser.switch_to.new_window("tab")
    try:
        second = in_colours(opened(page.browser, live.port))
        second.set("seed", 12)
        second.find("submit").click()
        page.browser.switch_to.window(first)
        page.find("submit").click()
        assert until(lambda: page.text("state").startswith("Drawn"))
        assert page.source("image") == alone
        page.browser.switch_to.window(page.browser.window_handles[-1])
        assert until(lambda: second.text("state").startswith("Drawn"))
        assert second.source("image") != alone
    finally:
        page.browser.switch_to.window(page.browser.window_handles[-1])
        page.browser.close()
        page.browser.switch_to.window(first)


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("width", 7, "width should be"),
        ("steps-count", 1000, "Steps should be at most 150"),
        ("scale", 1e9, "Scale should be"),
        ("hires-scale", 9, "Enlarge should be"),
        ("freeu", "1.5 1.6", "FreeU should be four numbers"),
        ("freeu", "1.5 1.6 9 99", "FreeU.3 should be"),
        ("seed", "1" * 17, "The seed should be a whole number"),
        ("prompt", "a (red", "brackets in pairs"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(page, field, value, sentence):
    page.set(field, value)
    page.find("studio-title").click()
    page.press(Keys.CONTROL, Keys.ENTER)
    assert until(lambda: sentence in page.text("draw-error"))
    assert page.find("draw-error").get_attribute("role") == "alert"


def test_nothing_is_fetched_from_elsewhere(page):
    page.draw()
    assert foreign_requests(page) == []


def test_the_worker_dies_and_the_page_goes_on(page, live):
    page.set("steps-count", 150)
    page.find("submit").click()
    assert until(lambda: page.step() >= 1)
    for worker in live.workers():
        os.kill(worker, signal.SIGKILL)
    assert until(lambda: "has died" in page.text("draw-error"))
    assert until(lambda: page.find("server").get_attribute("class") == "ready")
    page.draw(steps_count=2)
    assert page.text("draw-error") == ""


def test_the_server_is_started_again_and_the_page_goes_on(browser):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Live("--port", port):
        page = in_colours(opened(browser, port))
        page.set("steps-count", 150)
        page.find("submit").click()
        assert until(lambda: page.step() >= 1)
    assert until(lambda: "does not answer" in page.text("server"))
    with Live("--port", port):
        assert until(lambda: page.find("server").get_attribute("class") == "ready")
        assert until(lambda: "lost" in page.text("draw-error") or "Cancelled" in page.text("state"))
        page.draw(steps_count=2)
        assert page.text("draw-error") == ""


def luminance(colour: list[float]) -> float:
    """The relative luminance of a colour, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
