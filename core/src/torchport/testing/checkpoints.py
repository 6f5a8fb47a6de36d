"""Level L4: checkpoints hold everything, survive a kill, and load with another number of processes."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from torchport.accelerator import Accelerator
from torchport.testing.checks import AGAIN, KILLED, ONE, SEVERAL, Check, Subject, everything, require
from torchport.testing.claims import training_unclaimed
from torchport.testing.training import Run, combinations, data, default_precision, training_bench

_KILLED_AT = 2
"""The flush to the disk, counted from the beginning of a save, at which the process is killed."""


def checks(subject: Subject) -> list[Check]:
    """Return the checks of this level."""
    made: list[Check] = []

    def add(id: str, title: str, parts: dict[str, Callable[[Run], None]], *claim: Any) -> None:
        made.append(Check(id, "L4", title, parts, training_bench, training_unclaimed(*claim)))

    normal = subject.precisions[0] if subject.kind == "precision" else default_precision()
    for strategy, precision, processes in combinations(subject):
        phase = ONE if processes == 1 else SEVERAL
        label = f"{strategy}.{precision}.{processes}"
        words = f"{strategy}, {precision}, {processes} process{'es' * (processes > 1)}"
        claim = (strategy, precision, processes)
        if precision == normal:
            part = functools.partial(_round_trip, label=label, strategy=strategy, precision=precision)
            add(f"round-trip.{label}", f"what is saved is loaded, all of it ({words})", {phase: part}, *claim)
        part = functools.partial(_resume, label=label, strategy=strategy, precision=precision)
        add(
            f"resume.{label}",
            f"a resumed run goes on as if it had not stopped ({words})",
            {phase: part},
            *claim,
        )
    one, several = _strategies(subject)
    for strategy in dict.fromkeys((one, several)) if subject.kind == "strategy" else (one,):
        before = functools.partial(_save_and_die, strategy=strategy, precision=normal)
        after = functools.partial(_load_after_kill, strategy=strategy, precision=normal)
        words = "killed while it saves, a process leaves the checkpoint before whole"
        add(f"kill-mid-save.{strategy}", words, {KILLED: before, AGAIN: after}, strategy, normal, 1)
    for name, first, second in (
        (f"1-to-{subject.processes}", (ONE, one), (SEVERAL, several)),
        (f"{subject.processes}-to-1", (SEVERAL, several), (AGAIN, one)),
    ):
        save = functools.partial(_save, name=name, strategy=first[1], precision=normal)
        load = functools.partial(_load, name=name, strategy=second[1], precision=normal)
        words = f"a checkpoint of {first[1]} loads under {second[1]} with another number of processes"
        claim = (several, normal, subject.processes)
        add(f"reshard.{name}", words, {first[0]: save, second[0]: load}, *claim)
    return made


def _strategies(subject: Subject) -> tuple[str, str]:
    """Return the strategies for one process and for several: the subject's, or else the core's that fits."""
    chosen = []
    for processes in (1, subject.processes):
        specs = [
            everything().find("strategy", name, "the conformance kit").spec for name in subject.strategies
        ]
        core = sorted(everything().specs("strategy"), key=lambda spec: -int(spec.priority))
        fitting = [
            s.name for s in (*specs, *core) if processes <= (getattr(s, "max_processes", 0) or processes)
        ]
        wanted = [s.name for s in specs if s.name in fitting and processes >= getattr(s, "min_processes", 1)]
        chosen.append((wanted or fitting)[0])
    return chosen[0], chosen[1]


class Training:
    """A small training with everything that a checkpoint must hold: momentum, a schedule, random numbers, an order.

    Args:
        run: The job.
        strategy: Name of the strategy.
        precision: Name of the precision.
        seed: What the weights and the random numbers begin with.
    """

    def __init__(self, run: Run, strategy: str, precision: str, seed: int = 3) -> None:
        self.accelerator: Accelerator = run.accelerator(strategy, precision)
        torch.manual_seed(seed)
        self.accelerator._runtime.backend.seed(seed)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 16))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        share = self.accelerator._contents.strategy.data_share(self.accelerator._runtime.topology)[1]
        loader = DataLoader(data(), batch_size=16 // share, shuffle=True)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )

    def epoch(self) -> list[float]:
        """Train for one pass over the data; return the losses of this process."""
        losses = []
        for inputs, targets in self.loader:
            loss = nn.functional.mse_loss(self.model(inputs).float(), targets)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        """Return the whole states, as plain values; on other ranks than 0 perhaps only a part."""
        strategy = self.accelerator._contents.strategy
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        states = {
            "model": self.accelerator.get_state_dict(self.model),
            "optimizer": strategy.optimizer_state_dict(self.model, inner),
            "scheduler": self.scheduler.state_dict(),
            "precision": self.accelerator._context.precision.state_dict(),
        }
        return {name: _plain(value) for name, value in states.items()}


def _plain(value: Any) -> Any:
    """Copy a state, its tensors to the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _difference(actual: Any, expected: Any, where: str) -> str:
    """Name the first place at which two states differ; empty if they are the same, bit by bit."""
    if isinstance(expected, torch.Tensor):
        same = (
            isinstance(actual, torch.Tensor)
            and actual.dtype == expected.dtype
            and torch.equal(actual, expected)
        )
        return "" if same else where
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or actual.keys() != expected.keys():
            return f"{where} (its keys)"
        return next(
            (d for k in expected if (d := _difference(actual[k], expected[k], f"{where}[{k!r}]"))), ""
        )
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return f"{where} (its length)"
        return next(
            (d for i, e in enumerate(expected) if (d := _difference(actual[i], e, f"{where}[{i}]"))), ""
        )
    return "" if actual == expected else f"{where}: {actual!r} instead of {expected!r}"


