"""Both indexes of the documentation name every page, and count nothing that is counted otherwise tomorrow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
COUNT = re.compile(
    r"\b(?:\d+|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty) (?:\w+ )?\w+s\b"
)


def index(page: Path) -> list[str]:
    """The lines of the table `page | for` of a page."""
    text = page.read_text().partition("| page | for |\n| --- | --- |\n")[2]
    return text.partition("\n\n")[0].splitlines()


def linked(page: Path) -> list[Path]:
    """Where the first column of that table leads to."""
    targets = [re.match(r"\| \[[^\]]+\]\(([^)]+)\) \| \S", line) for line in index(page)]
    assert all(targets)
    return [(page.parent / target[1]).resolve() for target in targets]


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "README.md"], ids=["README", "docs/README"])
def test_the_index_has_every_page_of_the_documentation_once(page):
    pages = [path.name for path in linked(page) if path.parent == DOCS]
    assert sorted(pages) == sorted(PAGES)


def test_the_index_of_the_examples_has_every_script_once():
    text = (DOCS / "examples" / "README.md").read_text()
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\)", text, re.MULTILINE)
    scripts = [path for path in (DOCS / "examples").glob("*.py") if "__main__" in path.read_text()]
    assert sorted(listed) == sorted(path.name for path in scripts)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "README.md"], ids=["README", "docs/README"])
def test_the_index_counts_nothing(page):
    assert [line for line in index(page) if COUNT.search(line)] == []


def test_a_count_is_found_out():
    assert COUNT.search("| [examples](examples/README.md) | fifteen whole scripts, one for each feature |")
    assert COUNT.search("the 17 pages")
    assert not COUNT.search("training in 8-bit floating point: FSDP2 and FSDP1, on one page")
