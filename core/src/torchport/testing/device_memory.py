"""Level L1 for backends: memory figures, streams and copies."""

from __future__ import annotations

import torch

from torchport.testing.checks import Checks, NotClaimed, require
from torchport.testing.device import Device, device_bench

SIZE = 64 * 2**20
"""Bytes of the tensor by which figures must rise and fall."""

SLACK = 16 * 2**20
"""Bytes by which they may differ from that: what else the process or the allocator does meanwhile."""

CHECKS = Checks("L1", device_bench)


def _with_memory(bench: Device) -> None:
    if not bench.capabilities.memory_stats:
        raise NotClaimed("capabilities() does not declare memory_stats")
    bench.backend.empty_cache()


def _allocate(bench: Device) -> torch.Tensor:
    tensor = torch.ones(SIZE // 4, dtype=torch.float32, device=bench.device)
    bench.backend.synchronize(bench.device)
    return tensor


@CHECKS("memory.info", "memory_info gives free and total bytes")
def memory_info_is_sensible(bench: Device) -> None:
    """Compare the two."""
    _with_memory(bench)
    free, total = bench.backend.memory_info(bench.device)
    require(0 <= free <= total and total > SIZE, f"free {free}, total {total} bytes")


@CHECKS("memory.rises", "memory_allocated rises by the size of a new tensor")
def memory_rises(bench: Device) -> None:
    """Allocate 64 MiB."""
    _with_memory(bench)
    before = bench.backend.memory_allocated(bench.device)
    tensor = _allocate(bench)
    rise = bench.backend.memory_allocated(bench.device) - before
    require(abs(rise - SIZE) <= SLACK, f"it rose by {rise} bytes for a tensor of {SIZE}")
    del tensor


@CHECKS("memory.falls", "memory_allocated falls when the tensor is freed")
def memory_falls(bench: Device) -> None:
    """Allocate 64 MiB and let go of it."""
    _with_memory(bench)
    tensor = _allocate(bench)
    held = bench.backend.memory_allocated(bench.device)
    del tensor
    bench.backend.empty_cache()
    bench.backend.synchronize(bench.device)
    fall = held - bench.backend.memory_allocated(bench.device)
    require(abs(fall - SIZE) <= SLACK, f"it fell by {fall} bytes when a tensor of {SIZE} was freed")


@CHECKS("memory.peak", "max_memory_allocated keeps the most that was allocated")
def peak_is_kept(bench: Device) -> None:
    """Allocate, free, and ask for the peak."""
    _with_memory(bench)
    bench.backend.reset_peak_memory(bench.device)
    before = bench.backend.memory_allocated(bench.device)
    tensor = _allocate(bench)
    del tensor
    peak = bench.backend.max_memory_allocated(bench.device)
    require(peak - before >= SIZE - SLACK, f"the peak is {peak - before} bytes above what was there before")


@CHECKS("memory.peak-resets", "reset_peak_memory starts the peak anew")
def peak_resets(bench: Device) -> None:
    """Allocate and free, reset, and ask for the peak."""
    _with_memory(bench)
    tensor = _allocate(bench)
    del tensor
    bench.backend.empty_cache()
    bench.backend.reset_peak_memory(bench.device)
    above = bench.backend.max_memory_allocated(bench.device) - bench.backend.memory_allocated(bench.device)
    require(above <= SLACK, f"after the reset the peak is {above} bytes above what is allocated")


@CHECKS("memory.out-of-memory", "too large a tensor is an out-of-memory error, after which work goes on")
def too_large_is_out_of_memory(bench: Device) -> None:
    """Ask for four times the memory that there is."""
    from torchport.training.memory import is_out_of_memory

    _with_memory(bench)
    _, total = bench.backend.memory_info(bench.device)
    before = bench.backend.memory_allocated(bench.device)
    try:
        tensor = torch.empty(4 * total, dtype=torch.uint8, device=bench.device)
    except (RuntimeError, MemoryError) as error:
        caught = error
    else:
        del tensor
        if bench.capabilities.host_memory:
            raise NotClaimed("this host's operating system promises more memory than it has")
        require(False, f"a tensor of {4 * total} bytes was made on a device of {total}")
    own = isinstance(caught, torch.OutOfMemoryError) or bench.capabilities.host_memory
    require(own, f"it is a {type(caught).__name__} instead of torch.OutOfMemoryError: {caught}")
    require(is_out_of_memory(caught), f"find_executable_batch_size does not know it: {caught}")
    del caught
    require(torch.ones(8, device=bench.device).sum().item() == 8.0, "the device does not work afterwards")
    left = bench.backend.memory_allocated(bench.device) - before
    require(left <= SLACK, f"{left} bytes are allocated that were not before")


# --- streams and copies ----------------------------------------------------------------------------------


def _with_streams(bench: Device) -> None:
    if not bench.capabilities.streams:
        made = bench.backend.stream(bench.device)
        require(made is None, f"capabilities() declares no streams, but stream() returned {made!r}")
        raise NotClaimed("capabilities() does not declare streams")


@CHECKS("streams.copy", "a batch copied on a stream of its own is there after join_stream")
def copies_on_a_stream(bench: Device) -> None:
    """Copy beside computation, as the prefetching loader does, again and again."""
    _with_streams(bench)
    backend, device = bench.backend, bench.device
    stream = backend.stream(device)
    require(stream is not None, "capabilities() declares streams, but stream() returned None")
    for round_number in range(8):
        values = torch.full((512, 512), float(round_number))
        with backend.use_stream(stream):
            batch = backend.pin(values).to(device, non_blocking=True)
            batch = batch + 1
        backend.join_stream(stream, [batch], device)
        total = (batch * 2).sum().item()
        wanted = 512 * 512 * 2.0 * (round_number + 1)
        require(total == wanted, f"round {round_number}: the sum is {total} instead of {wanted}")


@CHECKS("streams.current", "use_stream makes the stream the current one, and gives the old one back")
def stream_becomes_current(bench: Device) -> None:
    """Compare `current_stream` inside and outside."""
    _with_streams(bench)
    module, device = bench.backend.module, bench.device
    stream, before = bench.backend.stream(device), module.current_stream(device)
    require(stream != before, "stream() returned the current stream instead of a new one")
    with bench.backend.use_stream(stream):
        inside = module.current_stream(device)
    require(inside == stream, f"inside, the current stream is {inside}")
    require(module.current_stream(device) == before, "afterwards, another stream is current than before")


@CHECKS("streams.events", "an event recorded on a stream is reached once its work is done")
def events_are_reached(bench: Device) -> None:
    """Record, wait, query."""
    _with_streams(bench)
    kind = getattr(bench.backend.module, "Event", None)
    if kind is None:
        raise NotClaimed(f"torch.{bench.spec.device_type} has no Event")
    event, stream = kind(), bench.backend.stream(bench.device)
    with bench.backend.use_stream(stream):
        value = torch.ones(256, 256, device=bench.device) @ torch.ones(256, 256, device=bench.device)
        event.record(bench.backend.module.current_stream(bench.device))
    event.synchronize()
    require(event.query(), "after synchronize() the event is not reached")
    bench.backend.join_stream(stream, [value], bench.device)
    require(value.eq(256).all().item(), "the work before the event is not done")


@CHECKS("copies.pinned", "pin() gives page-locked memory, whose copy keeps the values")
def pinned_memory_is_pinned(bench: Device) -> None:
    """Pin, look, copy."""
    values = torch.arange(4096, dtype=torch.float32)
    pinned = bench.backend.pin(values)
    require(torch.equal(pinned, values), "pin() changed values")
    if not bench.capabilities.pinned_memory:
        raise NotClaimed("capabilities() does not declare pinned_memory")
    require(pinned.is_pinned(), "what pin() returned is not pinned")
    copied = pinned.to(bench.device, non_blocking=True)
    bench.backend.synchronize(bench.device)
    require(torch.equal(copied.cpu(), values), "the copy changed values")


@CHECKS("copies.host-memory", "a tensor of the host is one of the device: no copy is made")
def host_memory_needs_no_copy(bench: Device) -> None:
    """Move a tensor there and look whether it stayed where it was."""
    if not bench.capabilities.host_memory:
        raise NotClaimed("capabilities() does not declare host_memory")
    values = torch.arange(8.0)
    moved = values.to(bench.device)
    require(moved.data_ptr() == values.data_ptr(), "moving a tensor to the device copied it")
