"""Level L1 for backends: devices, placement, random numbers, and what the runtime wants to be told in a step."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from torchport.plan.registry import load_reference
from torchport.plugin.backend import Backend
from torchport.plugin.specs import BackendSpec, Capabilities, Topology
from torchport.testing.checks import (
    Check,
    Checks,
    NotClaimed,
    Place,
    Subject,
    build_plugin,
    everything,
    require,
)

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
"""Names of the dtypes whose values must survive a copy to the device and back."""

_CHILD = 60.0
"""Seconds that a forked process may take to use the device."""


@dataclass
class Device:
    """The first device of a backend.

    Attributes:
        spec: The backend's descriptor.
        backend: The backend.
        capabilities: What it declares.
        device: What it returned for local rank 0.
        folder: A folder for files.
        fork: What went wrong in a process that was forked after the probe.
    """

    spec: BackendSpec
    backend: Backend
    capabilities: Capabilities
    device: torch.device
    folder: Path
    fork: str = ""

    def several(self) -> int:
        """Return the number of devices, or say that there is only one."""
        count = self.backend.count()
        if count < 2:
            raise NotClaimed("this machine has one such device")
        return count


@contextmanager
def device_bench(subject: Subject, place: Place) -> Iterator[Device]:
    """Build a backend and take its first device."""
    entry = subject.entry
    assert isinstance(entry.spec, BackendSpec)
    probe = everything().probe(entry.spec)
    require(probe.available, f"the backend is not available here: {probe.reason}")
    wrong = _forked_use(entry.spec, subject) if place.forks else ""
    backend = build_plugin(entry)
    backend.start_process(Topology())
    yield Device(entry.spec, backend, backend.capabilities(), backend.device(0), place.folder, wrong)


def _forked_use(spec: BackendSpec, subject: Subject) -> str:
    """Probe, fork, and use the device in the child, as data loaders and notebooks do; return what went wrong."""
    if sys.platform == "win32" or not spec.probe:
        return ""
    load_reference(spec.probe)()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            device = build_plugin(subject.entry).device(0)
            code = 0 if float(torch.ones(4, device=device).sum()) == 4.0 else 3
        except BaseException as error:
            sys.stderr.write(f"in a forked process: {type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    deadline = time.monotonic() + _CHILD
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return (
                ""
                if code == 0
                else f"a process forked after the probe cannot use the device (exit status {code})"
            )
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return f"a process forked after the probe hangs when it uses the device ({_CHILD:g} s)"


_checks = Checks("L1", device_bench)


def checks(subject: Subject) -> list[Check]:
    """Return the checks of this level."""
    from torchport.testing import device_formats, device_memory

    return [*_checks, *device_memory.CHECKS, *device_formats.CHECKS]


# --- devices ---------------------------------------------------------------------------------------------


@_checks("device.probe-leaves-runtime-alone", "after the probe, a forked process can still use the device")
def probe_does_not_initialise(bench: Device) -> None:
    """A probe that initialises the runtime breaks every process that is forked later."""
    require(not bench.fork, bench.fork)


@_checks("device.count", "the probe and the backend count the same number of devices, at least one")
def count_agrees(bench: Device) -> None:
    """Compare the number of the backend with that of the probe, by which a launch goes."""
    count, probed = bench.backend.count(), everything().probe(bench.spec).count
    require(isinstance(count, int) and count >= 1, f"count() returned {count!r}")
    require(count == probed, f"count() returned {count}, the probe found {probed}")


@_checks("device.type", "devices have the type that the descriptor names")
def type_is_as_described(bench: Device) -> None:
    """Compare the type."""
    wanted = bench.spec.device_type
    require(isinstance(bench.device, torch.device), f"device(0) returned {bench.device!r}, no torch.device")
    require(bench.device.type == wanted, f"device(0) has type {bench.device.type!r} instead of {wanted!r}")


@_checks("device.index", "each local rank has the device of its own index")
def index_is_the_local_rank(bench: Device) -> None:
    """Local rank r must get device r; a device kind of which there is only one may have no index."""
    count = bench.backend.count()
    indices = [bench.backend.device(rank).index for rank in range(count)]
    bench.backend.device(0)
    alone = count == 1 and indices == [None]
    require(alone or indices == list(range(count)), f"local ranks 0 to {count - 1} got the indices {indices}")


@_checks("device.current", "device(local_rank) makes that device the current one")
def device_becomes_current(bench: Device) -> None:
    """A tensor made on the bare device type lands on the device that was taken last."""
    for rank in range(bench.backend.count()):
        wanted = bench.backend.device(rank)
        made = torch.empty(1, device=bench.spec.device_type).device
        require(
            made.type == wanted.type and made.index == wanted.index,
            f"after device({rank}) a tensor on {bench.spec.device_type!r} is made on {made}",
        )
    bench.backend.device(0)


# --- placement -------------------------------------------------------------------------------------------


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Return eight values on the host that the dtype holds exactly."""
    if dtype == torch.bool:
        return torch.tensor([True, False] * 4)
    return torch.tensor([0, 1, 2, 3, 5, 8, 100, 127]).to(dtype)


