"""Plugins that a script brings itself, by a call instead of a package."""

from __future__ import annotations

import re
from types import SimpleNamespace

from torchport.plan.registry import Entry, Plugin
from torchport.plugin.specs import TrackerSpec

SCRIPT = Plugin("script", "this script", "")
"""Whom the registered specs come from, in messages."""

factories = SimpleNamespace()
"""The registered classes, so that the `factory` of their specs can name them wherever they were defined."""

_ENTRIES: dict[str, Entry] = {}


def register_tracker_class(
    kind: type,
    name: str,
    *,
    summary: str = "",
    requires_logging_directory: bool = False,
    main_process_only: bool = True,
) -> None:
    """Offer a class under a name, in the place of what was registered under it before.

    Raises:
        InvalidSpecError: if the name is not one that plugins can have.
    """
    attribute = "tracker_" + re.sub(r"\W", "_", name)
    spec = TrackerSpec(
        name=name,
        factory=f"{__name__}:factories.{attribute}",
        summary=summary,
        requires_logging_directory=requires_logging_directory,
        main_process_only=main_process_only,
    )
    setattr(factories, attribute, kind)
    _ENTRIES[name] = Entry(spec, SCRIPT)


def unregister_tracker(name: str) -> None:
    """Take a registered class out; a name that is not registered is no error."""
    _ENTRIES.pop(name, None)


def entries() -> tuple[Entry, ...]:
    """Return what is registered."""
    return tuple(_ENTRIES.values())
