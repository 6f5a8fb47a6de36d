"""What was asked for, by whom: arguments, environment variables and the configuration file, slot by slot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torchport import envvars
from torchport.config import schema
from torchport.errors import ConfigurationError
from torchport.plan.registry import Installed, load_reference
from torchport.plugin.specs import KINDS, Record, Spec

if TYPE_CHECKING:
    from torchport.plugin.parallelism import ParallelismConfig

SLOTS = ("backend", "strategy", "precision", "collectives", "launcher", "trackers", "quantizer")
"""The slots of a plan, in the order in which they are shown."""


def slot_kind(slot: str) -> str:
    """Return the kind of plugin that fills a slot."""
    return "tracker" if slot == "trackers" else slot


def slot_variable(slot: str) -> str:
    """Return the environment variable that fills a slot."""
    return KINDS[slot_kind(slot)].variable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Request(Record):
    """What was asked for, by argument and by configuration file.

    Attributes:
        arguments: By slot: a name, an instance of a plugin's configuration dataclass, or (trackers) names.
        configured: By slot: a name from a configuration file.
        asked_by: Who gave the arguments, for messages.
        config_file: Where `configured` was read, for messages.
        settings: By YAML section (`"fsdp_config"`): the plugin settings of a configuration file.
        handlers: Configuration objects given besides the slots, used where a chosen spec's `config` names
            their class.
        parallelism: How the processes are divided over a mesh; `None` leaves it to variables and the file.
        lays_out: Whether the strategy is going to lay out models, and must be able to do so on that mesh.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    configured: Mapping[str, str] = field(default_factory=dict)
    asked_by: str = "argument"
    config_file: str = "configuration file"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    handlers: tuple[Any, ...] = ()
    parallelism: ParallelismConfig | None = None
    lays_out: bool = True


class Ask(NamedTuple):
    """A value for a slot and who gave it."""

    value: Any
    source: str


class Sources(NamedTuple):
    """All that may decide a slot, in order of precedence: arguments, environment, configuration file."""

    request: Request
    environment: Mapping[str, str]
    installed: Installed

    def ask(self, slot: str) -> Ask | None:
        """Return the value of the first source that has one; `None` leaves the choice to the plan."""
        argument = self.request.arguments.get(slot)
        if argument is not None:
            return Ask(argument, f"{self.request.asked_by} {slot}={_show(argument)}")
        variable = slot_variable(slot)
        if self.environment.get(variable):
            return Ask(self.environment[variable], self.variable_source(variable))
        configured = self.request.configured.get(slot)
        return Ask(configured, f"{self.request.config_file}: {slot}") if configured else None

    def overrides(self) -> tuple[str, ...]:
        """Return one sentence for each variable that says something else than the argument that wins."""
        sentences = []
        for slot in SLOTS:
            variable = slot_variable(slot)
            value, argument = self.environment.get(variable), self.request.arguments.get(slot)
            if value and argument is not None and self._differ(slot, argument, value):
                sentences.append(
                    f"{self.request.asked_by} {slot}={_show(argument)}"
                    f" overrides {self.variable_source(variable)}={value}"
                )
        return tuple(sentences)

    def variable_source(self, variable: str) -> str:
        """Name the variable, and the flag or file that the launcher made it from."""
        origin = envvars.origins(self.environment).get(variable)
        return f"{origin} ({variable})" if origin else variable

    def _differ(self, slot: str, argument: Any, variable: str) -> bool:
        kind = slot_kind(slot)
        many = slot == "trackers"
        wanted = {self._canonical(kind, item) for item in (split_names(argument) if many else [argument])}
        found = {self._canonical(kind, item) for item in (split_names(variable) if many else [variable])}
        return wanted != found

    def _canonical(self, kind: str, value: Any) -> str:
        """Return the name of the installed spec that `value` stands for, or `value` itself as text."""
        for spec in self.installed.specs(kind):
            if names_spec(spec, value) or configures(spec, value):
                return str(spec.name)
        return value if isinstance(value, str) else type(value).__name__

    def settings_of(self, spec: Spec, given: Any = None) -> Any:
        """Build a plugin's settings: an object as it was given; else variables over file over defaults.

        Args:
            spec: The chosen plugin.
            given: What filled the slot: a name, or already an instance of the settings.

        Raises:
            ConfigurationError: if a key, a variable or a value is not valid.
        """
        if not spec.config:
            return None
        for value in (given, *self.request.handlers):
            if configures(spec, value):
                return value
        config = load_reference(spec.config)
        section = schema.section_of(config)
        where = f"{self.request.config_file}: {section}"
        values = schema.from_mapping(config, self.request.settings.get(section, {}), where)
        values |= schema.from_environment(config, self.environment)
        try:
            return config(**values)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the settings of {spec.kind} {spec.name!r} are not valid", reason=str(error)
            ) from error


def find_spec(kind: str, value: Any, wanted_by: str, installed: Installed) -> Any:
    """Find the spec that a name, or an instance of a plugin's settings, stands for.

    Raises:
        TorchportError: as `Installed.find`, if the name leads to no usable plugin.
        ConfigurationError: if `value` is neither a name nor the settings of a plugin of this kind.
    """
    if isinstance(value, str):
        return installed.find(kind, value.strip().lower(), wanted_by).spec
    for spec in installed.specs(kind):
        if configures(spec, value):
            return spec
    raise ConfigurationError(
        f"{wanted_by}: {type(value).__name__} is neither the name nor the settings of a {kind}",
        found=", ".join(spec.name for spec in installed.specs(kind)) or "none installed",
    )


def split_names(value: Any) -> tuple[str, ...]:
    """Split `"a, b"` into names; a list of names passes through, less the empty ones.

    Raises:
        ConfigurationError: if it is neither.
    """
    parts = value.split(",") if isinstance(value, str) else value
    parts = tuple(parts) if isinstance(parts, Iterable) else (parts,)
    if not all(isinstance(part, str) for part in parts):
        raise ConfigurationError(
            f"{value!r} is neither a name nor a list of names",
            hint="one name, several separated by commas, or a list of names",
        )
    return tuple(part.strip() for part in parts if part.strip())


def names_spec(spec: Spec, value: Any) -> bool:
    """Whether `value` is the spec's name or one of its aliases."""
    return isinstance(value, str) and value.strip().lower() in (spec.name, *spec.aliases)


def configures(spec: Spec, value: Any) -> bool:
    """Whether `value` is an instance of the spec's settings, or several by name; told by the name of the class."""
    if isinstance(value, Mapping):
        return bool(value) and all(configures(spec, one) for one in value.values())
    return bool(spec.config) and any(
        f"{kind.__module__}:{kind.__qualname__}" == spec.config for kind in type(value).__mro__
    )


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, (str, list, tuple)) else type(value).__name__ + "(...)"
