"""Every command and every line of Python in the documentation works, and prints what the page says."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_spec = importlib.util.spec_from_file_location("docs_page", HERE / "page.py")
page = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = page
_spec.loader.exec_module(page)


def to_run(path: Path) -> list:
    return [block for block in page.blocks(path.read_text()) if block.title or block.language in page.RUN]


def run(path: Path, programs: Path) -> subprocess.CompletedProcess:
    """Run a page in a session of its own, so that nothing it started survives a timeout."""
    new = "sys.modules" in path.read_text()  # what is imported when is its subject
    command = [sys.executable if new else programs / "python", HERE / "page.py", path, programs]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "path", [path for path in PAGES if to_run(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_page_does_what_it_says(path, prefork):
    done = run(path, prefork)
    assert done.returncode == 0, done.stdout


def test_the_pages_that_must_have_examples_have_them():
    for name in ("README.md", "docs/write-a-backend.md", "docs/hooks.md", "docs/environment.md"):
        assert len(to_run(ROOT / name)) >= 4, name


def test_every_block_says_what_it_is():
    known = {*page.RUN, "text", "toml", "yaml", "json", "markdown"}
    strange = [
        f"{path.name}:{block.line}: {block.language or 'no language'}"
        for path in PAGES
        for block in page.blocks(path.read_text())
        if block.language not in known
    ]
    assert strange == []


def test_make_targets_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name for path in PAGES for name in re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "docs"} <= named <= targets


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "```console\n$ echo one\ntwo\n```\n",
            "page.md:1: Difference: this is printed\none\n\ninstead of\ntwo",
        ),
        ("```console\n$ exit 3\n```\n", "exits with 3 instead of 0"),
        ("```console exit=1\n$ true\n```\n", "exits with 0 instead of 1"),
        ("\n```python\nx = 1\nassert x == 2\n```\n", "page.md:2: AssertionError"),
        ('```python\nprint(1)\n```\n```text title="output"\n2\n```\n', "this is printed\n1\n\ninstead of\n2"),
        ("```bash\nfalse\ntrue\n```\n", "exits with 1 instead of 0"),
        ("```diff\n-print(1)\n+print(2)\n```\n", "the two sides print\n1\nand\n2"),
        ("```console\nwords\n```\n", "a console block starts with a command, not with 'words'"),
    ],
    ids=[
        "output",
        "failing command",
        "succeeding command",
        "python",
        "python output",
        "script",
        "diff",
        "no command",
    ],
)
def test_a_page_that_is_wrong_is_found_out(tmp_path, prefork, text, complaint):
    (tmp_path / "page.md").write_text(text)
    done = run(tmp_path / "page.md", prefork)
    assert done.returncode == 1
    assert complaint in done.stdout


def test_a_page_that_is_right_passes(tmp_path, prefork):
    (tmp_path / "page.md").write_text(
        '```python title="a.py"\nprint("from a file", 12)\n```\n'
        "```console exit=4\n$ python a.py\nfrom a ... 12\n$ export A=4; printf '1\\n2\\n3\\n'\n1\n...\n$ exit $A\n```\n"
        "```python\nx = 1\n```\n```python\nprint(x)\n```\n"
        '```text title="output"\n1\n```\n```text\nanything\n```\n'
        "```diff\n-y = 1\n+y = 0 + 1\n print(y)\n```\n"
    )
    done = run(tmp_path / "page.md", prefork)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("expected", "actual", "agree"),
    [
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a\n...\nd\n", "a\nb\n", False),
        ("took ... s", "took 1.5 s\n", True),
        ("took ... s", "took 1.5\nlong s\n", False),
        ("a", "a   \n\n", True),
        ("a", "ab", False),
        ("a.c", "abc", False),
    ],
)
def test_dots_stand_for_any_text(expected, actual, agree):
    assert page.agrees(expected, actual) is agree
