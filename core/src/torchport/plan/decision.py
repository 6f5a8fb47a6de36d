"""A `Plan`: the frozen choices of a run, and why each was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torchport.plugin.specs import Record, Spec, Topology

if TYPE_CHECKING:
    from torchport.plugin.parallelism import ParallelismConfig

AUTOMATIC = "automatic"
"""First word of `Decision.source` where nobody asked for anything."""


class Rejection(NamedTuple):
    """A candidate that was not taken, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Decision(Record):
    """How one slot was filled.

    Attributes:
        slot: Name of the slot.
        choice: Names chosen: one, none where the slot is not needed, several for trackers.
        source: Who decided: an argument, a variable, a file, or `"automatic"`, with the reason.
        specs: Descriptors of the choices.
        config: The chosen plugin's settings.
        rejected: The other candidates, each with its reason.
        implied: Those of the choices that nobody named: they are there because all were asked for.
    """

    slot: str
    choice: tuple[str, ...]
    source: str
    specs: tuple[Spec, ...] = ()
    config: Any = None
    rejected: tuple[Rejection, ...] = ()
    implied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The choice as text; `"-"` where the slot stays empty."""
        return ", ".join(self.choice) or "-"

    @property
    def spec(self) -> Spec | None:
        """Descriptor of the only (or first) choice; `None` if there is none."""
        return self.specs[0] if self.specs else None

    @property
    def automatic(self) -> bool:
        """Whether nobody asked for this choice."""
        return self.source.startswith(AUTOMATIC)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Plan(Record):
    """The frozen choices of a run, and why each was made.

    Attributes:
        decisions: One for each slot, in the order of `SLOTS`.
        topology: The place of this process in its job.
        overrides: One sentence for each variable that an argument overrides.
        warnings: What the operator should hear once.
        distributed: Whether a process group is opened.
        parallelism: How the processes are divided over a mesh; `None` where nobody asked for more than data
            parallelism.
        parallelism_source: Who asked for it.
    """

    decisions: tuple[Decision, ...]
    topology: Topology
    distributed: bool
    overrides: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    parallelism: ParallelismConfig | None = None
    parallelism_source: str = ""

    def __getitem__(self, slot: str) -> Decision:
        for decision in self.decisions:
            if decision.slot == slot:
                return decision
        raise KeyError(slot)

    @property
    def backend(self) -> str:
        """Name of the chosen backend."""
        return self["backend"].name

    @property
    def strategy(self) -> str:
        """Name of the chosen strategy."""
        return self["strategy"].name

    @property
    def precision(self) -> str:
        """Name of the chosen precision."""
        return self["precision"].name

    @property
    def collectives(self) -> str:
        """Name of the chosen collectives; `"-"` where no process group is opened."""
        return self["collectives"].name

    @property
    def distributed_type(self) -> str:
        """Label of the kind of distributed training (`DistributedType`); `"NO"` for one plain process."""
        label: str = getattr(self["strategy"].spec, "distributed_type", "")
        if not label and self.topology.world_size > 1:
            label = getattr(self["backend"].spec, "distributed_type", "")
        return label or "NO"

    def explain(self) -> str:
        """Return the plan as text: a line for each slot that is filled, with the choice and who made it."""
        shown = self.rows(empty=False)
        width = max(len(choice) for _, choice, _ in shown)
        lines = [f"  {slot:<12} {choice:<{width}}  {source}" for slot, choice, source in shown]
        count = self.topology.world_size
        place = f"{count} process{'es' * (count != 1)} ({self.topology.source})"
        return "\n".join([f"plan for {place}", *lines])

    def rows(self, *, empty: bool = True) -> list[tuple[str, str, str]]:
        """Return each slot with its choice and who made it; then the mesh, if one was asked for.

        Args:
            empty: Whether slots that stay empty are among them.
        """
        rows = [(d.slot, d.name, d.source) for d in self.decisions if d.choice or empty]
        if self.parallelism is not None:
            rows.append(("parallelism", self.parallelism.describe(), self.parallelism_source))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        mesh = None
        if self.parallelism is not None:
            mesh = {"sizes": self.parallelism.sizes, "source": self.parallelism_source}
            mesh["settings"] = plain(self.parallelism)
        return {
            "slots": {
                decision.slot: {
                    "choice": list(decision.choice),
                    "source": decision.source,
                    "settings": plain(decision.config),
                    "rejected": [rejection._asdict() for rejection in decision.rejected],
                }
                for decision in self.decisions
            },
            "topology": asdict(self.topology),
            "distributed": self.distributed,
            "distributed_type": self.distributed_type,
            "parallelism": mesh,
            "overrides": list(self.overrides),
            "warnings": list(self.warnings),
        }

    def fingerprint(self) -> dict[str, str]:
        """Return what all processes must agree on, by slot: the choice, and a digest of its settings.

        Each process may have trackers of its own, and may have been started in its own way.
        """
        shared = {}
        for decision in self.decisions:
            if decision.slot in ("trackers", "launcher"):
                continue
            shared[decision.slot] = decision.name
            if decision.config is not None:
                shared[decision.slot] += _digest(decision.config)
        mesh = self.parallelism
        shared["parallelism"] = "-" if mesh is None else mesh.describe() + _digest(mesh)
        shared["processes"] = str(self.topology.world_size)
        return shared


def _digest(settings: Any) -> str:
    """Return a short text that is the same for equal settings."""
    import hashlib
    import json

    text = json.dumps(plain(settings), sort_keys=True)
    return f" (settings {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def plain(value: Any) -> Any:
    """Turn settings into values that JSON can hold; objects without a plain form become their type's name."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    return getattr(value, "__qualname__", None) or type(value).__qualname__
