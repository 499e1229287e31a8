"""The files of the playground's page: nothing inline, nothing from elsewhere, and a sentence for every control."""

import re

from tests import ROOT

PAGE = ROOT / "scripts/playground/page"


def test_the_page_contains_no_script_no_style_and_no_address():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert re.findall("<script[^>]*>", page) == ['<script type="module" src="main.js">']
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", page)
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path.name


def test_the_page_names_files_that_exist():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    named = re.findall(r"<code>([^<]+)</code>", page)
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_control_says_what_it_does():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    controls = re.findall(r"<(?:input|select|textarea|button)\b[^>]*>", page)
    silent = [one for one in controls if not re.search(r'\stitle="|aria-label="|type="(?:radio|checkbox)"', one)]
    assert len(controls) > 35
    assert silent == []
    for name in re.findall(r'aria-describedby="([\w-]+)"', page):
        assert f'id="{name}"' in page
    ids = re.findall(r'\sid="([\w-]+)"', page)
    assert len(ids) == len(set(ids))
    for script in PAGE.glob("*.js"):
        asked = re.findall(r'\bat\("([\w-]+)"\)', script.read_text(encoding="utf-8"))
        assert set(asked) <= set(ids), script.name
