"""From a plan to the objects of a run: backend, process group, precision and strategy."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torchport import envvars
from torchport.aliases import translate_environment
from torchport.config.kwargs import InitProcessGroupKwargs, KwargsHandler, first_of, read_timeout
from torchport.distributed_type import DistributedType
from torchport.errors import ConfigurationError, PlanMismatchError, UnavailableError
from torchport.ops import exchange
from torchport.plan.discovery import discover
from torchport.plan.registry import Installed, how_to_check, load_reference
from torchport.plan.request import SLOTS
from torchport.plan.selection import Decision, Plan, Request, plan
from torchport.plan.topology import detect_topology
from torchport.plugin.backend import Backend
from torchport.plugin.collectives import Collectives
from torchport.plugin.context import RunContext
from torchport.plugin.precision import Precision
from torchport.plugin.specs import BackendSpec, Topology
from torchport.plugin.strategy import Strategy

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

DEFAULT_TIMEOUT = timedelta(minutes=30)


def build(decision: Decision) -> Any:
    """Import the factory of a decision and build the object.

    Raises:
        UnavailableError: if the factory raises; with its reason.
    """
    assert decision.spec is not None
    try:
        return load_reference(decision.spec.factory)(decision.spec, decision.config)
    except Exception as error:
        raise UnavailableError(
            f"{decision.slot} {decision.name!r} ({decision.source}) could not be built",
            found=f"its factory {decision.spec.factory}",
            reason=f"{type(error).__name__}: {error}",
            hint=how_to_check(decision.spec),
        ) from error


def check_device_type(spec: BackendSpec) -> None:
    """Refuse a device type that PyTorch cannot have in this process: there is one place for types from outside it.

    Raises:
        UnavailableError: if another vendor's package has taken the place (`PrivateUse1`).
    """
    try:
        torch.device(spec.device_type)
        return
    except RuntimeError:
        taken = str(torch._C._get_privateuse1_backend_name())
    if taken not in ("privateuseone", spec.device_type):
        raise UnavailableError(
            f"backend {spec.name!r} needs PyTorch's one place for device types of other vendors (PrivateUse1)",
            found=f"another vendor's package has taken it in this process, for {taken!r}",
            reason="a process can have one of them only",
            hint="uninstall the other package, or export TORCH_DEVICE_BACKEND_AUTOLOAD=0 if PyTorch loads it by itself",
        )


class Runtime:
    """The objects of a run, shared by everything in the process.

    Attributes:
        plan: The plan they were built from.
        topology: The place of this process in the job.
        backend: The backend.
        device: The device of this process.
        collectives: The open process group; `None` where the plan needs none.
        installed: What discovery found when the plan was resolved last.
        store: The key-value store that the processes of the job share. The process meets the others once, at one
            address; a run that follows another in the same process goes on with the same store.
        generation: How many plans have been compared with the other processes.
        closed: Whether the run has ended.
    """

    current: Runtime | None = None
    installed: Installed
    store: Store | None = None
    generation: int = 0

    def __init__(self, plan: Plan, request: Request, commits: tuple[str, ...]) -> None:
        environ = translate_environment(os.environ)
        self.plan = plan
        self.topology: Topology = plan.topology
        spec = plan["backend"].spec
        assert isinstance(spec, BackendSpec)
        check_device_type(spec)
        self.backend: Backend = build(plan["backend"])
        self.backend.start_process(self.topology)
        setup: str = getattr(plan["strategy"].spec, "start_process", "")
        if setup:
            load_reference(setup)(self.topology)
        if envvars.flag(environ, envvars.BIND_CPU):
            self.backend.bind_cpu(self.topology)
        self.device: torch.device = self.backend.device(self.topology.local_rank)
        self.collectives: Collectives | None = None
        self.timeout = _timeout(request)
        self.debug = envvars.flag(environ, envvars.DEBUG)
        self.committed: set[str] = set()
        self.closed = False
        self._adopt(plan, request, commits)

    @classmethod
    def open(cls, request: Request, commits: tuple[str, ...] = SLOTS) -> Runtime:
        """Resolve a plan and build its objects, or share those that are built already.

        Args:
            request: What is asked for. Slots that it leaves open are taken over from the run that is open.
            commits: The slots that whoever asks depends on, so that nobody may ask for another choice later.

        Raises:
            ConfigurationError: if a slot is asked for that the open run has filled otherwise.
        """
        here = cls.current
        if here is not None and "strategy" in here.committed and request.arguments.get("strategy") is None:
            request = dataclasses.replace(request, lays_out=False)  # the open run has settled how
        resolved, installed = resolve(request)
        if cls.current is None:
            cls.current = cls(resolved, request, commits)
        else:
            cls.current._check_timeout(request)
            cls.current._adopt(resolved, request, commits)
        cls.current.installed = installed
        return cls.current

    @classmethod
    @contextmanager
    def opening(cls, request: Request) -> Iterator[Runtime]:
        """Open a run as `open` does, for a block that sets up what uses it: if the block fails, nobody has asked.

        The run that was opened for it is closed; one that was open before is as before.
        """
        before = cls.current
        kept = (before.plan, set(before.committed)) if before is not None else None
        runtime = cls.open(request)
        try:
            yield runtime
        except BaseException:
            if kept is None:
                runtime.close()
            else:
                runtime.plan, runtime.committed = kept
            raise

    def _adopt(self, plan: Plan, request: Request, commits: tuple[str, ...]) -> None:
        """Take over a plan: it must agree with what is open, and with the other processes."""
        plan = self._merge(plan, request)
        if plan.distributed and self.collectives is None:
            self._open_group(plan)
        elif self.collectives is not None and plan.fingerprint() != self.plan.fingerprint():
            self._compare(plan)
        self.plan = plan
        self.committed.update(slot for slot in commits if plan[slot].choice)
        exchange.use_group(
            self.collectives,
            self.topology.rank,
            self.topology.world_size,
            self.device,
            debug=self.debug,
        )
        DistributedType.register(plan.distributed_type)
        self._report(plan)

    def check_handlers(self, handlers: Iterable[Any]) -> None:
        """Refuse handlers that nothing installed reads, and two of one kind: what is asked for is never ignored.

        Settings of a strategy that was not chosen are fine: the same script runs in one process and in many.

        Raises:
            ConfigurationError: naming the handler.
        """
        seen: set[type] = set()
        for handler in handlers:
            kind = type(handler)
            if kind in seen:
                raise ConfigurationError(
                    f"kwargs_handlers has two {kind.__name__}", hint="give one of each kind"
                )
            seen.add(kind)
            general = kind.__module__ == KwargsHandler.__module__
            if not general and not self.installed.configured_by(handler):
                raise ConfigurationError(
                    f"kwargs_handlers has a {kind.__name__}, which no installed plugin reads",
                    hint="leave it out, or install the plugin whose settings it holds",
                )

    def _check_timeout(self, request: Request) -> None:
        asked = first_of(request.handlers, InitProcessGroupKwargs).timeout
        if asked is not None and asked != self.timeout:
            raise ConfigurationError(
                f"{request.asked_by} asks for a timeout of {asked}",
                found=f"the processes have met already, with a timeout of {self.timeout}",
                hint="give it where the run begins, or set TORCHPORT_TIMEOUT",
            )

    def _merge(self, plan: Plan, request: Request) -> Plan:
        """Keep what is committed, and refuse to be asked for something else."""

        def same(kept: Decision, decision: Decision) -> bool:
            return (kept.choice, kept.config) == (decision.choice, decision.config)

        decisions = []
        for decision in plan.decisions:
            kept = self.plan[decision.slot]
            if decision.slot not in self.committed:
                decisions.append(decision)
            elif request.arguments.get(decision.slot) is None or same(kept, decision):
                decisions.append(kept)
            else:
                raise ConfigurationError(
                    f"{decision.source} asks for another {decision.slot} than the run that is open",
                    found=f"{kept.name!r} ({kept.source})",
                    hint="give the same choice everywhere, or start anew: AcceleratorState._reset_state()",
                )
        return dataclasses.replace(plan, decisions=tuple(decisions), **self._mesh_of(plan, request))

    def _mesh_of(self, plan: Plan, request: Request) -> dict[str, Any]:
        """Keep the mesh over which models are laid out already, and refuse to be asked for another."""
        here = self.plan
        if "strategy" not in self.committed:
            return {}
        if request.parallelism is not None and plan.parallelism != here.parallelism:
            asked = plan.parallelism.describe() if plan.parallelism is not None else "no mesh"
            found = here.parallelism.describe() if here.parallelism is not None else "no mesh"
            raise ConfigurationError(
                f"{request.asked_by} asks for another parallelism_config than the run that is open ({asked})",
                found=found,
                hint="give the same everywhere, or start anew: AcceleratorState._reset_state()",
            )
        return {"parallelism": here.parallelism, "parallelism_source": here.parallelism_source}

    def _open_group(self, plan: Plan) -> None:
        collectives: Collectives = build(plan["collectives"])
        if Runtime.store is None:
            Runtime.store = collectives.rendezvous(self.topology, self.timeout)
        self._compare(plan)
        prefix = f"torchport/group/{Runtime.generation}"
        group_store = dist.PrefixStore(prefix, Runtime.store)  # type: ignore[attr-defined]
        collectives.open(self.topology, self.device, self.timeout, group_store)
        self.collectives = collectives
        atexit.register(self._close_at_exit)

    def _compare(self, plan: Plan) -> None:
        """Compare plans with the other processes before anything else is exchanged."""
        Runtime.generation += 1
        if self.topology.world_size > 1 and Runtime.store is not None:
            compare_plans(plan, Runtime.store, f"torchport/plan/{Runtime.generation}")

    def _report(self, plan: Plan) -> None:
        if self.topology.rank == 0:
            for sentence in (*plan.warnings, *plan.overrides):
                if sentence not in _reported:
                    _reported.add(sentence)
                    print(f"torchport: {sentence}", file=sys.stderr)  # noqa: T201

    def context(self, precision: Precision, accumulation_steps: int, handlers: Iterable[Any]) -> RunContext:
        """Describe the run to strategies and precisions."""
        return RunContext(
            device=self.device,
            topology=self.topology,
            backend=self.backend,
            collectives=self.collectives,
            precision=precision,
            accumulation_steps=accumulation_steps,
            handlers=tuple(handlers),
            parallelism=self.plan.parallelism,
        )

    def precision(self) -> Precision:
        """Build the plan's precision."""
        precision: Precision = build(self.plan["precision"])
        return precision

    def strategy(self) -> Strategy:
        """Build the plan's strategy."""
        strategy: Strategy = build(self.plan["strategy"])
        strategy.parallelism = self.plan.parallelism
        return strategy

    def close(self) -> None:
        """Leave the process group and forget the run; what needs the other processes is refused from now on."""
        if self.closed:
            return
        self.closed = True
        collectives, self.collectives = self.collectives, None
        if Runtime.current is self:
            Runtime.current = None
            end = exchange.end_group if self.topology.world_size > 1 else exchange.reset_group
            end()
        if collectives is not None:
            collectives.close()
            atexit.unregister(self._close_at_exit)

    def check_open(self, wanted: str) -> None:
        """Refuse what takes all processes where the run of several has ended.

        Args:
            wanted: What is to be done, as an error names it.

        Raises:
            OperationError: if it has.
        """
        if self.closed and self.topology.world_size > 1:
            raise exchange.run_has_ended(wanted)

    def _close_at_exit(self) -> None:
        """Leave the group when the script ends well; after an error, the others must notice at once."""
        if getattr(sys, "last_value", None) is None:
            self.close()


