"""Write the generated tables into the pages, and check that every link leads somewhere.

python docs/build.py            # write
python docs/build.py --check    # only say what would change, and exit with status 1 if anything would

A generated table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, with a name from `reference.tables()`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from reference import ROOT, tables

_PLACE = re.compile(r"(<!-- begin (?P<name>[^>]+?) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)
_FENCE = re.compile(r"^(`{3,}).*?^\1$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def pages() -> list[Path]:
    """Return the pages: the README of the repository and everything in `docs/`."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(text: str, generated: Mapping[str, str]) -> str:
    """Return the text of a page with its tables made anew.

    Raises:
        KeyError: if the page has a place for a table that is not generated.
    """
    return _PLACE.sub(lambda found: f"{found[1]}\n{generated[found['name']]}\n\n{found[3]}", text)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(_FENCE.sub("", text))]
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken_links(page: Path, text: str) -> list[str]:
    """Name the links of a page that lead to no file, or to no heading of it; other sites are not visited."""
    broken = []
    for target in (a or b for a, b in _LINK.findall(_FENCE.sub("", text))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if path and not file.exists():
            broken.append(f"{page.relative_to(ROOT)}: {target} leads to no file")
        elif anchor and anchor not in anchors(text if file == page else file.read_text()):
            broken.append(f"{page.relative_to(ROOT)}: {target} leads to no heading")
    return broken


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    generated, problems, used = tables(), [], set()
    for page in pages():
        text = page.read_text()
        made = fill(text, generated)
        used |= {found["name"] for found in _PLACE.finditer(text)}
        problems += broken_links(page, made)
        if made != text and check:
            problems.append(f"{page.relative_to(ROOT)}: a table is not as the code says: make docs")
        elif made != text:
            page.write_text(made)
            print(f"wrote {page.relative_to(ROOT)}")
    problems += [f"no page has a place for the table {name!r}" for name in sorted(generated.keys() - used)]
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
