"""Public names of a module that are imported when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(
    module: str, exports: Mapping[str, str], otherwise: Callable[[str], str | None] = lambda _: None
) -> Callable[[str], Any]:
    """Make the `__getattr__` of a module whose public names live in other modules.

    ```python
    __getattr__ = lazy_exports(__name__, {"Engine": ".engine", "Settings": ".config"})
    ```

    Args:
        module: `__name__` of the module that shows the names.
        exports: Names, and the modules that define them; relative ones start with a dot. `"module:Name"` where it has
            another name there.
        otherwise: Finds the module of a name that is not among the exports; `None` if there is none.

    Returns:
        A function that imports the module of a name and keeps its value. It raises `AttributeError` for other names.
    """

    def get(name: str) -> Any:
        source = exports.get(name) or otherwise(name)
        if source is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, own = source.partition(":")
        value = getattr(importlib.import_module(place, module), own or name)
        setattr(sys.modules[module], name, value)
        return value

    return get