_reported: set[str] = set()


def resolve(request: Request) -> tuple[Plan, Installed]:
    """Discover what is installed and resolve a plan for this process."""
    environ = translate_environment(os.environ)
    installed = discover(environ)
    return plan(request, environ, installed, detect_topology(environ, installed)), installed


def current_topology() -> Topology:
    """Return the place of this process in its job, whether or not a run is open."""
    if Runtime.current is not None:
        return Runtime.current.topology
    environ = translate_environment(os.environ)
    return detect_topology(environ, discover(environ))


def compare_plans(plan: Plan, store: Store, prefix: str) -> None:
    """Compare this process's plan with those of all others through their common store.

    Rank 0 collects and publishes the verdict; each rank acknowledges it, so that the store outlives its readers.

    Raises:
        PlanMismatchError: on every process, naming the slots and ranks that differ.
    """
    topology = plan.topology
    store.set(f"{prefix}/{topology.rank}", json.dumps(plan.fingerprint()))
    if topology.rank == 0:
        keys = [f"{prefix}/{rank}" for rank in range(topology.world_size)]
        plans = [json.loads(_wait_for(store, key)) for key in keys]
        store.set(f"{prefix}/verdict", json.dumps(_differences(plans)))
    differences = json.loads(_wait_for(store, f"{prefix}/verdict"))
    if not differences:
        return
    store.set(f"{prefix}/read/{topology.rank}", "1")
    if topology.rank == 0:
        store.wait([f"{prefix}/read/{rank}" for rank in range(topology.world_size)])
    raise PlanMismatchError(
        "the processes of this job have resolved different plans",
        found="; ".join(differences),
        reason="every process must work with the same choices",
        hint="give all processes the same environment and arguments: `torchport plan` on each machine shows why",
    )


