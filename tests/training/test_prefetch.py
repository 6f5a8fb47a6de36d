"""Batches copied to the device ahead: the order of what is asked of a device, on a stub of a device module.

The stub stands for hardware: it has the functions of `torch.get_device_module` for streams (`Stream`, `stream`,
`current_stream`, `wait_stream`), as PyTorch documents them, and writes down when they are called.
"""

import contextlib

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchport.data.loader import DataLoaderShard
from torchport.data.prefetch import Prefetch
from torchport.plugin import Backend, BackendSpec, Capabilities

NUMBERS = TensorDataset(torch.arange(6.0))


class Stream:
    def __init__(self, module, name):
        self.module, self.name = module, name

    def wait_stream(self, other):
        self.module.log.append(f"{self.name} waits for {other.name}")


class Module:
    """Stub of a device module."""

    def __init__(self):
        self.log = []
        self.compute = Stream(self, "compute")
        self.active = self.compute

    def Stream(self, device):
        return Stream(self, "copy")

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.active = self.active, stream
        yield
        self.active = before

    def current_stream(self, device):
        return self.active


class StubBackend(Backend):
    """Copies to the meta device; what it is asked to pin is written down."""

    module = None

    def __init__(self, **capabilities):
        spec = BackendSpec(name="stub", summary="stub", device_type="meta", factory="x:Y", probe="x:probe")
        super().__init__(spec)
        self.module, self.can = Module(), Capabilities(**capabilities)

    def device(self, local_rank):
        return torch.device("meta")

    def capabilities(self):
        return self.can

    def pin(self, tensor):
        self.module.log.append(f"pin {tensor.tolist()}")
        return tensor

    def join_stream(self, stream, tensors, device):
        tensors = list(tensors)
        assert all(tensor.device == device for tensor in tensors)
        super().join_stream(stream, [Kept(tensor, self.module) for tensor in tensors], device)


class Kept:
    """Stands for a tensor of the device, whose `record_stream` keeps its memory."""

    def __init__(self, tensor, module):
        self.tensor, self.module = tensor, module

    def record_stream(self, stream):
        self.module.log.append(f"{stream.name} uses {tuple(self.tensor.shape)}")


def test_the_next_batch_is_on_its_way_before_the_current_one_is_given_out():
    backend = StubBackend(streams=True, pinned_memory=True)
    log, device = backend.module.log, torch.device("meta")
    loader = DataLoaderShard(
        NUMBERS, batch_size=2, sampler=range(6), device=device, prefetch=Prefetch(backend, device)
    )
    ends = []
    for (batch,) in loader:
        assert batch.device == device
        log.append("step")
        ends.append((loader.batches_left, loader.end_of_dataloader))
    given = ["compute waits for copy", "compute uses (2,)"]
    assert log == [
        "pin [0.0, 1.0]", *given, "pin [2.0, 3.0]", "step", *given, "pin [4.0, 5.0]", "step", *given, "step",
    ]  # fmt: skip
    assert ends == [(2, False), (1, False), (0, True)]


def test_a_place_amid_an_epoch_is_behind_the_batch_given_out_not_the_one_copied():
    backend, device = StubBackend(streams=True), torch.device("meta")
    loader = DataLoaderShard(
        NUMBERS, batch_size=2, sampler=range(6), device=device, prefetch=Prefetch(backend, device)
    )
    amid = iter(loader)
    next(amid)
    assert loader.order_state()["batches"] == 1


def test_copies_are_made_on_the_side_stream_and_hidden_tensors_on_the_computing_one():
    backend, device = StubBackend(streams=True), torch.device("meta")
    made = []

    class Hidden:
        def to(self, device, non_blocking=False):
            made.append(backend.module.active.name)
            return self

    original, torch.Tensor.to = (
        torch.Tensor.to,
        lambda self, *a, **k: (made.append(backend.module.active.name), original(self, *a, **k))[1],
    )
    try:
        list(Prefetch(backend, device)(iter([(torch.zeros(1), Hidden())])))
    finally:
        torch.Tensor.to = original
    assert made[0] == "copy"
    assert made[-1] == "compute"


def test_a_device_without_streams_or_in_host_memory_is_not_prefetched_to():
    from torchport import Accelerator
    from torchport.state import AcceleratorState

    loader = Accelerator().prepare(DataLoader(NUMBERS, batch_size=2))
    assert loader.prefetch is None
    assert loader._place is None
    assert StubBackend().stream(torch.device("meta")) is None
    AcceleratorState._reset_state()


@pytest.mark.parametrize("length", [0, 1, 3])
def test_every_batch_comes_once(length):
    backend = StubBackend(streams=True)
    batches = [torch.full((n + 1,), n) for n in range(length)]
    shapes = [tuple(batch.shape) for batch in Prefetch(backend, torch.device("meta"))(iter(batches))]
    assert shapes == [(n + 1,) for n in range(length)]
