"""Reports in a real browser: the slider, tokens, keyboard, sizes and colours, and scripts that must not run."""

import json
import time

import numpy as np
import pytest

from sd.inside.film import frames
from sd.inside.recording import record
from sd.inside.report import report, write_report
from sd.inside.tracer import Tracer
from sd.request import Request
from tests.support.synthetic import MICRO, random_models

pytest.importorskip("selenium", reason="selenium is not installed: see requirements-dev.txt")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support.browser import chromium, emulate, needs_chromium, until

pytestmark = [pytest.mark.slow, needs_chromium]

PROMPT = (
    "a (red:1.3) cat, antidisestablishmentarianism <script>document.title='owned'</script><img src=x onerror=boo()>"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    models = random_models(MICRO)
    with Tracer(models, attention=True) as trace:
        recorded = record(Request(PROMPT, "a dog", seed=3, n_inference_steps=4, height=64, width=48), models)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report(recorded, frames(recorded), trace, {"Prompt": PROMPT}, "python " + "long " * 60))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    """The report, freshly loaded, wide and light; afterwards the console must be empty."""
    emulate(browser, 1280, 900)
    browser.get(address)
    ActionChains(browser).move_by_offset(0, 0).perform()
    yield browser
    assert browser.get_log("browser") == []


def state(page) -> dict:
    """What the page shows of the step."""
    return page.execute_script(
        """const source = Object.fromEntries([...document.querySelectorAll(".panels img")].map(i => [i.id, i.src]));
        return {source, now: document.getElementById("now").textContent,
            mark: parseFloat(document.getElementById("mark").style.left),
            dots: ["signal-dot", "noise-dot"].map(id => parseFloat(document.getElementById(id).style.top)),
            loaded: [...document.images].every(image => image.complete && image.naturalWidth > 0)}"""
    )


def lit(page) -> str | None:
    """The map that the coloured picture is seen through, None while the picture is as it is."""
    return page.execute_script(
        """const lit = document.getElementById("lit");
        return lit.hidden ? null : lit.style.maskImage.slice(5, -2)"""
    )


def data(page) -> dict:
    return json.loads(page.execute_script("return document.getElementById('data').textContent"))


def tokens(page) -> list:
    return page.find_elements(By.CLASS_NAME, "token")


def test_the_slider_moves_pictures_and_mark(page):
    slider, steps = page.find_element(By.ID, "step"), data(page)["steps"]
    assert slider.get_attribute("value") == "0"  # it opens at the first step
    for index, step in enumerate(steps):
        seen = state(page)
        names = ("expected", "latents", "uncond", "cond", "push")
        assert seen["source"] == {name: step[name] for name in names}
        assert seen["now"] == step["title"] == slider.get_attribute("aria-valuetext")
        assert seen["mark"] == pytest.approx(step["x"], abs=0.01)
        assert seen["dots"] == pytest.approx([100 - 100 * step["signal"], 100 - 100 * step["noise"]], abs=0.01)
        assert page.find_element(By.ID, "mixture").text == step["mixture"]
        slider.send_keys(Keys.ARROW_RIGHT)
        assert slider.get_attribute("value") == str(min(index + 1, len(steps) - 1))
    assert until(lambda: state(page)["loaded"])


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_play_shows_all_steps_and_stops_at_the_last(page, key):
    play, slider, titles = page.find_element(By.ID, "play"), page.find_element(By.ID, "step"), titles_shown(page)
    expected = [step["title"] for step in data(page)["steps"]]
    for _ in range(2):  # from the end, it starts again
        play.send_keys(key)
        assert (play.text, page.find_element(By.ID, "now").get_attribute("aria-live")) == ("Pause", "off")
        assert until(lambda: play.text == "Play")
        assert page.find_element(By.ID, "now").get_attribute("aria-live") is None
        assert state(page)["now"] == expected[-1] == slider.get_attribute("aria-valuetext")
        assert slider.get_attribute("value") == "3"
    time.sleep(1.2)  # twice the time of a step: it has stopped
    assert titles() == [*expected[1:], *expected]


