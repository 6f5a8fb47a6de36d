"""DeepSpeed's own configuration: a nested mapping, read from JSON, with places such as `zero_optimization.stage`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchport.errors import ConfigurationError

AUTO = "auto"
"""The value that `prepare` works out."""


def read(source: Any) -> dict[str, Any]:
    """Return a configuration as a dict of its own.

    Args:
        source: A path, JSON in base64, a mapping, an object whose attribute `config` is one, or `None`.

    Raises:
        ConfigurationError: if it cannot be read, or is not a mapping.
    """
    if source is None:
        return {}
    content = getattr(source, "config", source)
    if isinstance(content, Mapping):
        return copy.deepcopy(dict(content))
    if not isinstance(content, (str, Path)):
        raise ConfigurationError(
            f"a {type(source).__name__} is no DeepSpeed configuration",
            hint="the path of a JSON file, a dict, or JSON in base64",
        )
    text, where = _text(str(content))
    try:
        loaded = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(
            f"{where} is not JSON",
            reason=str(error),
            hint="no comments, and no comma before a closing bracket",
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigurationError(f"{where} must hold one JSON object", found=type(loaded).__name__)
    return loaded


def _text(source: str) -> tuple[str, str]:
    """Return the JSON of a file or of a text in base64, and what to call it."""
    with contextlib.suppress(OSError):  # a long text is no name of a file
        path = Path(source).expanduser()
        if path.is_file():
            return path.read_text(encoding="utf-8"), f"the DeepSpeed configuration {source!r}"
    with contextlib.suppress(binascii.Error, ValueError):
        decoded = base64.urlsafe_b64decode(source).decode("utf-8")
        if decoded.lstrip().startswith("{"):
            return decoded, "the DeepSpeed configuration in base64"
    raise ConfigurationError(
        f"the DeepSpeed configuration {source[:80]!r} cannot be read",
        found="there is no such file, and it is no JSON in base64",
        hint="a path from the folder in which the script is started",
    )


def get(config: Mapping[str, Any], place: str) -> Any:
    """Return the value at a place; `None` where there is none."""
    found: Any = config
    for part in place.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def put(config: dict[str, Any], place: str, value: Any) -> None:
    """Set the value at a place, making the sections on its way."""
    *sections, last = place.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[last] = value


def remove(config: dict[str, Any], place: str) -> None:
    """Remove the value at a place."""
    *sections, last = place.split(".")
    for section in sections:
        config = config.get(section, {})
    config.pop(last, None)


def places(config: Mapping[str, Any], value: Any, before: str = "") -> Iterator[str]:
    """Yield all places that have a value."""
    for key, found in config.items():
        place = f"{before}{key}"
        if isinstance(found, Mapping):
            yield from places(found, value, f"{place}.")
        elif isinstance(found, str) and found == value:
            yield place


def same(first: Any, second: Any) -> bool:
    """Whether two values mean the same."""
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return float(first) == float(second)
    return bool(first == second)


def problems(config: Mapping[str, Any]) -> list[str]:
    """Say what in a configuration cannot work, whatever the model."""
    found = []
    stage = get(config, "zero_optimization.stage")
    if stage not in (0, 1, 2, 3):
        found.append(f"zero_optimization.stage: {stage!r} is not 0, 1, 2 or 3")
    for kind, needed in (("offload_optimizer", 1), ("offload_param", 3)):
        device = get(config, f"zero_optimization.{kind}.device") or "none"
        if device == "none" or not isinstance(stage, int):
            continue
        least = 3 if device == "nvme" else needed
        if stage < least:
            found.append(f"{kind} to {device!r} needs ZeRO stage {least}, and the stage is {stage}")
        if device == "nvme" and not get(config, f"zero_optimization.{kind}.nvme_path"):
            found.append(f"{kind} to 'nvme' needs a folder: {kind}_nvme_path")
    if get(config, "bf16.enabled") is True and get(config, "fp16.enabled") is True:
        found.append("bf16.enabled and fp16.enabled: both are true")
    if "scheduler" not in config and "optimizer" not in config:
        return found
    if "optimizer" in config and not get(config, "optimizer.type"):
        found.append("optimizer: has no type")
    return found


def for_init(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration for constructing models: without values that are worked out later."""
    made = copy.deepcopy(dict(config))
    for section in ("optimizer", "scheduler"):
        made.pop(section, None)
    for place in list(places(made, AUTO)):
        remove(made, place)
    for place in ("train_batch_size", "gradient_accumulation_steps"):
        remove(made, place)
    made["train_micro_batch_size_per_gpu"] = 1
    return made


class Resolution:
    """Replaces the `"auto"` values of a configuration, and remembers by what and from where.

    Attributes:
        config: The configuration, changed in place.
        lines: A place, its value, and where that came from.
        missing: What could not be worked out, and why.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.lines: list[tuple[str, Any, str]] = []
        self.missing: list[str] = []

    def fill(self, place: str, value: Any, origin: str) -> None:
        """Replace an `"auto"` at a place; another value there stays."""
        if get(self.config, place) == AUTO:
            put(self.config, place, value)
            self.lines.append((place, value, origin))

    def fill_from(self, place: str, value: Callable[[], Any], origin: str, otherwise: str) -> None:
        """As `fill`, with a value that may be unknown (`None`), and then is missing for the reason `otherwise`."""
        if get(self.config, place) != AUTO:
            return
        found = value()
        if found is None:
            self.missing.append(f"{place}: {otherwise}")
        else:
            self.fill(place, found, origin)

    def drop(self, prefix: str, origin: str) -> None:
        """Leave the `"auto"` values under a section to DeepSpeed's own defaults."""
        for place in [place for place in places(self.config, AUTO) if place.startswith(prefix)]:
            remove(self.config, place)
            self.lines.append((place, "-", origin))

    def finish(self) -> None:
        """Raise one error that lists everything that has no value yet.

        Raises:
            ConfigurationError: if anything has none.
        """
        known = {line.split(":")[0] for line in self.missing}
        self.missing += [
            f"{place}: nothing says what it should be"
            for place in places(self.config, AUTO)
            if place not in known
        ]
        if self.missing:
            raise ConfigurationError(
                'some "auto" values of the DeepSpeed configuration cannot be worked out',
                found="".join(f"\n    {line}" for line in self.missing),
                hint="write these values into the configuration",
            )

    def report(self) -> str:
        """Return the values that were worked out, one a line."""
        width = max((len(place) for place, _, _ in self.lines), default=0)
        return "\n".join(f"  {place:<{width}}  {value}  ({origin})" for place, value, origin in self.lines)
