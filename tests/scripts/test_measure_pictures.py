"""scripts/measure_pictures.py with stand-ins that have the signatures of clean-fid 0.1.35 and torchmetrics 1.9.0."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from scripts import measure_pictures


@pytest.fixture
def pictures(tmp_path):
    """A folder as sample.py writes it: two pictures, and a third one that could not be drawn."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i, prompt in enumerate(["a red house", "a tent", "bad"]):
        name = None if prompt == "bad" else f"{i:05d}-s{i}.png"
        lines.append(json.dumps({"index": i, "file": name, "prompt": prompt}))
        if name:
            Image.new("RGB", (40 + i, 30), (200, i, 0)).save(folder / name)
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the packages. Returns what they were called with."""
    calls = []

    def compute_fid(fdir1=None, fdir2=None, gen=None, mode="clean", model_name="inception_v3", num_workers=12,
                    batch_size=32, device=None, dataset_name="FFHQ", dataset_res=1024, dataset_split="train",
                    num_gen=50_000, z_dim=512, custom_feat_extractor=None, verbose=True, custom_image_tranform=None,
                    custom_fn_resize=None, use_dataparallel=True):  # fmt: skip
        calls.append((fdir1, fdir2, mode, device.type))
        return 12.345

    class CLIPScore:
        def __init__(self, model_name_or_path="openai/clip-vit-large-patch14", **kwargs):
            self.model, self.processor = model_name_or_path()

        def to(self, device):
            return self

        def update(self, source, target):
            vectors = self.model.get_image_features(source), self.model.get_text_features(target, None)
            calls.append(([tuple(image.shape) for image in source], target, *vectors))

        def compute(self):
            return torch.tensor(30.5)

    class CLIPModel:
        @classmethod
        def from_pretrained(cls, name):
            if "/" not in name:
                raise OSError(f"{name} is not a folder.\nAnd much more.")
            return cls()

        def get_image_features(self, pixels):
            return SimpleNamespace(pooler_output="image vectors")  # as in transformers 5

        def get_text_features(self, ids, mask):
            return "text vectors"  # as in transformers 4

    fid = SimpleNamespace(compute_fid=compute_fid)
    monkeypatch.setattr(measure_pictures, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "cleanfid", SimpleNamespace(fid=fid))
    monkeypatch.setitem(sys.modules, "torchmetrics.multimodal.clip_score", SimpleNamespace(CLIPScore=CLIPScore))
    transformers = SimpleNamespace(CLIPModel=CLIPModel, CLIPProcessor=SimpleNamespace(from_pretrained=str))
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    return calls


def measure(*arguments):
    return measure_pictures.main([*map(str, arguments), "--device", "cpu"])


def test_both_numbers(pictures, packages, capsys):
    assert measure("--pictures", pictures, "--reference", pictures, "--batch", 1) == 0
    assert capsys.readouterr().out.splitlines() == [
        "FID 12.35, of 2 pictures and 2 references",
        "With fewer than 10,000 pictures, FID is too high: compare it only at equal numbers.",
        "CLIP score 30.50, of 2 pictures",
    ]
    assert packages == [
        (str(pictures), str(pictures), "clean", "cpu"),
        ([(3, 30, 40)], ["a red house"], "image vectors", "text vectors"),
        ([(3, 30, 41)], ["a tent"], "image vectors", "text vectors"),
    ]


def test_prompts_of_another_file(pictures, packages, tmp_path, capsys):
    (pictures / "manifest.jsonl").rename(tmp_path / "prompts.jsonl")
    assert measure("--pictures", pictures, "--prompts", tmp_path / "prompts.jsonl") == 0
    assert capsys.readouterr().out == "CLIP score 30.50, of 2 pictures\n"


@pytest.mark.parametrize(
    "missing, what",
    [
        ("cleanfid", "--reference needs the package clean-fid"),
        ("torchmetrics", "the CLIP score needs the package torchmetrics"),
        ("transformers", "the CLIP score needs the package transformers"),
    ],
)
def test_missing_packages_are_named_with_the_command(missing, what, pictures, packages, capsys, monkeypatch):
    monkeypatch.setattr(measure_pictures, "find_spec", lambda name: None if name == missing else name)
    assert measure("--pictures", pictures, "--reference", pictures) == 2
    assert capsys.readouterr().err == f"measure_pictures.py: {what}: pip install -r requirements-metrics.txt\n"
    assert packages == []


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--pictures", "{tmp}/none"], "--pictures should be a folder: there is none at {tmp}/none."),
        (["--pictures", "{tmp}"], "--reference should be given, or --prompts: there is no {tmp}/manifest.jsonl."),
        (
            ["--pictures", "{pictures}", "--reference", "{tmp}/one"],
            "--reference should be a folder with at least 2 pictures, not 1 as in {tmp}/one.",
        ),
        (
            ["--pictures", "{pictures}", "--prompts", "{tmp}/none.jsonl"],
            "--prompts should be a file: there is none at {tmp}/none.jsonl.",
        ),
        (
            ["--pictures", "{pictures}", "--prompts", "{tmp}/broken.jsonl"],
            'Line 2 of {tmp}/broken.jsonl should be an object with "file" and "prompt".',
        ),
        (
            ["--pictures", "{pictures}", "--prompts", "{tmp}/more.jsonl"],
            "{pictures} should have all pictures that {tmp}/more.jsonl lists: 9.png is missing.",
        ),
        (["--pictures", "{pictures}", "--clip", "x"], "--clip x cannot be loaded (x is not a folder)."),
    ],
)
def test_bad_input_is_one_sentence(arguments, reason, pictures, packages, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "1.png")
    (tmp_path / "broken.jsonl").write_text('\n["file"]\n')
    (tmp_path / "more.jsonl").write_text('{"file": "9.png", "prompt": "x"}')
    places = {"tmp": tmp_path, "pictures": pictures}
    assert measure(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"measure_pictures.py: {reason.format(**places)}"


def test_a_lack_of_network_is_one_sentence(pictures, packages, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(sys.modules["cleanfid"].fid, "compute_fid", offline)
    assert measure("--pictures", pictures, "--reference", pictures) == 2
    assert "clean-fid cannot fetch or read what it needs (<urlopen error" in capsys.readouterr().err