def titles_shown(page):
    """A function that returns all titles that the page has shown since."""
    page.execute_script(
        """window.titles = [];
        new MutationObserver(() => window.titles.push(document.getElementById("now").textContent))
            .observe(document.getElementById("now"), {childList: true})"""
    )
    return lambda: page.execute_script("return window.titles")


@pytest.mark.parametrize("how", ["button", "slider"])
def test_playing_can_be_stopped(page, how):
    play, slider = page.find_element(By.ID, "play"), page.find_element(By.ID, "step")
    play.click()
    play.click() if how == "button" else slider.send_keys(Keys.ARROW_RIGHT)
    assert play.text == "Play"
    before = state(page)
    time.sleep(1.2)
    assert state(page) == before
    assert before["now"] != data(page)["steps"][-1]["title"]


def test_nothing_plays_for_readers_who_want_less_motion(page):
    assert page.find_element(By.ID, "play").is_displayed()
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert not page.find_element(By.ID, "play").is_displayed()
    page.find_element(By.ID, "step").send_keys(Keys.ARROW_RIGHT)  # the slider works as before
    assert state(page)["now"] == data(page)["steps"][1]["title"]


def test_without_scripts_the_middle_step_is_shown(page):
    page.find_element(By.ID, "step").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    before = state(page)
    mixture = page.find_element(By.ID, "mixture").text
    switch = lambda off: page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": off})  # noqa: E731
    switch(True)
    try:
        page.refresh()
        after = {name: page.find_element(By.ID, name) for name in ("now", "mixture", "mark", "signal-dot", "noise-dot")}
        assert (after["now"].text, after["mixture"].text) == (before["now"], mixture)
        lines = page.find_element(By.CLASS_NAME, "player").text.splitlines()
        assert lines[0].startswith("The slider needs JavaScript.")
        assert not page.find_element(By.ID, "play").is_displayed()
        for token in tokens(page):
            assert token.text.splitlines()[-1] in token.get_attribute("data-says")
        for name, wanted in zip(("signal-dot", "noise-dot"), before["dots"], strict=True):
            style = after[name].get_attribute("style")
            assert float(style.partition("top: ")[2].partition("%")[0]) == pytest.approx(wanted, abs=0.01)
        for name in ("mark", "signal-dot", "noise-dot"):
            left = after[name].get_attribute("style").partition("left: ")[2].partition("%")[0]
            assert float(left) == pytest.approx(before["mark"], abs=0.01)
    finally:
        switch(False)


def test_the_dots_lie_on_the_curves(page):
    slider = page.find_element(By.ID, "step")
    slider.send_keys(Keys.HOME)
    for _ in range(4):
        for curve, dot in (("signal", "signal-dot"), ("noise", "noise-dot")):
            dot = page.find_element(By.ID, dot)
            x, y = (float(dot.value_of_css_property(side).removesuffix("px")) for side in ("left", "top"))
            plot = page.find_element(By.CLASS_NAME, "plot").rect
            x, y = 100 * x / plot["width"], 100 * y / (plot["height"] - 1)
            points = page.find_element(By.CSS_SELECTOR, f"path.{curve}").get_attribute("d")[1:].split(" L")
            xs, ys = np.array([point.split(",") for point in points], dtype=float).T
            assert np.interp(x, xs, ys) == pytest.approx(y, abs=1)
        slider.send_keys(Keys.ARROW_RIGHT)


def test_a_token_lights_up_under_the_pointer(page):
    maps = data(page)["maps"]
    assert len(maps) == len(tokens(page))
    assert lit(page) is None
    for token, one in list(zip(tokens(page), maps))[:4]:
        ActionChains(page).move_to_element(token).perform()
        assert lit(page) == one
        assert token.get_attribute("data-says") == page.find_element(By.ID, "look").text
    ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert lit(page) is None


