"""Labels for kinds of distributed training: an open enumeration to which plugins contribute."""

from __future__ import annotations

from torchport import aliases
from torchport.labels import Label


class DistributedType(Label, members={name: name for name in aliases.DISTRIBUTED_TYPES}):
    """The kind of distributed training in progress; compares equal to its own text.

    `NO` is one process. Further members are the documented labels and those that the installed plugins bring.
    """
