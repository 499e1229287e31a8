"""The pages: every link leads to a file, and every block of Python runs as it stands, with the tiny model."""

import re

import pytest

from sd.samplers import SAMPLERS
from tests import ROOT
from tests.support.marks import slow

PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not {".venv", "runs", "build"} & set(page.relative_to(ROOT).parts) and ".pytest_cache" not in page.parts
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_can_be_pasted_into_any_shell(page):
    """zsh, the shell of macOS, passes a comment on as arguments."""
    assert [line for block in blocks(page, "sh") for line in block.splitlines() if re.search(r"(^|\s)#", line)] == []


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
LONGEST = {ROOT / "sd/inside/README.md", ROOT / "sd/adapters/README.md", ROOT / "sd/README.md"}


@pytest.mark.parametrize(
    "page", [slow(page) if page in LONGEST else page for page in WITH_PYTHON], ids=lambda page: page.parent.name
)
def test_blocks_of_python_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *_: None)
    before, scope = dict(SAMPLERS), {}
    try:
        for block in blocks(page, "python"):
            exec(block, scope)
    finally:
        SAMPLERS.clear()
        SAMPLERS.update(before)


def test_commands_name_scripts_that_exist():
    for page in PAGES:
        for block in blocks(page, "sh"):
            for path in re.findall(r"\b(?:scripts|tests|sd)/[\w./]+", block):
                assert (ROOT / path).exists(), f"{path} in {page.relative_to(ROOT)}"
