"""`sd/PAPERS.md` lists the papers that the code, the pages and the notebooks name by their numbers on arXiv."""

import json
import re
from collections import Counter

from tests import ROOT

PAGE = ROOT / "sd" / "PAPERS.md"
NUMBER = r"\b\d\d(?:0[1-9]|1[0-2])\.\d{4,5}\b"  # year and month of the first version, and its place in that month
ROW = rf"\| \[({NUMBER})\]\(https://arxiv\.org/abs/({NUMBER})\) \| \S.+ \| \S.+, (\d{{4}}) \| \S.+ \|"


def texts():
    """{path: text} of every file that may name a paper; of a notebook, what its cells hold without their outputs."""
    for suffix in ("py", "md", "ipynb"):
        for path in ROOT.rglob(f"*.{suffix}"):
            folders = path.relative_to(ROOT).parts[:-1]
            if path == PAGE or any(name.startswith(".") or name in ("runs", "build") for name in folders):
                continue
            text = path.read_text(encoding="utf-8")
            if suffix == "ipynb":
                text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
            yield path, text


def test_every_paper_is_listed_and_none_that_is_not_used():
    used = {number: path for path, text in texts() for number in re.findall(NUMBER, text)}
    listed = re.findall(rf"(?m)^\| \[({NUMBER})\]", PAGE.read_text(encoding="utf-8"))
    assert {number: str(used[number]) for number in used if number not in listed} == {}
    assert [number for number in listed if number not in used] == []
    assert listed == sorted(listed)
    assert set(Counter(listed).values()) == {1}


def test_every_row_has_a_link_a_title_authors_and_a_year():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    for row in rows:
        number, target, year = re.fullmatch(ROW, row).groups()
        assert target == number
        assert year[2:] == number[:2]


def test_pages_and_notebooks_link_to_every_paper_that_they_name():
    """A number alone says nothing to a reader. Blocks of code hold comments, where a number is enough."""
    for path, text in texts():
        if path.suffix != ".py":
            prose = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
            prose = re.sub(r"\[[^\]]+\]\(https://arxiv\.org/abs/[^)]*\)", "", prose)
            assert re.findall(NUMBER, prose) == [], path
