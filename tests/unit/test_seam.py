"""A change to the seam shows in a diff: hook signatures, descriptor fields and interface methods.

After a deliberate change: `python tests/unit/test_seam.py` writes the snapshot anew.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

from torchport import plugin
from torchport.plugin import hookspecs, specs

SNAPSHOT = Path(__file__).with_name("seam_snapshot.txt")


def describe() -> str:
    """Write down everything that plugins rely on, one item a line."""
    lines = [f"HOOK_API {specs.HOOK_API}", ""]
    for name in sorted(vars(hookspecs)):
        if name.startswith("torchport_"):
            lines.append(f"hook {name}{inspect.signature(getattr(hookspecs, name))}")
    for name in plugin.__all__:
        value = getattr(plugin, name)
        if not inspect.isclass(value):
            continue
        lines += ["", f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"]
        if dataclasses.is_dataclass(value):
            lines += [f"  {f.name}: {f.type}{_default(f)}" for f in dataclasses.fields(value)]
        else:
            lines += _methods(value)
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        shown = sorted(field.default) if isinstance(field.default, frozenset) else field.default
        return f" = {'...' if callable(shown) else repr(shown)}"
    return "" if field.default_factory is dataclasses.MISSING else " = ..."


def _methods(value: type) -> list[str]:
    lines = []
    for name, member in sorted(vars(value).items()):
        if name.startswith("_") and name != "__init__":
            continue
        abstract = "abstract " if getattr(member, "__isabstractmethod__", False) else ""
        if isinstance(member, property):
            lines.append(f"  {abstract}property {name}{inspect.signature(member.fget)}")
        elif inspect.isfunction(member):
            lines.append(f"  {abstract}{name}{inspect.signature(member)}")
    return lines


def test_the_seam_is_as_the_snapshot_says():
    assert describe() == SNAPSHOT.read_text(), (
        "the seam has changed: if that is meant, run `python tests/unit/test_seam.py` and say so in CHANGELOG.md;"
        " hook arguments and fields are only ever added, and new fields have defaults"
    )


def test_new_fields_of_descriptors_have_defaults():
    required = {
        kind.spec.__name__: [
            f.name
            for f in dataclasses.fields(kind.spec)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        for kind in specs.KINDS.values()
    }
    assert required.pop("BackendSpec") == ["name", "factory", "device_type", "probe"]
    assert set(map(tuple, required.values())) == {("name", "factory")}


def test_descriptors_are_frozen_slotted_and_take_keywords_only():
    for kind in specs.KINDS.values():
        parameters = kind.spec.__dataclass_params__
        assert parameters.frozen, kind.spec
        assert "__slots__" in vars(kind.spec), kind.spec
        assert all(field.kw_only for field in dataclasses.fields(kind.spec)), kind.spec


def test_everything_public_has_a_docstring():
    bare = []
    for name in plugin.__all__:
        value = getattr(plugin, name)
        if not inspect.isclass(value):
            continue
        members = {name: value} | {f"{name}.{n}": m for n, m in vars(value).items() if not n.startswith("_")}
        functions = {n: m for n, m in members.items() if inspect.isfunction(m) or inspect.isclass(m)}
        bare += [n for n, m in functions.items() if not (m.__doc__ or "").strip()]
    assert bare == []


if __name__ == "__main__":
    SNAPSHOT.write_text(describe())
