"""Labels for kinds of distributed training: an open enumeration to which plugins contribute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class _OpenEnum(type):
    """Gives the class its members as attributes, and iteration over them."""

    _members: dict[str, Any]

    def __getattr__(cls, name: str) -> Any:
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
        return str(value) in cls._members

    def __len__(cls) -> int:
        return len(cls._members)


class DistributedType(str, metaclass=_OpenEnum):
    """The kind of distributed training in progress; compares equal to its own text.

    `NO` is one process. Further members are the documented labels and those that the installed plugins bring.
    """

    _members: dict[str, DistributedType] = {}  # noqa: RUF012 - shared on purpose

    def __new__(cls, value: str) -> DistributedType:
        """Return the member of this name."""
        known: DistributedType | None = cls._members.get(str(value))
        if known is None:
            raise ValueError(f"{value!r} is not a distributed type; known are: {', '.join(cls._members)}")
        return known

    @classmethod
    def register(cls, *labels: str) -> None:
        """Add members; those that exist already are left alone."""
        for label in labels:
            if label not in cls._members:
                cls._members[label] = str.__new__(cls, label)

    @property
    def name(self) -> str:
        """The member's name."""
        return str(self)

    @property
    def value(self) -> str:
        """The member's value, the same as its name."""
        return str(self)

    def __repr__(self) -> str:
        return f"DistributedType.{str.__str__(self)}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (str.__str__(self),))


def _restore(label: str) -> DistributedType:
    DistributedType.register(label)
    return DistributedType(label)


DistributedType.register("NO")
