"""Runs the checks of plugins, in this process and in jobs, to a scorecard. Imports no torch by itself."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchport.errors import TorchportError
from torchport.plan.registry import CORE
from torchport.plugin.requirements import name_of
from torchport.testing.checks import HERE, ONE, PHASES, SEVERAL, Check, Place, Subject, catalogue, everything
from torchport.testing.jobs import Ended, job_environment, launch_command, run_job
from torchport.testing.scorecard import FAIL, NOT_CLAIMED, PASS, Result, Scorecard
from torchport.testing.worker import in_words, outcome_of

_START = 120.0
"""Seconds that the processes of a job may take to start, beyond the time of a check."""

_MOST_JOBS = 8
"""Most jobs of one phase: after each that ends early, a new one goes on behind the check that ended it."""

DYING = "dying"
"""What a process writes down before a check makes it end, or may make it end."""


@dataclass
class Task:
    """Checks of one subject, and what is known of them.

    Attributes:
        subject: The plugin.
        checks: Its checks.
        parts: Outcome and reason of each part that has been done, by check and phase.
        suite: The author's own suite.
    """

    subject: Subject
    checks: list[Check]
    parts: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    suite: Any = None

    def open(self, phase: str) -> list[str]:
        """Return the checks whose part of this phase is still to be done, and whose earlier parts went well."""
        return [
            check.id
            for check in self.checks
            if phase in check.parts
            and phase not in self.parts.get(check.id, {})
            and all(outcome == PASS for outcome, _ in self.parts.get(check.id, {}).values())
        ]

    def note(self, check: str, phase: str, outcome: str, reason: str) -> None:
        """Keep the outcome of a part."""
        self.parts.setdefault(check, {})[phase] = (outcome, reason)

    def results(self) -> list[Result]:
        """Put the parts of each check together: one that failed counts before one that is not claimed."""
        made = []
        for check in self.checks:
            parts = self.parts.get(check.id, {})
            outcome, reason = PASS, ""
            for wanted in (FAIL, NOT_CLAIMED):
                found = [why for result, why in parts.values() if result == wanted]
                if found:
                    outcome, reason = wanted, found[0]
                    break
            else:
                if set(parts) != set(check.parts):
                    outcome, reason = FAIL, f"only these parts of it were done: {sorted(parts)}"
            made.append(Result(check.id, check.level, check.title, outcome, reason))
        return made


def run_tasks(
    tasks: Sequence[Task], *, jobs: bool = True, tell: Callable[[str], None] = lambda text: None
) -> None:
    """Do all parts of the checks of some tasks; tasks of one call share jobs, so launcher and processes must agree.

    Args:
        tasks: What to do; their `parts` are filled.
        jobs: Whether to start processes. If not, checks of one process run in this one, and others are not claimed.
        tell: Called with one sentence for each job.
    """
    with tempfile.TemporaryDirectory(prefix="torchport-conformance-") as name:
        folder = Path(name)
        for number, task in enumerate(tasks):
            shared = folder / f"task{number}"
            shared.mkdir()
            _ask(task)
            _do_here(task, Place(HERE, shared, suite=task.suite))
            if not jobs:
                _do_here(task, Place(ONE, shared, forks=False, suite=task.suite))
                _leave_jobs(task)
        for phase in PHASES if jobs else ():
            _do_phase(tasks, phase, folder, tell)


def _leave_jobs(task: Task) -> None:
    """Note that what takes several processes, or a process that is killed, was not run."""
    for check in task.checks:
        if not check.parts.keys() <= {HERE, ONE}:
            task.note(
                check.id, HERE, NOT_CLAIMED, "a stub stands for the vendor's modules in one process only"
            )


def _missing(subject: Subject) -> str:
    """Say why the subject, or the backend to test it on, cannot be used here; empty if it can.

    Empty too where its jobs have variables that this process has not: they say so themselves.
    """
    if subject.environ:
        return ""
    installed = everything()
    for kind, name in ((subject.kind, subject.name), ("backend", subject.backend)):
        if name:
            try:
                probe = installed.probe(installed.find(kind, name, "the conformance kit").spec)
            except TorchportError as error:
                return str(error)
            if not probe.available:
                return f"the {kind} {name!r} is not available here: {probe.reason}"
    return ""


def _ask(task: Task) -> None:
    """Note what the subject does not claim, and that it is not available, as far as that can be told beforehand."""
    missing = _missing(task.subject)
    for check in task.checks:
        if missing and check.level != "L0":
            task.note(check.id, HERE, FAIL, missing)
            continue
        try:
            reason = check.unclaimed(task.subject) if check.unclaimed is not None else ""
        except Exception as error:
            task.note(check.id, HERE, FAIL, in_words(error))
            continue
        if reason:
            task.note(check.id, HERE, NOT_CLAIMED, reason)


def _do_here(task: Task, place: Place) -> None:
    wanted = set(task.open(place.phase))
    for bench in dict.fromkeys(check.bench for check in task.checks if check.id in wanted):
        group = [check for check in task.checks if check.bench is bench and check.id in wanted]
        with contextlib.ExitStack() as stack:
            try:
                opened = stack.enter_context(bench(task.subject, place))
            except Exception as error:
                for check in group:
                    task.note(check.id, place.phase, FAIL, in_words(error))
                continue
            for check in group:
                outcome, reason = outcome_of(check.parts[place.phase], opened)
                task.note(check.id, place.phase, outcome, reason)
                if hasattr(opened, "after_check"):
                    opened.after_check(outcome == FAIL)


def _do_phase(tasks: Sequence[Task], phase: str, folder: Path, tell: Callable[[str], None]) -> None:
    """Run jobs until nothing of a phase is left to do."""
    first = tasks[0].subject
    processes = first.processes if phase in PROCESSES else 1
    limit = max(task.subject.timeout for task in tasks)
    for attempt in range(_MOST_JOBS):
        wanted = [task.open(phase) for task in tasks]
        if not any(wanted):
            return
        count = sum(map(len, wanted))
        tell(f"{count} checks in a job of {processes} process{'es' * (processes > 1)} ({phase})")
        name = f"{phase}{attempt}"
        job = {
            "folder": str(folder),
            "name": name,
            "phase": phase,
            "processes": processes,
            "tasks": [
                {"subject": t.subject.to_json(), "checks": w} for t, w in zip(tasks, wanted, strict=True)
            ],
        }
        description = folder / f"{name}.json"
        description.write_text(json.dumps(job))
        diaries = [folder / f"{name}.rank{rank}.jsonl" for rank in range(processes)]
        ended = _launch(first, processes, description, diaries, limit)
        _read(tasks, phase, diaries, ended, limit)
    for task in tasks:
        for check in task.open(phase):
            task.note(check, phase, FAIL, f"not reached: {_MOST_JOBS} jobs ended before it")


PROCESSES = (SEVERAL, "late")
"""The phases whose jobs have several processes."""


def _launch(subject: Subject, processes: int, job: Path, diaries: Sequence[Path], limit: float) -> Ended:
    """Start the processes of a job; they share what there is to write, and what they write shows that they go on."""

    def written() -> tuple[int, ...]:
        return tuple(path.stat().st_size if path.exists() else 0 for path in diaries)

    environ = job_environment(subject.environ)
    options = ["--quiet"] if processes > 1 else []
    command = launch_command(processes, *options, launcher=subject.launcher if processes > 1 else "")
    command += ["--module", "torchport.testing.worker", str(job)]
    return run_job(command, environ=environ, limit=max(limit, _START), progress=written, cwd=job.parent)


def _read(tasks: Sequence[Task], phase: str, diaries: Sequence[Path], ended: Ended, limit: float) -> None:
    """Take note of what the ranks of a job have written down, and of the check that ended it, if one did."""
    done: dict[tuple[int, str], dict[int, tuple[str, str]]] = {}
    begun: dict[tuple[int, str], set[int]] = {}
    dying: set[tuple[int, str]] = set()
    for rank, path in enumerate(diaries):
        for line in path.read_text().splitlines() if path.exists() else ():
            event = json.loads(line)
            key = (event["task"], event["check"])
            if event["event"] == "begin":
                begun.setdefault(key, set()).add(rank)
            elif event["event"] == DYING:
                dying.add(key)
            else:
                done.setdefault(key, {})[rank] = (event["outcome"], event["reason"])
    told = ended.in_words(max(limit, _START))
    for key in dict.fromkeys(
        (*begun, *done)
    ):  # where a bench cannot be opened, its checks end without a beginning
        ranks = done.get(key, {})
        outcome, reason = _of_all(ranks, len(diaries))
        if len(ranks) < len(diaries):
            if key in dying and not ended.hung:
                outcome, reason = (PASS, "") if outcome != FAIL else (outcome, reason)
            elif outcome != FAIL:
                outcome, reason = FAIL, told
        tasks[key[0]].note(key[1], phase, outcome, reason)
    if not begun:
        for task in tasks:
            for check in task.open(phase):
                task.note(check, phase, FAIL, told)


def _of_all(ranks: Mapping[int, tuple[str, str]], processes: int) -> tuple[str, str]:
    """Put the outcomes of all ranks together."""
    for wanted in (FAIL, NOT_CLAIMED):
        found = {rank: reason for rank, (outcome, reason) in sorted(ranks.items()) if outcome == wanted}
        if found and (wanted == FAIL or len(found) == processes):
            reasons = dict.fromkeys(found.values())
            if processes == 1 or (len(reasons) == 1 and len(found) == processes):
                return wanted, next(iter(reasons))
            return wanted, "; ".join(f"rank {rank}: {reason}" for rank, reason in found.items())
        if found:
            return FAIL, f"only some ranks do not claim it: {found}"
    return PASS, ""


def run(
    subject: Subject,
    ids: Iterable[str] | None = None,
    *,
    suite: Any = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Scorecard:
    """Run the checks of a plugin.

    Args:
        subject: The plugin, and how to test it.
        ids: The checks to run; by default all of the subject's levels.
        suite: The author's own suite.
        tell: Called with one sentence for each job.
    """
    wanted = None if ids is None else set(ids)
    checks = [check for check in catalogue(subject) if wanted is None or check.id in wanted]
    task = Task(subject, checks, suite=suite)
    run_tasks([task], tell=tell)
    return scorecard(subject, task.results())


def scorecard(subject: Subject, results: Iterable[Result]) -> Scorecard:
    """Put results together with the date, the versions and the machine."""
    installed = everything()
    device = (
        subject
        if subject.kind == "backend"
        else subject.backend and Subject(kind="backend", name=subject.backend)
    )
    versions = {"python": platform.python_version(), CORE: _version(CORE), "torch": _version("torch")}
    name, count, summary = "", 0, ""
    with contextlib.suppress(TorchportError):
        entry = subject.entry
        summary = entry.spec.summary
        versions[entry.plugin.distribution] = entry.plugin.version
        for text in entry.spec.runtime:
            versions[name_of(text) or text] = _version(name_of(text) or text)
    if device:
        with contextlib.suppress(TorchportError):
            probe = installed.probe(device.entry.spec)
            name, count = _device_name(probe.details, device.name), probe.count
    settings: dict[str, Any] = {
        "backend": subject.backend if subject.kind != "backend" else "",
        "collectives": subject.collectives if subject.kind != "collectives" else "",
        "launcher": subject.launcher,
        "environ": dict(subject.environ),
    }
    return Scorecard(
        kind=subject.kind,
        name=subject.name,
        summary=summary,
        verified_on=subject.verified_on,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        versions=versions,
        platform=f"{platform.system()} {platform.machine()}",
        device_name=name,
        device_count=count,
        settings={key: value for key, value in settings.items() if value},
        results=tuple(results),
    )


def _device_name(details: Mapping[str, str], otherwise: str) -> str:
    """Return the first detail of a probe that looks like the name of a device."""
    for key in ("device", "devices", "name", "processor"):
        if details.get(key):
            return str(details[key])
    return otherwise


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
