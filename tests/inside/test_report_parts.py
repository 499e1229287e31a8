"""The parts of a report: tokens and their maps, images within a budget, an atomic write."""

import base64
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sd.inside.recording import record
from sd.inside.report import write_report
from sd.inside.report.figures import schedule_svg
from sd.inside.report.pictures import encode, encode_exactly, encode_maps
from sd.inside.report.tokens import tokens_of
from sd.inside.tracer import Tracer
from sd.request import Request
from tests.support.synthetic import MICRO, random_models

OPTIONS = {"seed": 3, "n_inference_steps": 1, "height": 32, "width": 40}


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(";base64,")[2], validate=True))))


def test_tokens(models):
    prompt = "a (red:1.5) antidisestablishmentarianism 🦊"
    with Tracer(models, attention=True) as trace:
        record(Request(prompt, **OPTIONS), models)
    tokens = tokens_of(models, prompt, trace)
    assert [token.text for token in tokens[:3]] == ["start", "a", "red"]
    assert tokens[-1].text == "end"
    assert [token.weight for token in tokens[:3]] == [1, 1, 1.5]
    word = [token for token in tokens[3:-1] if token.text.isalpha() and token.text.islower()]
    assert "".join(token.text for token in word) == "antidisestablishmentarianism"
    assert [token.joined for token in word] == [False] + [True] * (len(word) - 1)
    assert sum(token.share for token in tokens) == pytest.approx(1, abs=1e-4)
    for token in tokens:
        assert token.map.shape == (4, 5)
        assert (token.map.min(), token.map.max()) == (0, 1)
    assert torch.equal(tokens[2].map.argmax(), F.avg_pool2d(trace.token_map(2)[None], 8).argmax())


@pytest.mark.filterwarnings("ignore:uncond_prompt has no effect")
def test_the_shares_of_tokens_are_those_of_all_their_repetitions(models):
    prompt, shares = "a red cat", []
    for negative in ("", "a BREAK b BREAK c"):
        with Tracer(models, attention=True) as trace:
            record(Request(prompt, negative, cfg_scale=1, **OPTIONS), models)  # without guidance
        tokens = tokens_of(models, prompt, trace)
        assert [token.text for token in tokens] == ["start", "a", "red", "cat", "end"]
        shares.append([token.share for token in tokens])
        assert sum(shares[-1]) == pytest.approx(1, abs=1e-4)
    assert trace.tokens == 231
    assert shares[1] == pytest.approx(shares[0], rel=1e-3)


def test_bytes_that_are_no_text_are_in_hex(models):
    with Tracer(models, attention=True) as trace:
        record(Request("𓂀", **OPTIONS), models)
    texts = [token.text for token in tokens_of(models, "𓂀", trace)[1:-1]]
    assert bytes.fromhex("".join(texts)).decode() == "𓂀"


def test_curves_are_shares_and_not_variances():
    svg = schedule_svg([0.64, 0.36, 0])  # of timesteps 0, 1 and 2
    drawn = dict(re.findall(r'class="(\w+)" d="([^"]+)"', svg))
    assert drawn["signal"] == "M0.00,100.00 L50.00,40.00 L100.00,20.00"  # 1 - 0, 1 - 0.6 and 1 - 0.8
    assert drawn["noise"] == "M0.00,0.00 L50.00,20.00 L100.00,40.00"  # 1 - 1, 1 - 0.8 and 1 - 0.6


def noise_picture(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_pictures_are_exact_where_they_fit():
    pictures = [noise_picture(seed) for seed in range(3)]
    uris, done = encode(pictures, 100_000)
    assert done == "exact"
    assert all(np.array_equal(pixels(uri), picture) for uri, picture in zip(uris, pictures))
    uris, done = encode(pictures, 20_000)
    assert done.startswith("WebP quality ")
    assert sum(len(uri) for uri in uris) < 20_000 * 4 / 3 + 100
    uris, done = encode([noise_picture(0, 300)], 100_000)
    assert re.fullmatch(r"at most 256 pixels wide and high, WebP quality (90|70|40)", done)
    assert pixels(uris[0]).shape == (256, 256, 3)
    assert encode([noise_picture(0, 300)], 1_000_000)[1] == "at most 256 pixels wide and high"
    assert encode_exactly(pictures[0], 100_000)[1] == "exact"
    assert encode_exactly(pictures[0], 10_000)[1] == "WebP quality 95"


def test_maps_are_opacities():
    values = torch.rand(8, 6)
    (uri,) = encode_maps([values], 100_000)
    grey, opacity = np.moveaxis(pixels(uri), -1, 0)
    assert (grey == 255).all()
    assert np.abs(opacity / 255 - values.numpy()).max() < 1 / 255
    assert pixels(encode_maps([torch.rand(64, 64)], 1000)[0]).shape == (16, 16, 2)


def test_existing_files_are_kept(tmp_path):
    path = tmp_path / "page.html"
    write_report(path, "one")
    with pytest.raises(FileExistsError, match=r"page.html exists already and is left as it is"):
        write_report(path, "two")
    assert path.read_text() == "one"
    write_report(path, "drei für 🦊", overwrite=True)
    assert path.read_text(encoding="utf-8") == "drei für 🦊"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
