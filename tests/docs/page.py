"""Do what a page of the documentation says, as a reader would: write its files, type its commands, run its Python.

    python tests/docs/page.py PAGE [PROGRAMS]

runs the blocks of one page in order, in one folder and one Python process, and exits with status 1 if anything
differs from what the page says. Commands are looked for in the folder PROGRAMS first. Blocks are told apart by the first words after the fence:

    console               lines after `$ ` are run by bash; what follows each is what it prints (if anything follows)
    console exit=2        the same; the last command exits with this status instead of 0
    bash                  a script
    python                run in the namespace of the page
    LANGUAGE title="F"    not run, but written to the file F
    text title="output"   what the Python block before it prints
    diff                  two Python scripts, without and with the change, which must print the same

Anything else is only shown. In expected output, `...` stands for any text in a line, and alone on a line for any
lines. Variables of `pip` make `pip install FOLDER` install into a folder of the page's own, without an index.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUN = ("python", "console", "bash", "sh", "diff")
TIMEOUT = 120
_FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$", re.DOTALL | re.MULTILINE
)
_MARK = "\x1e"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    exit: int
    text: str
    line: int


class Difference(Exception):
    """Something is not as the page says."""


def blocks(text: str) -> Iterator[Block]:
    """Find the fenced blocks of a page."""
    for found in _FENCE.finditer(text):
        info = found["info"].strip()
        title = re.search(r'title="([^"]*)"', info)
        status = re.search(r"exit=(\d+)", info)
        yield Block(
            language=info.partition(" ")[0],
            title=title[1] if title else "",
            exit=int(status[1]) if status else 0,
            text=found["text"],
            line=text.count("\n", 0, found.start()) + 1,
        )


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Split a console block into commands and the output that is shown after each."""
    command, output = "", ""
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line[2:], ""
        elif command.endswith("\\") and line.startswith("> "):
            command += "\n" + line[2:]
        elif command:
            output += line + "\n"
        else:
            raise Difference(f"a console block starts with a command, not with {line!r}")
    yield command, output


def agrees(expected: str, actual: str) -> bool:
    """Whether output is as the page shows it."""
    pattern = ""
    for line in _tidy(expected):
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += r"[^\n]*".join(re.escape(part) for part in line.split("...")) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _tidy(actual))) is not None


def _tidy(text: str) -> list[str]:
    """Take trailing spaces, empty lines and colours away."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [line.rstrip() for line in plain.splitlines() if line.strip()]


def run_page(page: Path) -> None:
    """Do what a page says, in the current folder.

    Raises:
        Difference: naming the line, if something is not as the page says.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page.read_text()):
        try:
            if block.title == "output":
                _compare(block.text, printed)
            elif block.title:
                target = Path(block.title)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.text)
            elif block.language == "python":
                printed = _python("\n" * block.line + block.text, page.name, namespace)
            elif block.language == "diff":
                _diff(block, page.name)
            elif block.language == "console":
                _console(block)
            elif block.language in ("bash", "sh"):
                _shell(f"set -e\n{block.text}", [("the script", "")], block.exit)
        except Exception as error:
            raise Difference(f"{page.name}:{block.line}: {type(error).__name__}: {error}") from error


def _python(source: str, name: str, namespace: dict[str, object]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, name, "exec"), namespace)
    return output.getvalue()


def _diff(block: Block, name: str) -> None:
    sides = {}
    for sign, other in (("-", "+"), ("+", "-")):
        lines = [line[1:] for line in block.text.splitlines() if not line.startswith(other)]
        sides[sign] = _python("\n".join(lines), f"{name} ({sign})", {"__name__": "__main__"})
    if sides["-"] != sides["+"] or not sides["-"]:
        raise Difference(f"the two sides print\n{sides['-']}and\n{sides['+']}")


def _console(block: Block) -> None:
    pairs = list(commands(block.text))
    script = "".join(f"{command}\nprintf '{_MARK}%s{_MARK}' $?\n" for command, _ in pairs)
    _shell(script, pairs, block.exit)


def _shell(script: str, pairs: list[tuple[str, str]], status: int) -> None:
    done = subprocess.run(
        ["bash", "-c", script],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    parts = done.stdout.split(_MARK)
    if len(parts) < 2 * len(pairs):  # a command ended the shell
        parts.append(str(done.returncode))
    for index, (command, expected) in enumerate(pairs):
        if len(parts) < 2 * index + 2:
            raise Difference(f"$ {command}\nis not reached: the command before it ends the shell")
        output, code = parts[2 * index], int(parts[2 * index + 1])
        wanted = status if index == len(pairs) - 1 else 0
        if code != wanted:
            raise Difference(f"$ {command}\nexits with {code} instead of {wanted} and prints\n{output}")
        if expected.strip():
            _compare(expected, output)


def _compare(expected: str, actual: str) -> None:
    if not agrees(expected, actual):
        raise Difference(f"this is printed\n{actual}\ninstead of\n{expected}")


def _environment() -> dict[str, str]:
    here = Path.cwd()
    site = here / ".site"
    job = re.compile(
        r"TORCHPORT_|ACCELERATE_|PIP_|PYTHON|PYTEST_|.*RANK$|WORLD_SIZE$|LOCAL_WORLD_SIZE$|MASTER_"
    )
    kept = {name: value for name, value in os.environ.items() if not job.match(name)}
    return {
        **kept,
        "PATH": os.pathsep.join([*sys.argv[2:], str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(here),
        "PYTHONPATH": str(site),
        "PIP_TARGET": str(site),
        "PIP_UPGRADE": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of build isolation
        "PIP_NO_INDEX": "1",
        "PIP_QUIET": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }


def main() -> int:
    """Run the command line."""
    page = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory(prefix="torchport-docs-") as folder:
        os.chdir(folder)
        site = Path(folder, ".site")
        site.mkdir()
        sys.path[:0] = [folder, str(site)]
        try:
            run_page(page)
        except Difference as difference:
            print(difference, file=sys.stderr)
            return 1
        finally:
            os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
