"""The files of the playground's page: nothing inline, nothing from elsewhere, and a sentence for every control."""

import json
import re

from scripts.playground.sources import source_files, source_page
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


def test_links_to_the_source_open_what_they_name():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'<a href="source/([^"#]+)#?([^"]*)" target="_blank"><code>([^<]+)</code></a>', page)
    assert len(links) > 30
    assert page.count("<code>") == page.count('href="source/') == len(links)
    files = source_files()
    for path, part, shown in links:
        assert path == shown
        assert not part or f' id="{part}"' in source_page(path, files[path]), (path, part)


def test_source_files_are_a_fixed_list_and_never_html(tmp_path):
    files = source_files()
    assert {"sd/pipeline.py", "sd/samplers/euler.py", "scripts/notebooks/02_text.ipynb"} <= files.keys()
    assert all(name.startswith(("sd/", "scripts/")) and ".." not in name for name in files)
    path = tmp_path / "x.py"
    path.write_text("class A:\n    @staticmethod\n    def b():\n        return '<script>'\n\nx = 1\n")
    shown = source_page("x.py", path)
    assert '<span id="A"><i>   1</i>  class A:\n<span id="A.b"><i>   2</i>      @staticmethod' in shown
    assert "return &#x27;&lt;script&gt;&#x27;\n</span></span><i>   5</i>" in shown
    cells = [{"cell_type": "markdown", "source": ["<script>"], "id": "a"}, {"cell_type": "code", "source": []}]
    for text in ("def f(:\n  <script>", "\0", json.dumps({"cells": cells}), '{"cells": 1}', "[]"):
        for suffix in (".py", ".ipynb", ".js"):  # also one that someone is just editing
            path = tmp_path / f"y{suffix}"
            path.write_text(text)
            assert "<script" not in source_page(path.name, path)


def test_every_control_has_a_link_to_the_code_behind_it():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    controls = re.findall(r"<(?:input|select|textarea|button|canvas)\b[^>]*>", page)
    controls += re.findall(r'<[^>]* id="(?:palette|looked|stages)"[^>]*>', page)  # which main.js fills
    for control in controls:
        described = re.search(r' aria-describedby="([\w-]+)"', control)
        assert described, control
        sentence = re.search(rf'id="{described[1]}"[^>]*>(.*?)</p>', page, re.DOTALL)
        assert 'href="source/' in sentence[1], control


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
