"""Open enumerations: the documented labels, to which plugins may add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torchport import aliases

L = TypeVar("L", bound="Label")


class OpenEnum(type):
    """Gives a class its members as attributes, and iteration over them."""

    _members: dict[str, Any]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return cls._members[name]
        except KeyError:
            known = ", ".join(cls._members)
            raise AttributeError(f"{cls.__name__} has no member {name!r}; known are: {known}") from None

    def __getitem__(cls, name: str) -> Any:
        return cls._members[name]

    def __iter__(cls) -> Iterator[Any]:
        return iter(cls._members.values())

    def __contains__(cls, value: object) -> bool:
        return any(str(value) == str(member) for member in cls._members.values())

    def __len__(cls) -> int:
        return len(cls._members)


class Label(str, metaclass=OpenEnum):
    """A text with a name; `Label("value")` returns the member of that value, in any case of letters."""

    _members: dict[str, Any] = {}  # noqa: RUF012 - each kind of label has its own
    _name: str

    def __init_subclass__(cls, members: dict[str, str] | None = None, **kwargs: Any) -> None:
        """Give a new kind of label its documented members, as values by name."""
        super().__init_subclass__(**kwargs)
        cls._members = {}
        for name, value in (members or {}).items():
            cls._add(name, value)

    def __new__(cls: type[L], value: str) -> L:
        """Return the member of this value."""
        wanted = str(value).lower()
        for member in cls._members.values():
            if str(member).lower() == wanted:
                found: L = member
                return found
        known = ", ".join(map(str, cls._members.values()))
        raise ValueError(f"{value!r} is not a {cls.__name__}; known are: {known}")

    @classmethod
    def _add(cls, name: str, value: str) -> None:
        if name not in cls._members:
            member = str.__new__(cls, value)
            member._name = name
            cls._members[name] = member

    @classmethod
    def register(cls, *labels: str) -> None:
        """Add members, named as their value in upper case; those that exist already are left alone."""
        for label in labels:
            cls._add(label.upper().replace("-", "_"), label)

    @classmethod
    def list(cls) -> Sequence[str]:
        """Return the values of all members, in a list."""
        return [str(member) for member in cls._members.values()]

    @property
    def name(self) -> str:
        """The member's name."""
        return self._name

    @property
    def value(self) -> str:
        """The member's value."""
        return str(self)

    def __str__(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self._name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (type(self), self._name, str(self)))


def _restore(kind: type[Label], name: str, value: str) -> Label:
    """Restore a pickled label, also where nothing has registered it yet."""
    kind._add(name, value)
    restored: Label = kind._members[name]
    return restored


class DynamoBackend(Label, members={name: name for name in aliases.DYNAMO_BACKENDS}):
    """A compiler of `torch.compile`, by its documented older label; `NO` means none.

    `TorchDynamoPlugin(backend=...)` takes these and every name of `torch.compiler.list_backends()`.
    """


class PrecisionType(Label, members=aliases.PRECISIONS):
    """Number formats, as `Accelerator(mixed_precision=...)` takes them."""


class LoggerType(Label, members=aliases.LOGGERS):
    """Trackers, as `Accelerator(log_with=...)` takes them; a plugin's name does as well."""


class RNGType(Label, members=aliases.RNG_TYPES):
    """Random number generators, as `Accelerator(rng_types=[...])` takes them."""


class ComputeEnvironment(Label, members={name: name for name in aliases.COMPUTE_ENVIRONMENTS}):
    """Values of the YAML key `compute_environment`."""


class SageMakerDistributedType(
    Label, members={name: name for name in ("NO", "DATA_PARALLEL", "MODEL_PARALLEL")}
):
    """Kinds of distributed training of a managed job, as the YAML key `distributed_type` takes them."""


__all__ = [
    "ComputeEnvironment",
    "DynamoBackend",
    "Label",
    "LoggerType",
    "OpenEnum",
    "PrecisionType",
    "RNGType",
    "SageMakerDistributedType",
]
