"""Makes reports for the tests, and parses their HTML."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from sd.inside import recording
from sd.inside.film import frames
from sd.inside.recording import record
from sd.inside.report import report
from sd.inside.tracer import Tracer
from sd.request import Request

OPTIONS = {"seed": 3, "n_inference_steps": 3, "height": 32, "width": 40}
RED = Image.new("RGB", (40, 32), "red")
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Parses a page. Fails if its elements are not properly nested."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}  # by the element that contains them
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            for tag in set(self.open):
                self.texts.setdefault(tag, []).append(text)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def one(self, **wanted: str) -> dict[str, str]:
        (found,) = (a for _, a in self.elements if wanted.items() <= a.items())
        return found

    @property
    def data(self) -> dict:
        return json.loads(self.texts["script"][0])


def make(models, prompt="a red cat", uncond_prompt="", **more) -> tuple[recording.Recording, str]:
    with Tracer(models, attention=True) as trace:
        recorded = record(Request(prompt, uncond_prompt, **OPTIONS | more), models)
    settings = {"Prompt": prompt, "Seed": "3"}
    return recorded, report(recorded, frames(recorded), trace, settings, f"demo.py '{prompt}'")


def pixels(uri: str) -> np.ndarray:
    head, _, body = uri.partition(";base64,")
    assert head in ("data:image/png", "data:image/webp")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body, validate=True))))
