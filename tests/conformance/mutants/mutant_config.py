"""Settings of which one has no help."""

from dataclasses import dataclass

from torchport.plugin import setting


@dataclass
class WithoutHelp:
    __torchport_prefix__ = "mutant"

    colour: str = setting("", help="")