@_checks.each("placement.{}", "{} values survive a copy to the device and back, bit by bit", DTYPES)
def values_survive_the_copy(bench: Device, dtype: str) -> None:
    """Copy there and back."""
    values = sample(getattr(torch, dtype))
    placed = values.to(bench.device)
    require(placed.device.type == bench.device.type, f".to({bench.device}) gave a tensor on {placed.device}")
    if bench.device.index is not None:
        require(placed.device == bench.device, f".to({bench.device}) gave a tensor on {placed.device}")
    require(placed.dtype == values.dtype, f"{values.dtype} became {placed.dtype}")
    back = placed.cpu()
    require(torch.equal(back, values), f"{values.tolist()} came back as {back.tolist()}")


@_checks("placement.views", "views, strides and in-place writes work on the device")
def views_work(bench: Device) -> None:
    """Write through a view and read from a transposed tensor."""
    grid = torch.arange(12, dtype=torch.float32, device=bench.device).view(3, 4)
    grid[1, 1:3] += 10
    expected = torch.arange(12, dtype=torch.float32).view(3, 4)
    expected[1, 1:3] += 10
    require(torch.equal(grid.t().cpu(), expected.t()), f"got {grid.t().cpu().tolist()}")
    require(
        torch.equal(grid.t().contiguous().cpu(), expected.t()), "contiguous() of a transposed tensor is wrong"
    )


@_checks("placement.between-devices", "tensors can be copied from each device to each other")
def copies_between_devices(bench: Device) -> None:
    """Copy between all pairs of the first devices."""
    count = min(bench.several(), 4)
    values = torch.arange(1000, dtype=torch.float32)
    devices = [bench.backend.device(rank) for rank in range(count)]
    for source in devices:
        for target in devices:
            copied = values.to(source).to(target)
            require(copied.device == target, f"{source} to {target} gave a tensor on {copied.device}")
            require(torch.equal(copied.cpu(), values), f"{source} to {target} changed values")
    bench.backend.device(0)


@_checks("compute.matches-cpu", "a float32 network and its gradients are those of the CPU, to 1e-5")
def computes_as_the_cpu(bench: Device) -> None:
    """Compare outputs and gradients; sums of 64 terms in float32 differ by about 64 x 2^-24 = 4e-6."""
    torch.manual_seed(0)
    host = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    inputs = torch.randn(16, 64)
    found = []
    for device in (torch.device("cpu"), bench.device):
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        model.load_state_dict(host.state_dict())
        model.to(device)
        outputs = model(inputs.to(device))
        outputs.square().mean().backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        found.append([outputs.detach().cpu(), *gradients])
    for expected, actual in zip(*found, strict=True):
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        require(difference <= 1e-5, f"the greatest relative difference is {difference:.1e}")


@_checks("compute.synchronize", "synchronize waits for queued work")
def synchronize_returns(bench: Device) -> None:
    """After it, values that were queued are there."""
    square = torch.ones(256, 256, device=bench.device)
    for _ in range(4):
        square = square @ square / 256
    bench.backend.synchronize(bench.device)
    require(square.cpu().eq(1).all(), "the values are not there")


