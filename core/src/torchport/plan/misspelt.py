"""Variables that nothing reads because their name is misspelt."""

from __future__ import annotations

from collections.abc import Mapping

from torchport import envvars
from torchport.config import schema
from torchport.plan.registry import Installed, load_reference
from torchport.plugin.specs import KINDS

_PREFIX = "TORCHPORT_"
_NEAR = 0.8
"""How alike two names are, from 0 to 1, before one is taken for a misspelling of the other."""

_OWN = frozenset(
    value for value in vars(envvars).values() if isinstance(value, str) and value.startswith(_PREFIX)
)


def misspelt(environ: Mapping[str, str], installed: Installed) -> list[str]:
    """Return one sentence for each variable that is almost one of Torchport's or of an installed plugin's.

    Other names are left alone: a plugin may read variables of its own beside those of its settings.
    """
    strange = [name for name in environ if name.startswith(_PREFIX) and name not in _OWN]
    if not strange:
        return []
    import difflib

    known = _OWN | _of_plugins(installed)
    stems = [name.removeprefix(_PREFIX) for name in sorted(known) if name.startswith(_PREFIX)]
    sentences = []
    for name in strange:
        near = difflib.get_close_matches(name.removeprefix(_PREFIX), stems, n=1, cutoff=_NEAR)
        if name not in known and near:
            sentences.append(f"nothing reads the variable {name}: did you mean {_PREFIX}{near[0]}?")
    return sentences


def _of_plugins(installed: Installed) -> set[str]:
    """Return the variables of the settings of all installed plugins; of those that can be read."""
    found = set()
    for kind in KINDS:
        for spec in installed.specs(kind):
            visible = getattr(spec, "visible_devices_env", "")
            found |= {visible} if visible else set()
            if spec.config:
                try:
                    settings = schema.settings_of(load_reference(spec.config))
                except Exception:  # whoever needs them says so
                    continue
                found |= {item.env for item in settings if item.env}
    return found
