"""The playground in a real browser, in short: a prompt becomes a picture, and a drawing another one.

`test_playground_browser.py` has the long version.
"""

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: see requirements-playground.txt")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: see requirements-playground.txt")

from tests.support.browser import foreign_requests, loaded, needs_chromium, playground_browser, until
from tests.support.playground import Live

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One server and one page for both tests. In the end, the console must be empty."""
    profile = tmp_path_factory.mktemp("profile")
    with Live() as server, playground_browser(profile) as browser, loaded(browser, server.port) as page:
        yield page


def test_a_prompt_becomes_a_picture_in_the_gallery(page):
    page.find("prompt").clear()
    page.find("prompt").send_keys("a red house at night")
    assert until(lambda: page.text("count") == "5 of 75 tokens")
    page.draw(steps_count=2)
    assert page.source("#shelf img") == page.source("image")
    assert page.source("image").startswith("data:image/png;base64,")
    assert page.find("#shelf img").get_attribute("alt") == "a red house at night"
    assert foreign_requests(page) == []


def test_the_picture_follows_a_line(page):
    before = page.source("live-picture")
    lines = page.find("sketch-lines").is_displayed()  # there is a ControlNet
    page.stroke("sketch-lines" if lines else "sketch-shapes", (-150, -100), (0, 0), (150, -100))
    assert until(lambda: page.source("live-picture") != before)
    assert page.text("live-error") == ""
