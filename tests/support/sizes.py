"""How large each installed backend is.

    python tests/support/sizes.py

prints, for each: the modules that it consists of (those that its descriptor names, and what they import of its own
package, but not for types alone), their lines, and how many of these are code: neither blank nor comment nor
documentation. What a package offers of other kinds belongs to these: collectives, strategies and launchers are in
modules of their own, and their descriptors, the hooks of the other kinds, are not counted either.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchport.plan.discovery import discover
from torchport.plan.registry import Entry
from torchport.plugin import KINDS

LIMIT = 250
"""Most lines of code of a backend."""

_OTHER_KINDS = {kind.hook for kind in KINDS.values()} - {KINDS["backend"].hook}
"""Hooks that offer anything but backends."""

_NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The size of one backend."""

    name: str
    distribution: str
    modules: tuple[str, ...]
    lines: int
    code: int


def code_lines(source: str) -> int:
    """Count the lines of a module that hold code of a backend: no blank ones, comments, docstrings, other hooks."""
    documentation: set[int] = set()
    others: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name in _OTHER_KINDS:
            first = min(part.lineno for part in (node, *node.decorator_list))
            others.update(range(first, (node.end_lineno or 0) + 1))
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for statement in body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    documentation.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - documentation - others)


def _file(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin else None


def _closure(first: list[str]) -> dict[str, str]:
    """Return the sources of modules and of all that they import of their own packages."""
    packages = {name.partition(".")[0] for name in first}
    sources: dict[str, str] = {}
    waiting = [*first, *packages]
    while waiting:
        name = waiting.pop()
        file = None if name in sources else _file(name)
        if file is None:
            continue
        sources[name] = file.read_text(encoding="utf-8")
        for node in _imports(ast.parse(sources[name])):
            named: list[str] = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [one for one in named if one.partition(".")[0] in packages and _is_module(one)]
    return sources


def _imports(tree: ast.AST) -> Iterator[ast.AST]:
    """Give the parts of a module where it may import something when it runs: nothing under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from _imports(node)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and no package: it is a name in it
        return False


def size_of(entry: Entry) -> Size:
    """Measure one backend."""
    spec = entry.spec
    references = [spec.factory, getattr(spec, "probe", ""), spec.config]
    sources = _closure([reference.partition(":")[0] for reference in references if reference])
    return Size(
        name=spec.name,
        distribution=entry.plugin.distribution,
        modules=tuple(sorted(sources)),
        lines=sum(len(source.splitlines()) for source in sources.values()),
        code=sum(map(code_lines, sources.values())),
    )


def sizes() -> list[Size]:
    """Measure all installed backends, in order of name."""
    return [size_of(entry) for _, entry in sorted(discover({}).entries["backend"].items())]


if __name__ == "__main__":
    print(f"{'backend':10} {'code':>5} {'lines':>6}  modules")
    for size in sizes():
        print(f"{size.name:10} {size.code:5} {size.lines:6}  {', '.join(size.modules)}")
