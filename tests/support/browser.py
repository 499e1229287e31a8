"""Headless Chromium, driven by selenium; and in it the playground's page: what a reader does, and what it shows."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: see requirements-dev.txt")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402, F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not both on the PATH"
)
SWITCHES = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
REFUSED = ("the server responded with a status of", "net::ERR_CONNECTION_REFUSED")  # Chromium's notes on refusals


class Page:
    """The page in a browser."""

    def __init__(self, browser):
        self.browser = browser
        self.script = browser.execute_script

    def find(self, name: str):
        return self.browser.find_element("css selector", f"#{name}" if re.fullmatch(r"[\w-]+", name) else name)

    def find_all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def text(self, name: str) -> str:
        return self.find(name).text

    def source(self, name: str) -> str:
        return self.find(name).get_attribute("src") or ""

    def set(self, name: str, value: object) -> None:
        """Sets a field as a reader would: with the events that follow."""
        self.script(
            """const [name, value] = arguments, field = document.getElementById(name);
            field.value = value;
            for (const event of ["input", "change"]) field.dispatchEvent(new Event(event, {bubbles: true}))""",
            name,
            value,
        )

    def press(self, *keys: str) -> None:
        chain = ActionChains(self.browser)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def hover(self, element) -> None:
        ActionChains(self.browser).move_to_element(element).perform()

    def stroke(self, name: str, *points: tuple[int, int]) -> None:
        """Draws on a canvas. The points are seen from its centre, in pixels of the screen."""
        canvas = self.find(name)
        self.script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        chain = ActionChains(self.browser, duration=50).move_to_element_with_offset(canvas, *points[0]).click_and_hold()
        for (x, y), (before_x, before_y) in zip(points[1:], points):
            chain.move_by_offset(x - before_x, y - before_y)
        chain.release().perform()

    def touch(self, name: str, *moments: list[tuple[int, int]]) -> None:
        """Moves fingers over an element. Each moment has a point for each finger, as seen from the element's centre.

        Without a moment, it only scrolls the element into view.
        """
        box = self.script(
            "arguments[0].scrollIntoView({block: 'center'}); return arguments[0].getBoundingClientRect().toJSON()",
            self.find(name),
        )
        x, y, before = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, 0
        for points in [*moments, []] if moments else []:
            kind = "touchEnd" if not points else "touchStart" if len(points) > before else "touchMove"
            fingers = [{"x": x + right, "y": y + down, "id": i} for i, (right, down) in enumerate(points)]
            self.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
            before = len(points)

    def drop(self, name: str, url: str, file: str = "dropped.png") -> None:
        """Drops a file onto an element."""
        self.script(
            """const [name, url, file] = arguments;
            const bytes = Uint8Array.from(atob(url.split(",")[1]), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], file, {type: url.slice(5, url.indexOf(";"))}));
            document.getElementById(name).dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}))""",
            name,
            url,
            file,
        )

    def sent(self) -> list[dict]:
        """The jobs that the page has asked for since it was loaded."""
        return self.script("return window.sent.map((text) => JSON.parse(text))")

    def drawings(self) -> list[str]:
        """The coloured drawings among the jobs."""
        return [job["input_image"] for job in self.sent() if "input_image" in job]

    def use(self, mode: str) -> None:
        """Draws in colours or in lines, and waits for the picture."""
        before = self.source("live-picture")
        self.script("document.querySelector(`[name=mode][value=${arguments[0]}]`).click()", mode)
        assert until(lambda: self.source("live-picture") != before)

    def step(self) -> int:
        """The step that is shown, 0 before the first."""
        number = self.text("now").partition(" of ")[0]
        return int(number) if number.isdecimal() else 0

    def draw(self, **fields: object) -> None:
        """Draws a picture and waits until it is finished."""
        for name, value in fields.items():
            self.set(name.replace("_", "-"), value)
        self.find("submit").click()
        assert until(lambda: self.text("state").startswith("Drawn in")), self.text("draw-error")


def until(happened: Callable[[], object], seconds: float = 120) -> object:
    """What it gives once that is true, or a last time after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := happened()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser whose own files are in `profile`."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in [*SWITCHES.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


@contextmanager
def playground_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """The same, which notes what the playground's page asks for, and when its two pictures change."""
    source = """window.sent = []; window.shown = []; window.states = [];
        const fetched = window.fetch;
        window.fetch = (path, options) => {
            if (path === "/api/jobs") { window.sent.push(options.body); }
            return fetched(path, options);
        };
        const watch = (id, act) => addEventListener("DOMContentLoaded", () => {
            const image = document.getElementById(id);  // not on the pages of source files
            if (image) new MutationObserver(act).observe(image, {attributeFilter: ["src"]});
        });
        watch("live-picture", () => window.shown.push(window.sent.length));
        watch("image", () => window.states.push(document.getElementById("state").textContent))"""
    with chromium(profile) as browser:  # before any script of the page
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        yield browser


def emulate(browser, width, height, colours="light", touch=False):
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    media = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@contextmanager
def loaded(browser, port: int) -> Iterator[Page]:
    """The page, freshly loaded, wide and light, with its first picture; afterwards the console must be empty."""
    emulate(browser, 1280, 900)
    browser.get_log("browser")
    yield opened(browser, port)
    noted = [entry for entry in browser.get_log("browser") if not any(known in entry["message"] for known in REFUSED)]
    assert noted == [], noted  # said, because pytest explains only the assertions of test files


def opened(browser, port: int) -> Page:
    """The page with its first picture."""
    browser.get(f"http://127.0.0.1:{port}/")
    page = Page(browser)
    assert until(lambda: page.source("live-picture"), 300)  # the model may still be being loaded
    return page


def in_colours(page: Page) -> Page:
    """The page with coloured shapes to draw, which need no ControlNet, and few steps."""
    if page.find("modes").is_displayed():  # there is a ControlNet, so the page has begun with lines
        page.use("shapes")
    page.set("steps-count", 3)
    return page


def foreign_requests(page: Page) -> list[str]:
    """The addresses on other hosts that the browser has asked for since this was last looked at."""
    asked = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 20
    return [url for url in urls if not url.startswith((page.browser.current_url.split("#")[0], "data:", "chrome"))]
