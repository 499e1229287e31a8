"""scripts/sample.py on one rank: files of prompts -> pictures and a manifest. Several: test_sample_ranks.py."""

import json
import os
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import sample
from scripts.support import batches, manifest, prompts_files
from scripts.support.batches import draw, make_batches
from scripts.support.prompts_files import Item, read_items
from sd import load_models, pipeline
from sd.request import Request
from sd.runtime.not_finite import NotFiniteError
from tests.scripts.test_demo_lora import write as write_lora

QUICK = ["--steps", "2", "--width", "32", "--height", "40", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def models(demo_checkpoint):
    return load_models(demo_checkpoint, "cpu", torch.float32)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, demo_checkpoint, models):
    """Runs sample.py in an empty folder. Returns the exit code and the lines on standard error."""
    monkeypatch.chdir(tmp_path)
    load = sample.load
    same = {"device": "cpu", "dtype": "fp32", "checkpoint": demo_checkpoint, "lora": None}

    def load_once(options, device):
        return models if vars(options).items() >= same.items() else load(options, device)

    monkeypatch.setattr(sample, "load", load_once)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # back after the test

    def run(*arguments):
        code = sample.main([*QUICK, "--checkpoint", str(demo_checkpoint), *map(str, arguments)])
        err = capsys.readouterr().err
        return code, [line.removeprefix("sample.py: ") for line in err.splitlines() if line.startswith("sample.py: ")]

    return run


def write(name, *lines):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return name