def test_a_chosen_token_stays_until_another_is(page):
    first, second = tokens(page)[1:3]
    maps = data(page)["maps"]
    away = page.find_element(By.TAG_NAME, "h1")
    for token, one in ((first, maps[1]), (second, maps[2])):
        token.click()
        ActionChains(page).move_to_element(away).perform()
        assert lit(page) == one
        assert [t.get_attribute("aria-pressed") for t in (first, second)].count("true") == 1
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert lit(page) is None


def test_by_keyboard_alone(page):
    maps = data(page)["maps"]
    press = lambda key: ActionChains(page).send_keys(key).perform()  # noqa: E731
    reached = []
    for _ in range(len(maps) + 8):
        press(Keys.TAB)
        active = page.switch_to.active_element
        assert active.value_of_css_property("outline-style") != "none"
        reached.append(active.get_attribute("id") or active.get_attribute("class") or active.tag_name)
        if active in tokens(page)[:3]:
            assert lit(page) == maps[tokens(page).index(active)]
            press(Keys.ENTER)
            assert active.get_attribute("aria-pressed") == "true"
            press(Keys.SPACE)
            assert active.get_attribute("aria-pressed") == "false"
    assert reached[0] == "skip-link"
    assert sum(name.startswith("token") for name in reached) == len(maps)
    assert {"step", "play", "wide", "summary", "command"} <= set(reached)
    assert lit(page) is None  # the focus has moved on


@pytest.mark.parametrize("width, height", [(320, 640), (390, 844), (844, 390), (1280, 900)])
def test_nothing_is_wider_than_the_screen(page, width, height):
    emulate(page, width, height, touch=width < 1000)
    page.refresh()
    page.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.execute_script("const root = document.documentElement; return root.scrollWidth <= root.clientWidth")
    small = [t.rect for t in tokens(page) if min(t.rect["height"], t.rect["width"]) < 24]
    assert small == []


def test_taps_light_up_a_token(page):
    emulate(page, 390, 844, touch=True)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.refresh()
        token = tokens(page)[2]
        page.execute_script("arguments[0].scrollIntoView({block: 'end'})", token)
        box = page.execute_script("const r = arguments[0].getBoundingClientRect(); return [r.x, r.y]", token)
        point = [{"x": box[0] + 8, "y": box[1] + 8}]
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": point})
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert until(lambda: lit(page) == data(page)["maps"][2])
        picture = page.execute_script("return document.getElementById('image').getBoundingClientRect().bottom")
        assert picture > 100  # it stays visible
    finally:
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def luminance(colour: str) -> float:
    """The relative luminance of a CSS colour, as WCAG 2 defines it."""
    channels = [float(x) / 255 for x in colour.partition("(")[2].strip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(page, colours):
    emulate(page, 1280, 900, colours)
    page.refresh()
    paper = luminance(page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
    assert (paper < 0.05) == (colours == "dark")
    for selector in ("h1", ".kicker", ".aside", "figcaption", "summary", "dt", "dd", "thead th", ".group", "#now"):
        text = luminance(page.find_element(By.CSS_SELECTOR, selector).value_of_css_property("color"))
        assert (max(text, paper) + 0.05) / (min(text, paper) + 0.05) >= 4.5, selector


def test_a_script_in_the_prompt_does_not_run_and_nothing_is_fetched(page):
    assert page.title.startswith("a (red:1.3) cat")
    assert "<script>document.title='owned'</script>" in page.find_element(By.TAG_NAME, "h1").text
    assert page.execute_script("return typeof b") == "undefined"
    assert len(page.find_elements(By.TAG_NAME, "script")) == 2
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert page.current_url in urls
    assert {url for url in urls if not url.startswith(("data:", "chrome:", "chrome-untrusted:"))} == {page.current_url}


def test_the_command_can_be_copied(page):
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    button = page.find_element(By.ID, "copy")
    button.click()
    assert until(lambda: button.text == "Copied")
    text = page.execute_async_script("navigator.clipboard.readText().then(arguments[0], arguments[0])")
    assert text == "python " + "long " * 60
