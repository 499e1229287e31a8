"""The prompts of the demo: notation of other tools, missing quotes, dashes, and files of prompts."""

import os
import threading
from pathlib import Path

import pytest

from scripts.demo import parse
from tests.support.demo_results import names, prompt_and_seed


def said(err):
    """The lines of the demo itself."""
    return [
        line.removeprefix("demo.py: ") for line in err.replace("\r", "\n").split("\n") if line.startswith("demo.py")
    ]


@pytest.mark.parametrize(
    "prompt, drawn, lines",
    [
        ("a BREAK b", "a BREAK b", []),
        ("a house :)", r"a house :\)", []),
        (r"a \{red\} house", "a {red} house", []),
        (
            "a {red} house",
            "a red house",
            ["{red} is read as red, without its braces; \\{ is a brace, and {red|blue} are"],
        ),
        ("a [red|blue] house", r"a \[red|blue\] house", ["[red|blue] is read as text: "]),
        ("[red:blue:0.5] a", r"\[red:blue:0.5\] a", ["[red:blue:0.5] is read as text: "]),
        ("a AND b", "a AND b", ["AND is read as a word"]),
        ("<lora:x:1> a", "a", ["<lora:x:1> is left out"]),
        ("a AND b [c|d] AND [e|f]", r"a AND b \[c|d\] AND \[e|f\]", ["[c|d] is read as text", "AND is read as a word"]),
    ],
)
def test_notation_of_other_tools(run_demo, prompt, drawn, lines):
    code, _, err = run_demo(prompt, "--seed", 3)
    assert code == 0
    assert prompt_and_seed("picture.png") == (drawn, 3)
    assert len(said(err)) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said(err), lines))


def test_it_is_named_once_for_all_prompts_and_in_the_negative_prompt(run_demo):
    assert said(run_demo("a {b|c} AND d", "e AND f", "--steps", 1)[2]) == [
        "AND is read as a word: prompts are not combined."
    ]
    _, _, err = run_demo("a", "--negative", "[b|c] {d|e} :(", "--steps", 1)
    assert [line.partition(":")[0] for line in said(err)] == [
        "[b|c] is read as text",
        "{ } in --negative are read as text",
    ]


def test_the_tiny_model_is_not_asked_for_notation(monkeypatch, capsys):
    from scripts.support.checks import note_unknown_words

    note_unknown_words(["a red house BREAK at noon AND a blue tent"])
    assert capsys.readouterr().err == ""
    note_unknown_words(["a red zebra BREAK", "break"])
    assert "was not trained on zebra, break: " in capsys.readouterr().err


def test_missing_quotes(run_demo):
    line = '3 prompts were given, and each is drawn. For a single prompt, add quotes: "a red house".'
    assert line in said(run_demo("a", "red", "house")[2])
    assert said(run_demo("a cat", "dog")[2]) == []
    assert said(run_demo("cat")[2]) == []


def test_prompts_that_begin_with_a_dash():
    prompts = ["-a house", "b", "-hat on a table", "--red house"]
    assert parse([*prompts, "--steps", "3"]).prompts == prompts
    options = parse(["a", "--steps", "3", "--", "-house", "--seed", "-h"])
    assert (options.prompts, options.steps, options.seed) == (["a", "-house", "--seed", "-h"], 3, None)
    assert parse(["--", "--"]).prompts == ["--"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_prompts_from_a_file(run_demo, mark, end):
    lines = ["a {red|blue} cat", "", "# b", "  ein H\xe4uschen\x0b c "]
    Path("prompts.txt").write_bytes(mark + end.join(line.encode() for line in lines))
    assert run_demo("a", "--prompts-file", "prompts.txt", "--steps", 1, "--seed", 1)[0] == 0
    assert [
        prompt_and_seed(name)[0] for name in ("picture.png", "picture-2.png", "picture-3.png", "picture-4.png")
    ] == [
        "a",
        "a red cat",
        "a blue cat",
        "ein H\xe4uschen\x0b c",
    ]
    assert len(names()) == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_prompts_from_a_pipe(run_demo):
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_text, args=("a cat\na dog\n",))
    writer.start()
    assert run_demo("--prompts-file", "pipe", "--steps", 1)[0] == 0
    writer.join()
    assert [prompt_and_seed(name)[0] for name in ("picture.png", "picture-2.png")] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"a\n\n(b\n", "prompts.txt, line 3: prompt should have its brackets in pairs: nothing closes the '(' of '(b'"),
        (b"a\n{b", "prompts.txt, line 2: prompt should have its alternatives in single braces"),
        (b"a\r\nb\xe9\n", "--prompts-file should be text in UTF-8: prompts.txt, line 2, is not."),
        (b"\xff\xfea\0", "--prompts-file should be text in UTF-8: prompts.txt, line 1, is not."),
        ("a\nb".encode("utf-16-le"), "--prompts-file should be text in UTF-8: prompts.txt, line 1, is not."),
        (b"\n# a\n  \n", "--prompts-file should have a prompt in each line: prompts.txt has none."),
        (b"", "--prompts-file should have a prompt in each line: prompts.txt has none."),
        (b"a\n" * 5_000_001, "--prompts-file should be at most 10 MB long: prompts.txt is longer."),
    ],
)
def test_bad_files_of_prompts(run_demo, content, sentence):
    Path("prompts.txt").write_bytes(content)
    code, out, err = run_demo("--prompts-file", "prompts.txt")
    assert (code, out) == (2, "")
    assert err.startswith(f"demo.py: {sentence}")
    assert err.count("\n") == 1