def _wait_for(store: Store, key: str) -> bytes:
    try:
        value: bytes = store.get(key)
    except RuntimeError as error:  # torch's DistStoreError, after the timeout
        who = key.rsplit("/", 1)[1]
        raise PlanMismatchError(
            "the processes of this job could not compare their plans",
            found="rank 0 has not answered" if who == "verdict" else f"rank {who} has not come",
            reason="only some processes made an Accelerator or a state with these arguments, or one has ended",
            hint="make it on every process",
        ) from error
    return value


def _differences(plans: list[dict[str, str]]) -> list[str]:
    """Describe each slot on which ranks differ, grouping ranks by choice."""
    described = []
    for slot in plans[0]:
        choices: dict[str, list[int]] = {}
        for rank, fingerprint in enumerate(plans):
            choices.setdefault(fingerprint.get(slot, "-"), []).append(rank)
        if len(choices) > 1:
            groups = ", ".join(
                f"{choice!r} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for choice, ranks in choices.items()
            )
            described.append(f"{slot}: {groups}")
    return described


def _timeout(request: Request) -> timedelta:
    handler = first_of(request.handlers, InitProcessGroupKwargs)
    if handler.init_method not in (None, "env://"):
        raise ConfigurationError(
            f"InitProcessGroupKwargs(init_method={handler.init_method!r}) cannot be honoured",
            reason="the launcher says where processes meet",
            hint="set MASTER_ADDR and MASTER_PORT instead",
        )
    if handler.timeout is not None:
        return read_timeout(handler.timeout, "InitProcessGroupKwargs(timeout=...)")
    seconds = os.environ.get(envvars.TIMEOUT)
    return read_timeout(seconds, envvars.TIMEOUT) if seconds else DEFAULT_TIMEOUT
