"""`torchport new-plugin`: write the skeleton of a plugin that works and passes its own tests."""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
from pathlib import Path

import click

from torchport.plan.registry import CORE, plugin_key
from torchport.plugin.specs import KINDS

TEMPLATE = Path(__file__).with_name("_template")
"""The template's files; in a source tree a link to `contrib/_template`."""

_KINDS = tuple(kind for kind in KINDS if kind != "command")
_TRAINED = ("backend", "collectives", "precision", "strategy", "launcher")
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@click.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(_KINDS), required=True, help="What the plugin brings.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder to make; torchport-NAME unless told otherwise.",
)
def new_plugin(name: str, kind: str, output: Path | None) -> None:
    """Write the skeleton of a plugin called NAME.

    It works at once, on the host's own processor, and passes its own tests; what to change is marked "replace
    me".
    """
    name = plugin_key(name)
    _check_name(name, kind)
    folder = output or Path(f"torchport-{name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} exists and is not empty: choose another --output, or remove it")
    for path in _write(name, kind, folder):
        click.echo(f"wrote {path}")
    click.echo(f"\nnext: cd {folder} && pip install -e '.[test]' && torchport plugins && pytest")


def _write(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the files beside the folder and move them there when they are complete.

    Raises:
        UsageError: if nothing can be written there; then nothing is left behind.
    """
    whole = folder.absolute()
    above = next(parent for parent in whole.parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=above) as temporary:
            made = Path(temporary) / folder.name
            files = [path.relative_to(made) for path in render(name, kind, made)]
            whole.parent.mkdir(parents=True, exist_ok=True)
            made.replace(whole)  # an empty folder may be there
    except OSError as error:
        raise click.UsageError(
            f"{folder} cannot be written: {error.strerror or error}: choose another --output"
        ) from error
    return [folder / file for file in files]


def _check_name(name: str, kind: str) -> None:
    if not _NAME.fullmatch(name):
        raise click.BadParameter(
            f"{name!r} is not a plugin name: lower-case letters and digits, joined by single '-'",
            param_hint="NAME",
        )
    from torchport.plan.discovery import discover

    own = discover({}, entry_points=()).entries[kind].values()
    if name == "core" or any(name in entry.labels for entry in own):
        raise click.BadParameter(f"the core itself offers {name!r}", param_hint="NAME")


def render(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the files of a new plugin and return their paths.

    Args:
        name: Entry-point name, such as `acme-one`.
        kind: What the plugin brings.
        folder: Where to write; made if need be.
    """
    values = _values(name, kind)
    parts = ["common", kind, *(["training"] if kind in _TRAINED else [])]
    written = []
    for part in parts:
        for source in sorted((TEMPLATE / part).rglob("*.tmpl")):
            target = folder / _destination(source.relative_to(TEMPLATE / part), values["package"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(
                _PLACEHOLDER.sub(lambda found: values[found[1]], source.read_text(encoding="utf-8")),
                encoding="utf-8",
            )
            written.append(target)
    return written


def _destination(path: Path, package: str) -> Path:
    """Put files under `src/` into the package, and take off the suffix of templates."""
    path = path.with_suffix("")
    return Path("src", package, *path.parts[1:]) if path.parts[0] == "src" else path


def _values(name: str, kind: str) -> dict[str, str]:
    module = name.replace("-", "_")
    variable = KINDS[kind].variable
    choices = {variable: name, **({} if kind == "backend" else {"TORCHPORT_BACKEND": "cpu"})}
    return {
        "name": name,
        "module": module,
        "distribution": f"torchport-{name}",
        "package": f"torchport_{module}",
        "class": "".join(part.capitalize() for part in name.split("-")),
        "prefix": module.upper(),
        "kind": kind,
        "variable": variable,
        "variables": ", ".join(f'{key}="{value}"' for key, value in choices.items()),
        "tolerance": "0.05  # bfloat16 has 8 significant bits" if kind == "precision" else "1e-6",
        "core": _core_range(),
    }


def _core_range() -> str:
    """Return the range of cores that the new plugin is made for: up to the next minor release."""
    version = importlib.metadata.version(CORE)
    major, minor = (int(part) for part in version.split(".")[:2])
    return f"{CORE}>={version},<{major}.{minor + 1}"
