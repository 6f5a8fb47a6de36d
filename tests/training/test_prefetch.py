"""Batches copied to the device ahead: the order of what is asked of a device, on a stub of a device module.

The stub stands for hardware: it has the functions of `torch.get_device_module` for streams (`Stream`, `stream`,
`current_stream`, `wait_stream`), as PyTorch documents them, and writes down when they are called.
"""

import contextlib

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchport.data.loader import DataLoaderShard
from torchport.data.prefetch import Prefetch
from torchport.data.prepare import skip_first_batches
from torchport.data.stateful import StatefulShard
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


def test_tensors_on_the_device_and_sparse_ones_are_not_pinned_and_come_along():
    backend, device = StubBackend(streams=True, pinned_memory=True), torch.device("meta")
    there, sparse = torch.zeros(3, device=device), torch.eye(2).to_sparse()
    batches = [{"dense": torch.full((2,), float(n)), "rest": (there, sparse)} for n in range(2)]
    given = list(Prefetch(backend, device)(iter(batches)))
    assert [batch["rest"][0] is there for batch in given] == [True, True]
    assert {tensor.device for batch in given for tensor in (batch["dense"], *batch["rest"])} == {device}
    assert {batch["rest"][1].layout for batch in given} == {torch.sparse_coo}
    turn = ["compute waits for copy", "compute uses (2,)"]
    assert backend.module.log == ["pin [0.0, 0.0]", *turn, "pin [1.0, 1.0]", *turn]


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


class Counting(IterableDataset):
    """Numbers, with a state that is a tensor."""

    def __init__(self):
        self.next = torch.tensor(0)

    def __iter__(self):
        while self.next < 6:
            self.next = self.next + 1
            yield float(self.next) - 1

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_torchdatas_batches_are_moved_and_the_readers_state_stays_on_the_host(kind, ahead):
    backend, device = StubBackend(streams=True, pinned_memory=True), torch.device("meta")

    def share(**place):
        dataset, order = (range(6), {"sampler": range(6)}) if kind == "map" else (Counting(), {})
        settings = {"batch_size": 2, "collate_fn": torch.tensor} | order
        return StatefulShard(dataset, reader=StatefulDataLoader, **settings, **place)

    loader = share(device=device, prefetch=Prefetch(backend, device) if ahead else None)
    saved, ends = [], []
    for batch in loader:
        assert batch.device == device
        ends.append(loader.end_of_dataloader)
        saved.append(loader.order_state())
    assert ends == [False, False, True]
    assert backend.module.log.count("compute waits for copy") == (3 if ahead else 0)
    for given, state in enumerate(saved[:2], start=1):
        passed_on, resumed = share(), share()
        passed_on.load_order_state(state)
        resumed.load_order_state(passed_on.order_state())
        assert [batch.tolist() for batch in resumed] == [[0, 1], [2, 3], [4, 5]][given:]


def test_torchdatas_loader_without_its_first_batches_moves_the_others_and_can_be_saved_amid_them():
    def share(**place):
        return StatefulShard(range(6), reader=StatefulDataLoader, batch_size=2, sampler=range(6), **place)

    loader = share(device=torch.device("meta"))
    rest = iter(skip_first_batches(loader, 1))
    assert next(rest).device == loader.device
    state = loader.order_state()
    assert [batch.device for batch in rest] == [loader.device]
    resumed = share()
    resumed.load_order_state(state)
    assert [batch.tolist() for batch in resumed] == [[4, 5]]
