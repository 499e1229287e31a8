"""The notebooks run from top to bottom. The committed ones hold every output, and no trace of the machine it ran on."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from sd.checkpoints.files import write_checkpoint
from sd.config import TextConfig
from tests.support.run_notebooks import FOLDER, NOTEBOOKS, execute, has_tag, solution
from tests.support.synthetic import MICRO, random_state

# Parts that take long, and shorter ones that still show that the notebook runs.
SHORTER = {
    "03_noise_and_samplers": {'in the middle", 0, 20': 'in the middle", 0, 5'},
    "04_guidance": {
        "scales = [1, 2, 3.5, 5, 7.5, 10, 14]": "scales = [1, 7.5]",
        "[scene] * 5": "[scene]",
        "[view] * 3": "[view]",
        "weights = [0, 50, 200]": "weights = [0, 200]",
        "n_inference_steps = 20": "n_inference_steps = 6",
        "(0, 2, 4, 8, 12, 19)": "(0, 1, 2, 3, 4, 5)",
    },
    "06_training": {"_STEPS = 250, 200, 300": "_STEPS = 50, 20, 50"},
    "07_fine_tuning": {"_STEPS = 1e-2, 25, 50": "_STEPS = 1e-2, 3, 4", "n_inference_steps=12": "n_inference_steps=4"},
    "08_control": {
        "Request(prompt, seed=seed)": "Request(prompt, seed=seed, n_inference_steps=6)",
        "strengths = [0, 0.25, 0.5, 0.75, 1, 1.5]": "strengths = [0, 1]",
    },
    "09_few_steps": {
        "for seed in (0, 1, 2)": "for seed in (0,)",
        "counts = (1, 2, 4, 8)": "counts = (1, 4)",
        '50, "ddim"': '10, "ddim"',
    },
    "10_stable_diffusion_2": {"steps=20": "steps=4", "count=24": "count=6"},
}
# The notebooks that run with any weights, even random ones.
OF_ANY_WEIGHTS = ("02_text", "03_noise_and_samplers", "05_image_to_image_and_inpainting")
WITHOUT_WEIGHTS = ("b1_tokenizer",)
IN_FLOAT32 = ("07_fine_tuning",)
SMALL = replace(MICRO, text=TextConfig(width=32, layers=2, heads=4))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook):
    return [output for cell in cells(notebook, "code") for output in cell.outputs]


def kinds(output):
    """What kind of output it is: its stream, such as stdout, or the types of its data."""
    return output.get("name") or sorted(output.get("data", output.output_type))


def shown(cell):
    """The kinds of a cell's outputs in order. Printed text may arrive in one part or in several, and counts once."""
    every = list(map(kinds, cell.outputs))
    return [kind for kind, before in zip(every, [None, *every]) if not kind == before == "stdout"]


def text_without_images(notebook):
    """The notebook as text, without images: long base64 can contain any short string by chance."""
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
    return nbformat.writes(notebook)


def test_its_number_is_its_place_in_the_course(path):
    """Those that begin with b are the second row, those that build. Numbers of the first row may be free."""
    row = [other for other in NOTEBOOKS if other.name.startswith("b") == path.name.startswith("b")]
    if path.name.startswith("b"):
        assert path.name.startswith(f"b{row.index(path) + 1}_")
    else:
        assert [other.name[:3] for other in row].count(path.name[:3]) == 1
        assert int(path.name[:2]) > row.index(path)


def test_the_page_has_a_line_for_it(path):
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert page.count(f"\n| [`{path.stem}`]({path.name}) | ") == 1


