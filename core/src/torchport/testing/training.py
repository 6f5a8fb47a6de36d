"""Level L3: training gives what one process of plain PyTorch on the CPU gives in float32."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchport.accelerator import Accelerator
from torchport.config.kwargs import GradScalerKwargs
from torchport.plugin.specs import StrategySpec
from torchport.state import PartialState
from torchport.testing.checks import ONE, SEVERAL, Check, Place, Subject, everything, require
from torchport.testing.claims import training_unclaimed

SAMPLES, BATCH, EPOCHS = 64, 16, 2
"""Samples, samples of one optimizer step over all processes, and passes over the data."""

MICRO_BATCHES = 2
"""Micro-batches of one step in the checks of accumulation and clipping."""

MAX_NORM = 0.6
"""The total norm to which gradients are clipped: exceeded in the first steps of this training, not in the last."""

ROUNDINGS = 4
"""Roundings to the compute dtype that a value passes through on its way: input, weight, product, gradient."""

SUMMED = 64
"""Terms of the longest sums, which are taken in float32 in any order."""


@dataclass
class Run:
    """A job that trains.

    Attributes:
        subject: The plugin under test.
        place: This process.
    """

    subject: Subject
    place: Place

    def accelerator(self, strategy: str, precision: str, **settings: Any) -> Accelerator:
        """Make an accelerator of its own for a check."""
        PartialState._reset_state()
        several = self.place.world_size > 1
        chosen: dict[str, Any] = {"collectives": self.subject.collectives or None} if several else {}
        return Accelerator(
            backend=self.subject.backend,
            strategy=strategy or None,
            precision=precision,
            kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)],
            **chosen,
            **settings,
        )

    def after_check(self, failed: bool) -> None:
        """End the run; the next check meets the other ranks anew."""
        PartialState._reset_state()


@contextmanager
def training_bench(subject: Subject, place: Place) -> Iterator[Run]:
    """Give checks the job."""
    try:
        yield Run(subject, place)
    finally:
        PartialState._reset_state()


def default_precision() -> str:
    """Name the precision that is chosen automatically."""
    return next(str(spec.name) for spec in everything().specs("precision") if spec.default)


def combinations(subject: Subject) -> Iterator[tuple[str, str, int]]:
    """Yield strategy, precision and number of processes of everything that is trained for a subject.

    A strategy that is chosen automatically for several processes only is not run in one.
    """
    precisions = (default_precision(),) if subject.kind == "collectives" else subject.precisions
    sizes = (subject.processes,) if subject.kind == "collectives" else (1, subject.processes)
    for name in subject.strategies:
        spec = everything().find("strategy", name, "the conformance kit").spec
        assert isinstance(spec, StrategySpec)
        for processes in sizes:
            if processes >= spec.min_processes and processes <= (spec.max_processes or processes):
                for precision in precisions:
                    yield name, precision, processes


def checks(subject: Subject) -> list[Check]:
    """Return the checks of this level."""
    made = []
    for strategy, precision, processes in combinations(subject):
        phase = ONE if processes == 1 else SEVERAL
        words = f"{strategy}, {precision}, {processes} process{'es' * (processes > 1)}"
        for name, title, options in _KINDS:
            part = functools.partial(_train, strategy=strategy, precision=precision, **options)
            check = Check(
                f"{name}.{strategy}.{precision}.{processes}",
                "L3",
                f"{title} ({words})",
                {phase: part},
                training_bench,
                training_unclaimed(strategy, precision, processes),
            )
            made.append(check)
    return made


_KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("training", "losses and parameters are those of one big batch on the CPU", {}),
    ("accumulation", "two micro-batches make the step that one batch makes", {"accumulate": True}),
    (
        "clipping",
        "gradients are clipped by the norm over all parts of the model",
        {"accumulate": True, "clip": True},
    ),
)


def data() -> TensorDataset:
    """Return the samples: 16 numbers each, and 16 to predict."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(SAMPLES, 16, generator=generator)
    return TensorDataset(inputs, torch.sin(inputs.roll(1, dims=1)) * 2)


def network() -> nn.Module:
    """Return the model, the same each time; the sizes of its layers are multiples of 16."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


@dataclass
class Course:
    """What a training went through.

    Attributes:
        losses: The loss of each step over all processes.
        norms: The total norm of the gradients before each step, where they are clipped.
        weights: The state of the model afterwards; empty on ranks that do not have it.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def _reference(clip: bool) -> Course:
    """Train by hand, in one process, in float32, on the CPU."""
    model = network()
    optimizer = optimizer_of(model)
    losses, norms = [], []
    for _ in range(EPOCHS):
        for inputs, targets in DataLoader(data(), batch_size=BATCH):
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if clip:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return Course(losses, norms, model.state_dict())


def _train(run: Run, *, strategy: str, precision: str, accumulate: bool = False, clip: bool = False) -> None:
    """Train as users do, and compare."""
    steps = MICRO_BATCHES if accumulate else 1
    accelerator = run.accelerator(strategy, precision, gradient_accumulation_steps=steps)
    model = network()
    share = accelerator._contents.strategy.data_share(accelerator._runtime.topology)[1]
    loader = DataLoader(data(), batch_size=BATCH // steps // share)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    losses: list[float] = []
    norms: list[float] = []
    window: list[float] = []
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            require(inputs.device == accelerator.device, f"a batch is on {inputs.device}")
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs).float(), targets)
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))  # type: ignore[arg-type]
                optimizer.step()
                optimizer.zero_grad()
            window.append(accelerator.gather(loss.detach()).float().mean().item())
            if accelerator.sync_gradients:
                require(not accelerator.optimizer_step_was_skipped, f"step {len(losses)} was skipped")
                losses.append(sum(window) / len(window))
                window.clear()
    course = Course(losses, norms, accelerator.get_state_dict(model))
    _compare(course, _reference(clip), tolerance(run, accelerator), run.place.rank)


def tolerance(run: Run, accelerator: Accelerator) -> float:
    """Return the greatest relative difference that the number format explains."""
    if run.subject.tolerance:
        return run.subject.tolerance
    dtype = accelerator._context.precision.compute_dtype or torch.float32
    return ROUNDINGS * torch.finfo(dtype).eps / 2 + SUMMED * torch.finfo(torch.float32).eps / 2


def _compare(found: Course, expected: Course, limit: float, rank: int) -> None:
    """Compare two trainings."""
    for what, actual, wanted in (
        ("losses", found.losses, expected.losses),
        ("norms of the gradients", found.norms, expected.norms),
    ):
        require(len(actual) == len(wanted), f"there are {len(actual)} {what} instead of {len(wanted)}")
        worst = max((abs(a - w) / w for a, w in zip(actual, wanted, strict=True)), default=0.0)
        shown = f"{[round(value, 6) for value in actual]} instead of {[round(value, 6) for value in wanted]}"
        require(worst <= limit, f"the {what} differ by {worst:.1e} (tolerance {limit:.1e}): {shown}")
    if not found.weights and rank:
        return  # the whole state is on rank 0
    names = sorted(found.weights)
    require(found.weights.keys() == expected.weights.keys(), f"the model's state has the names {names}")
    for name, weight in expected.weights.items():
        actual_weight = found.weights[name].detach().cpu().float()
        require(actual_weight.shape == weight.shape, f"{name} has shape {tuple(actual_weight.shape)}")
        difference = ((actual_weight - weight).abs().max() / weight.abs().max()).item()
        require(
            difference <= limit, f"after training {name} differs by {difference:.1e} (tolerance {limit:.1e})"
        )