def _same(actual: dict[str, Any], expected: dict[str, Any], parts: tuple[str, ...]) -> None:
    for part in parts:
        differs = _difference(actual[part], expected[part], part)
        require(not differs, f"not as it was saved: {differs}")


_ALL = ("model", "optimizer", "scheduler", "precision")
_WHOLE = ("model", "optimizer")
"""What must be the same under another number of processes: schedules may count processes."""


def _draws(training: Training) -> list[float]:
    """Draw random numbers on the host and on the device."""
    device: list[float] = torch.rand(4, device=training.accelerator.device).cpu().tolist()
    return [*torch.rand(4).tolist(), *device]


def _folder(run: Run, name: str) -> Path:
    return run.place.folder / f"checkpoint-{name}"


def _round_trip(run: Run, *, label: str, strategy: str, precision: str) -> None:
    """Save, train on, load, and compare everything with what was there when it was saved."""
    training = Training(run, strategy, precision)
    training.epoch()
    folder = _folder(run, f"round-trip-{label}")
    training.accelerator.save_state(str(folder))
    expected, numbers = training.state(), _draws(training)
    momenta = [t for t in _tensors(expected["optimizer"]) if t.is_floating_point() and t.numel() > 1]
    require(momenta or run.place.rank, "the saved state of the optimizer has no momenta")
    training.epoch()
    training.accelerator.load_state(str(folder))
    _same(training.state(), expected, _ALL)
    require(_draws(training) == numbers, "other random numbers follow than after it was saved")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _resume(run: Run, *, label: str, strategy: str, precision: str) -> None:
    """Train two epochs with a save between them; then load into new objects and train the second again."""
    folder = _folder(run, f"resume-{label}")
    training = Training(run, strategy, precision)
    training.epoch()
    training.accelerator.save_state(str(folder))
    losses, expected = training.epoch(), training.state()
    resumed = Training(run, strategy, precision, seed=99)
    resumed.accelerator.load_state(str(folder))
    found = resumed.epoch()
    require(found == losses, f"the resumed run has the losses {found} instead of {losses}")
    _same(resumed.state(), expected, _ALL)


def _save_and_die(run: Run, *, strategy: str, precision: str) -> None:
    """Save twice to the same place, and be killed during the second save, between two files."""
    training = Training(run, strategy, precision)
    folder = _folder(run, f"kill-{strategy}")
    training.epoch()
    training.accelerator.save_state(str(folder))
    torch.save(training.state(), run.place.folder / f"kill-{strategy}.pt")
    training.epoch()
    flush, flushed = os.fsync, 0

    def die(descriptor: Any) -> None:
        nonlocal flushed
        flushed += 1
        if flushed >= _KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    run.place.tell("dying")
    os.fsync = die  # type: ignore[assignment]
    try:
        training.accelerator.save_state(str(folder))
    finally:
        os.fsync = flush
    require(False, f"the save flushed {flushed} files: a crash of the machine may lose the others")


def _load_after_kill(run: Run, *, strategy: str, precision: str) -> None:
    """Load what the killed process had saved before."""
    training = Training(run, strategy, precision, seed=99)
    training.accelerator.load_state(str(_folder(run, f"kill-{strategy}")))
    expected = torch.load(run.place.folder / f"kill-{strategy}.pt", weights_only=True)
    _same(training.state(), expected, _ALL)


def _save(run: Run, *, name: str, strategy: str, precision: str) -> None:
    """Save a checkpoint for another number of processes."""
    training = Training(run, strategy, precision)
    training.epoch()
    training.accelerator.save_state(str(_folder(run, name)))
    state = training.state()
    if run.place.rank == 0:
        torch.save({part: state[part] for part in _WHOLE}, run.place.folder / f"{name}.pt")


def _load(run: Run, *, name: str, strategy: str, precision: str) -> None:
    """Load it."""
    training = Training(run, strategy, precision, seed=99)
    training.accelerator.load_state(str(_folder(run, name)))
    state = training.state()
    if run.place.rank == 0:
        _same(state, torch.load(run.place.folder / f"{name}.pt", weights_only=True), _WHOLE)
    training.epoch()