def test_it_is_a_plain_notebook_of_modest_size(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert len(notebook.cells) < 60
    assert path.stat().st_size < 1.5e6


def test_it_finds_the_repository_and_runs_on_any_checkpoint(path):
    sources = [cell.source for cell in cells(read(path), "code")]
    assert sources[0] == cells(read(NOTEBOOKS[0]), "code")[0].source  # tests/scripts/test_notebooks_elsewhere.py
    checkpoints = sum(bool(re.search(r"^CHECKPOINT = None\b", source, re.MULTILINE)) for source in sources)
    assert checkpoints == (path.stem not in WITHOUT_WEIGHTS)
    assert not any(re.search(r"^\s*[%!]", source, re.MULTILINE) for source in sources)  # no magic commands


def test_its_outputs_come_from_one_run_in_order(path):
    notebook = read(path)
    code = cells(notebook, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 5
    assert all("execution" not in cell.metadata for cell in code)  # the times at which a cell ran


def test_it_shows_no_error_and_no_trace_of_a_machine(path):
    notebook = read(path)
    assert not [output for output in outputs(notebook) if output.output_type == "error" or kinds(output) == "stderr"]
    text = text_without_images(notebook)
    for trace in (str(FOLDER.parents[1]), str(Path.home()) + "/", "/tmp/", "/home/", "/Users/", "site-packages"):
        assert trace not in text


def test_it_ends_with_exercises_that_are_open(path):
    """A question, a cell for the answer, a check, and a solution that is folded away and does not run by itself."""
    every = read(path).cells
    places = [place for place, cell in enumerate(every) if has_tag(cell, "exercise")]
    assert len(places) == (4 if path.stem == "04_guidance" else 3)
    for number, place in enumerate(places, 1):
        question, exercise, check, solved = every[place - 1 : place + 3]
        assert question.cell_type == solved.cell_type == "markdown"
        assert re.search(rf"(?m)^\*\*{number}\.\*\*", question.source)
        assert "# your answer" in exercise.source
        assert has_tag(check, "check")
        assert "assert " in check.source
        assert has_tag(solved, "solution")
        compile(solution(solved), "solution", "exec")


def said(cell):
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if kinds(output) == "stdout")


def test_its_checks_say_in_one_sentence_what_is_still_missing(path):
    checks = [cell for cell in read(path).cells if has_tag(cell, "check")]
    for number, check in enumerate(checks, 1):
        assert re.fullmatch(rf"Exercise {number}: `.+` (is still None|still returns .+)\.\n", said(check))
        assert shown(check) == ["stdout"]


@pytest.fixture
def changes(path, request, tmp_path):
    """Replacements that make the notebook run faster. With `--slow` there are none."""
    if request.config.getoption("--slow"):
        return {}
    changes = SHORTER.get(path.stem, {})
    if path.stem in OF_ANY_WEIGHTS:
        write_checkpoint(tmp_path / "small.ckpt", random_state(SMALL), SMALL.to_dict())
        changes = {**changes, "CHECKPOINT = None": f"CHECKPOINT = {str(tmp_path / 'small.ckpt')!r}"}
    return changes


def test_each_long_part_is_in_one_cell(path):
    sources = [cell.source for cell in cells(read(path), "code")]
    for text in SHORTER.get(path.stem, {}):
        assert sum(text in source for source in sources) == 1, text


def test_its_imports_work(path):
    for cell in cells(read(path), "code"):
        for statement in ast.parse(cell.source).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(statement), {})


@pytest.mark.slow
def test_it_runs_shows_what_is_committed_and_its_solutions_pass_the_checks(path, changes):
    """Only the kinds of outputs are compared: numbers and pixels depend on the processor."""
    executed = cells(execute(path, changes, solve=True), "code")
    for cell in executed:
        assert "".join(o.text for o in cell.outputs if kinds(o) == "stderr") == ""
    solved = [cell for cell in executed if has_tag(cell, "solved")]
    assert len(solved) == 2 * sum(has_tag(cell, "exercise") for cell in executed)
    assert not any("still" in said(cell) for cell in solved)
    for cell, committed in zip(
        [cell for cell in executed if cell not in solved], cells(read(path), "code"), strict=True
    ):
        assert shown(cell) == shown(committed), cell.source


@pytest.mark.slow
def test_it_runs_in_half_precision(path):
    """float16 is the default on a GPU. A CPU without instructions for it needs ten times as long."""
    if path.name.startswith("b"):
        pytest.skip("it builds networks, and compares them in float64")
    if path.stem in IN_FLOAT32:
        pytest.skip("it trains the loaded model, which needs float32")
    half = {"load_models(CHECKPOINT)": "load_models(CHECKPOINT, dtype=__import__('torch').float16)"}
    execute(path, SHORTER.get(path.stem, {}) | half, solve=True)