def records(folder):
    with open(os.path.join(folder, "manifest.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name.endswith(".png")}


def test_a_text_file(run, tmp_path, models):
    write("p.txt", "a red house", "# a comment", "", "a {cat|dog} :)", "a [red:blue:0.5] tree")
    code, lines = run("--prompts", "p.txt", "--out", "o", "--seed", 7, "--negative", "fog")
    assert (code, len(lines)) == (0, 1)
    assert lines[0].startswith("[red:blue:0.5] is read as text")
    found = records("o")
    assert [(one["index"], one["line"], one["seed"]) for one in found] == [(0, 1, 7), (1, 4, 8), (2, 4, 9), (3, 5, 10)]
    assert [one["prompt"] for one in found] == ["a red house", "a cat :)", "a dog :)", "a [red:blue:0.5] tree"]
    assert [one["file"] for one in found] == sorted(contents(tmp_path / "o"))
    assert found[1]["file"] == "00001-s8.png"
    assert all(0 < one["seconds"] < 60 for one in found)
    assert sorted(name for name in os.listdir("o") if not name.endswith(".png")) == ["job.json", "manifest.jsonl"]
    for one in found:
        with Image.open(f"o/{one['file']}") as image:
            assert image.text["parameters"] == one["parameters"]
    assert found[0]["parameters"].startswith(
        "a red house\nNegative prompt: fog\nSteps: 2, Sampler: DPM++ 2M, CFG scale: "
    )
    request = Request("a red house", "fog", seed=7, n_inference_steps=2, width=32, height=40)
    assert np.array_equal(pixels("o/00000-s7.png"), pipeline.draw(request, models)[0])


def write_rows_and_objects(folder):
    """The same three pictures in p.csv and p.jsonl, one with a LoRA."""
    lora = str(write_lora(folder / "style.safetensors"))
    write(
        folder / "p.csv",
        "prompt,seed,width,sampler_name,cfg_scale,lora",
        '"a house, red",5,48,euler_a,3,',
        f"a cat,,,,,{lora}:0.5",
        '"two\nlines",9,,ddim,,',
    )
    first = {"prompt": "a house, red", "seed": 5, "width": 48, "sampler_name": "euler_a", "cfg_scale": 3.0}
    others = {"prompt": "a cat", "loras": [[lora, 0.5]]}, {"prompt": "two\nlines", "seed": 9, "sampler_name": "ddim"}
    write(folder / "p.jsonl", *map(json.dumps, (first, *others)))


def test_rows_and_objects_give_the_same_requests(tmp_path):
    write_rows_and_objects(tmp_path)
    common = {"width": 32, "cfg_scale": 7.0}
    rows, objects = (read_items(tmp_path / name, common, seed=100).items for name in ("p.csv", "p.jsonl"))
    assert rows == [replace(item, line=row.line) for item, row in zip(objects, rows)]
    assert [row.line for row in rows] == [2, 3, 4]
    requests = [row.request for row in rows]
    assert requests[0] == Request("a house, red", seed=5, width=48, sampler_name="euler_a", cfg_scale=3.0)
    assert requests[1] == Request("a cat", seed=101, width=32, cfg_scale=7.0)
    assert requests[2] == Request("two\nlines", seed=9, width=32, sampler_name="ddim", cfg_scale=7.0)
    assert [row.loras for row in rows] == [(), ((tmp_path / "style.safetensors", 0.5, 0.5),), ()]


@pytest.mark.slow
def test_loras_of_a_line_and_of_all(run, tmp_path):
    write_rows_and_objects(tmp_path)
    style = write_lora(tmp_path / "other" / "detail.safetensors", seed=1)
    assert run("--prompts", "p.csv", "--out", "a") == (0, [])
    assert run("--prompts", "p.jsonl", "--out", "b") == (0, [])
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    for one, other in zip(records("a"), records("b")):
        assert one | {"seconds": 0, "line": 0} == other | {"seconds": 0, "line": 0}
        assert np.array_equal(pixels(f"a/{one['file']}"), pixels(f"b/{one['file']}"))
    assert records("a")[1]["parameters"].startswith("a cat <lora:style:0.5>")
    assert run("--prompts", "p.csv", "--out", "c", "--lora", f"{style}:0.3") == (0, [])
    both = records("c")
    assert both[0]["parameters"].startswith("a house, red <lora:detail:0.3>")
    assert both[1]["parameters"].startswith("a cat <lora:detail:0.3> <lora:style:0.5>")
    for one in both:
        assert not np.array_equal(pixels(f"a/{one['file']}"), pixels(f"c/{one['file']}"))


def test_lines_of_equal_settings_share_batches(models):
    small, large = (Request("a", seed=1, width=side) for side in (32, 48))
    items = [Item(i, i, "a", i, large if i in (1, 4) else replace(small, seed=9 - i)) for i in range(6)]
    items += [Item(6, 6, "a", 0, error="bad"), Item(7, 7, "a", 0, small, loras=(("style.pt", 1, 1),))]
    masked = replace(small, input_image=Image.new("RGB", (32, 32)), mask_image=Image.new("L", (32, 32)))
    items += [Item(8, 8, "a", 0, masked), Item(9, 9, "a", 0, masked)]
    made = make_batches(items, 3, models)
    assert [[item.index for item in batch] for batch in made] == [[0, 2, 3], [5], [1, 4], [7], [8], [9]]


@pytest.mark.parametrize("settings", [{"sampler_name": "euler_a"}, {"hires_scale": 1.5}, {"strength": 0.6}])
def test_a_batch_is_what_each_request_gives_alone(models, settings):
    rng = np.random.default_rng(0)
    requests = []
    for prompt, seed in [("a red house", 5), ("a very long " * 50, 123456), ("", 5)]:
        image = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8) if "strength" in settings else None
        size = {"width": 32, "height": 40, "n_inference_steps": 3}
        requests.append(Request(prompt, f"not {prompt}", image, seed=seed, **size, **settings))
    together = draw(requests, models).astype(int)
    for request, image in zip(requests, together):
        assert np.abs(pipeline.draw(request, models)[0] - image).max() <= 1
    assert np.array_equal(draw(requests, models), together)


def test_batches_change_a_picture_by_one_level_at_most(run):
    write("p.txt", *(f"a house with {'many ' * i}windows" for i in range(5)))
    assert run("--prompts", "p.txt", "--out", "a") == (0, [])
    assert run("--prompts", "p.txt", "--out", "b", "--batch", 3) == (0, [])
    for one in records("a"):
        assert np.abs(pixels(f"a/{one['file']}") - pixels(f"b/{one['file']}")).max() <= 1


def test_a_second_run_makes_what_is_missing(run, tmp_path):
    write("p.txt", *(f"house {i}" for i in range(7)))
    command = ["--prompts", "p.txt", "--out", "o", "--batch", 3]
    assert run(*command) == (0, [])
    before, listed = contents(tmp_path / "o"), records("o")
    (tmp_path / "o" / "00001-s1.png").unlink()
    whole = (tmp_path / "o" / "00003-s3.png").read_bytes()
    (tmp_path / "o" / "00003-s3.png").write_bytes(whole[:-1])
    (tmp_path / "o" / "00006-s6.png").write_bytes(b"")
    (tmp_path / "o" / "manifest.jsonl").unlink()
    with open(tmp_path / "o" / "manifest-0.jsonl", "ab") as file:  # as a killed rank leaves it: its last line is cut
        file.write(b"".join(json.dumps(one).encode() + b"\n" for one in listed)[:-9])
    times = {name: os.stat(tmp_path / "o" / name).st_mtime_ns for name in before if name[4] in "0245"}
    assert run(*command) == (0, [])
    assert contents(tmp_path / "o") == before
    assert {name: os.stat(tmp_path / "o" / name).st_mtime_ns for name in times} == times
    again = records("o")
    assert [one | {"seconds": 0} for one in again] == [one | {"seconds": 0} for one in listed]
    assert all(again[i] == listed[i] for i in (0, 2, 4, 5))
    assert run(*command) == (0, [])
    assert records("o") == again


def test_pictures_whose_lines_are_lost_are_listed(run, tmp_path):
    write("p.txt", "a house", "a cat")
    assert run("--prompts", "p.txt", "--out", "o") == (0, [])
    listed = records("o")
    (tmp_path / "o" / "manifest.jsonl").unlink()
    assert run("--prompts", "p.txt", "--out", "o") == (0, [])
    assert records("o") == [one | {"seconds": None} for one in listed]


def test_another_job_is_refused(run, tmp_path):
    write("p.txt", "a house", "a cat")
    assert run("--prompts", "p.txt", "--out", "o") == (0, [])
    before = contents(tmp_path / "o")
    code, lines = run("--prompts", "p.txt", "--out", "o", "--cfg-scale", 3)
    wrong = (
        "--out should be the folder of the same job: --cfg-scale was not given in o and is 3.0; choose another folder."
    )
    assert (code, lines) == (2, [wrong])
    write("p.txt", "a house", "a dog")
    code, lines = run("--prompts", "p.txt", "--out", "o")
    assert (code, len(lines)) == (2, 1)
    assert "the content of --prompts was" in lines[0]
    assert contents(tmp_path / "o") == before
    (tmp_path / "other").mkdir()
    write("other/notes.txt", "mine")
    wrong = "--out should be a new folder, or one of an earlier run: other contains notes.txt."
    assert run("--prompts", "p.txt", "--out", "other") == (2, [wrong])
    assert os.listdir("other") == ["notes.txt"]
    (tmp_path / "o" / "job.json").write_text("{")
    code, lines = run("--prompts", "p.txt", "--out", "o")
    assert (code, len(lines)) == (2, 1)
    assert "job.json is damaged" in lines[0]


def test_nothing_is_claimed_for_a_model_that_does_not_load(run, tmp_path):
    write("p.txt", "a house")
    write("model.ckpt", "no checkpoint")
    code, lines = run("--prompts", "p.txt", "--out", "o", "--checkpoint", "model.ckpt")
    assert (code, len(lines), os.listdir("o")) == (2, 1, [])
    assert run("--prompts", "p.txt", "--out", "o") == (0, [])  # with the right one


def test_bad_prompts_are_recorded_and_stop_nothing(run, tmp_path):
    lines = [
        {"prompt": "a house"},
        {"prompt": "a (house"},
        {"prompt": "a house", "width": 33},
        {"prompt": "a house", "cfg_scale": float("nan")},
        {"prompt": "a house", "loras": [["style.safetensors", 0.5]]},
        {"prompt": "a <lora:nowhere:1> house"},
        {"prompt": ["a", "b"]},
        {"prompt": "a house", "seed": "seven"},
        {"seed": 3},
        {"prompt": "a cat"},
    ]
    write("p.jsonl", *map(json.dumps, lines))
    code, said = run("--prompts", "p.jsonl", "--out", "o", "--batch", 2)
    assert (code, said) == (2, ["8 of 10 pictures failed: o/manifest.jsonl says why."])
    found = records("o")
    assert [one["index"] for one in found] == list(range(10))
    assert (
        [one["file"] for one in found if one["file"]]
        == ["00000-s0.png", "00009-s9.png"]
        == sorted(contents(tmp_path / "o"))
    )
    errors = [one.get("error", "") for one in found]
    assert errors[1].startswith("prompt should have its brackets in pairs")
    assert errors[2] == "width should be a multiple of 8 pixels, not 33."
    assert errors[3] == "cfg_scale should be a number; 1 to 14 is usual, not nan."
    assert errors[4] == "loras should be files: there is none at style.safetensors."
    assert errors[5].startswith("<lora:nowhere:1> should name a file: there is no 'nowhere' in ")
    assert errors[6] == "prompt should be one text, not ['a', 'b']."
    assert errors[7].startswith("seed should be a whole number")
    assert errors[8] == "prompt should be given, not None."
    write_lora(tmp_path / "style.safetensors")
    code, said = run("--prompts", "p.jsonl", "--out", "o", "--batch", 2)
    assert (code, said) == (2, ["7 of 10 pictures failed: o/manifest.jsonl says why."])
    assert "error" not in records("o")[4]


def test_a_picture_that_fails_while_it_is_drawn(run, tmp_path, monkeypatch):
    def fragile(requests, models):
        if any("bad" in request.prompt for request in requests):
            raise NotFiniteError("The U-Net was given NaN or infinity.")
        return draw(requests, models)

    monkeypatch.setattr(batches, "draw", fragile)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no LoRA")
    write("p.csv", "prompt,lora", "a house,", "a bad cat,", "a tree,", f"a dog,{damaged}")
    code, said = run("--prompts", "p.csv", "--out", "o", "--batch", 4)
    assert (code, said) == (2, ["2 of 4 pictures failed: o/manifest.jsonl says why."])
    found = records("o")
    assert found[1]["error"] == "The U-Net was given NaN or infinity."
    assert "damaged.safetensors" in found[3]["error"]
    assert [one["file"] for one in found] == ["00000-s0.png", None, "00002-s2.png", None]


def test_a_full_disk_stops_the_run(run, monkeypatch):
    def full(*arguments, **more):
        raise OSError("o/00000-s0.png cannot be written (No space left on device).")

    monkeypatch.setattr(manifest, "write_png", full)
    write("p.txt", "a house", "a cat")
    assert run("--prompts", "p.txt", "--out", "o") == (
        2,
        ["o/00000-s0.png cannot be written (No space left on device)."],
    )


BROKEN = {
    "p.md": (b"a house", "--prompts should be a .txt, .csv or .jsonl file, not p.md."),
    "utf.txt": (b"a\n\xff\xfe", "--prompts should be text in UTF-8: utf.txt, line 2, is not."),
    "empty.txt": (b"# none\n", "--prompts should have a prompt in each line: empty.txt has none."),
    "header.csv": (b"prompt,sead\na,1\n", "--prompts should have columns named prompt, uncond_prompt, sampler_name, "),
    "semicolons.csv": (b"prompt;seed\na;1\n", ", lora: semicolons.csv, line 1, has 'prompt;seed'."),
    "twice.csv": (
        b"prompt,seed,seed\na,1,1\n",
        "--prompts should have each column once: twice.csv, line 1, has seed twice.",
    ),
    "none.csv": (b"seed\n1\n", "--prompts should have a column named prompt: none.csv, line 1, has none."),
    "cells.csv": (
        b'prompt,seed\n"a\nb",1\n\na,b,1\n',
        "--prompts should have 2 cells in each row, as in its header: cells.csv, line 5, has 3.",
    ),
    "quotes.csv": (
        b'prompt\na\n"b',
        "--prompts should have rows of comma-separated values: quotes.csv, line 3, is broken",
    ),
    "json.jsonl": (b'{"prompt": "a"}\n\n{"prompt": "a"', "a JSON object in each line: json.jsonl, line 3, is broken ("),
    "deep.jsonl": (b"[" * 100000, "--prompts should have a JSON object in each line: deep.jsonl, line 1, is "),
    "list.jsonl": (b"[1]", "--prompts should have a JSON object in each line: list.jsonl, line 1, has a list."),
    "name.jsonl": (b'{"prompt": "a", "cfg": 1}', "name.jsonl, line 1, has 'cfg'."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file(run, name):
    content, wrong = BROKEN[name]
    with open(name, "wb") as file:
        file.write(content)
    code, lines = run("--prompts", name, "--out", "o")
    assert (code, len(lines)) == (2, 1)
    assert wrong in lines[0]
    assert not os.path.exists("o")


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--steps", "0"], "--steps should be a whole number from 1 to 1000, not 0."),
        (["--sampler", "best"], "--sampler should be one of "),
        (["--seed", "-1"], "--seed should be a whole number from 0 to "),
        (["--batch", "0"], "--batch should be above 0, not 0."),
        (["--wait", "nan"], "--wait should be above 0, not nan."),
        (["--lora", "none.safetensors"], "--lora should be FILE, FILE:STRENGTH or FILE:UNET:TEXT: "),
        (["--device", "abacus"], "--device should be one that torch can use here"),
        (["--checkpoint", "none.ckpt"], "none.ckpt"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--out", "p.txt/o"], "--out should be given once, not twice."),
    ],
)
def test_bad_flags(run, flags, wrong):
    write("p.txt", "a house")
    code, lines = run("--prompts", "p.txt", "--out", "o", *flags)
    assert (code, len(lines)) == (2, 1)
    assert wrong in lines[0]
    assert not os.path.exists("o") or os.listdir("o") == []


def test_folders_that_cannot_be_written_to(run, tmp_path):
    write("p.txt", "a house")
    wrong = "--out should be a folder, but p.txt/o is a file, or is inside one."
    assert run("--prompts", "p.txt", "--out", "p.txt/o") == (2, [wrong])
    wrong = "--prompts none.txt cannot be read (No such file or directory)."
    assert run("--prompts", "none.txt", "--out", "o") == (2, [wrong])
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        code, lines = run("--prompts", "p.txt", "--out", "locked")
        assert (code, lines) == (2, ["--out locked cannot be written to (Permission denied)."])


def test_many_pictures_go_into_folders_of_1000(tmp_path):
    item = Item(1234, 1, "a", 7)
    folder = manifest.Folder(tmp_path, [item], 0, lambda item: "")
    assert folder.name(item) == "01234-s7.png"
    folder.items = [item] * 1001
    assert folder.name(item) == "0001/01234-s7.png"
    assert not folder.has(item)
    folder.write(item, np.zeros((8, 8, 3), np.uint8), 1.0)
    assert folder.has(item)


def test_shards(run, tmp_path):
    write("p.txt", "a house", "a (cat", "a tree", "a dog", "日本")
    code, lines = run("--prompts", "p.txt", "--out", "o", "--shards", 3)
    assert (code, lines) == (2, ["1 of 5 pictures failed: o/manifest.jsonl says why."])
    assert sorted(os.listdir("o/shards")) == ["00000.tar", "00001.tar"]
    read = {}
    for name in ("00000.tar", "00001.tar"):
        with tarfile.open(f"o/shards/{name}") as tar:
            read[name] = {member.name: tar.extractfile(member).read() for member in tar}
    assert [name for names in read.values() for name in names] == [
        name for key in ("00000-s0", "00002-s2", "00003-s3", "00004-s4") for name in (f"{key}.png", f"{key}.json")
    ]
    assert len(read["00000.tar"]) == 6
    run("--prompts", "p.txt", "--out", "o", "--shards", 4)
    assert os.listdir("o/shards") == ["00000.tar"]  # no picture is in two of them
    run("--prompts", "p.txt", "--out", "o", "--shards", 3)
    made = contents(tmp_path / "o")
    for one in records("o"):
        if one["file"]:
            shard = read["00001.tar"] if one["index"] == 4 else read["00000.tar"]
            assert shard[one["file"]] == made[one["file"]]
            assert json.loads(shard[one["file"].replace(".png", ".json")]) == one


def test_too_many_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_files, "MAX_PICTURES", 3)
    write(tmp_path / "p.txt", "a {red|blue|green|black} house")
    with pytest.raises(ValueError, match=r"at most 3 pictures: .*p\.txt has more; split it"):
        read_items(tmp_path / "p.txt", {})


def test_ctrl_c(run, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "draw", pressed)
    write("p.txt", "a house")
    line = "interrupted; run the same command again to make the missing pictures."
    assert run("--prompts", "p.txt", "--out", "o") == (130, [line])