# --- random numbers --------------------------------------------------------------------------------------


def draw(bench: Device, device: torch.device | None = None) -> list[float]:
    """Draw eight random numbers on a device."""
    numbers: list[float] = torch.rand(8, device=device or bench.device).cpu().tolist()
    return numbers


@_checks("random.seed", "the same seed gives the same numbers, another seed others")
def seeds_repeat(bench: Device) -> None:
    """Draw after seeding."""
    bench.backend.seed(1)
    first = draw(bench)
    bench.backend.seed(1)
    require(draw(bench) == first, "the same seed gave other numbers")
    bench.backend.seed(2)
    require(draw(bench) != first, "another seed gave the same numbers")


@_checks("random.state-round-trip", "a saved random state can be restored, and does not change meanwhile")
def random_state_is_restored(bench: Device) -> None:
    """Draw, restore, draw again."""
    backend, device = bench.backend, bench.device
    backend.seed(3)
    draw(bench)
    state = backend.rng_state(device)
    good = isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and state.ndim == 1
    require(
        good and state.device.type == "cpu",
        "rng_state must return a one-dimensional uint8 tensor on the host",
    )
    kept = state.clone()
    first, second = draw(bench), draw(bench)
    require(first != second, "two draws gave the same numbers")
    require(torch.equal(state, kept), "the state that was returned changes when numbers are drawn")
    backend.set_rng_state(state, device)
    require([draw(bench), draw(bench)] == [first, second], "other numbers followed the restored state")


@_checks("random.per-device", "each device has a generator of its own, and seed() seeds all")
def generators_are_apart(bench: Device) -> None:
    """Draw on one device and look at the state of another."""
    bench.several()
    backend = bench.backend
    one, two = backend.device(1), backend.device(0)
    backend.seed(5)
    before = backend.rng_state(two)
    first = draw(bench, one)
    require(torch.equal(backend.rng_state(two), before), f"drawing on {one} changed the state of {two}")
    backend.seed(5)
    require(draw(bench, one) == first, f"seed() did not seed {one}")


# --- the life cycle of a step ----------------------------------------------------------------------------


@_checks("step.optimizer", "optimizer_step steps once, and gives back what the closure returned")
def optimizer_steps_once(bench: Device) -> None:
    """Step SGD over a known gradient."""
    weight = torch.nn.Parameter(torch.ones(4, device=bench.device))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    weight.grad = torch.ones_like(weight)
    bench.backend.optimizer_step(optimizer)
    bench.backend.step_boundary()
    require(weight.detach().cpu().eq(0.75).all(), f"1 - 0.25 gave {weight.detach().cpu().tolist()}")

    def closure() -> float:
        return 7.0

    returned = bench.backend.optimizer_step(optimizer, closure)
    require(returned == 7.0, f"with a closure that returned 7.0 it returned {returned!r}")


@_checks("step.loader", "wrap_dataloader gives every batch once, in order")
def loader_gives_every_batch(bench: Device) -> None:
    """Iterate over five batches."""
    batches = [torch.full((2,), float(index)) for index in range(5)]
    seen = [float(batch[0]) for batch in bench.backend.wrap_dataloader(batches, bench.device)]
    require(seen == [0.0, 1.0, 2.0, 3.0, 4.0], f"of the batches 0 to 4 it gave {seen}")


@_checks("step.save", "what save() wrote can be read on a machine without the device")
def saved_values_are_readable(bench: Device) -> None:
    """Write a tensor of the device and read it with `torch.load(map_location="cpu")`, weights only."""
    path = bench.folder / "saved.pt"
    bench.backend.save({"weight": torch.arange(4.0, device=bench.device), "step": 3}, path)
    read = torch.load(path, map_location="cpu", weights_only=True)
    require(read.get("step") == 3 and read["weight"].tolist() == [0.0, 1.0, 2.0, 3.0], f"it reads as {read}")
