"""What a backend and a strategy may do in their own way before training: set up the process, read batches ahead."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, DataLoaderConfiguration
from torchport.errors import InvalidSpecError
from torchport.plugin import StrategySpec
from torchport.state import AcceleratorState

ACME = """
import torch
from torchport.plugin import Backend, BackendSpec, Capabilities, Probe, StrategySpec, hookimpl

done = []

@hookimpl
def torchport_backends():
    yield BackendSpec(name="acme", device_type="cpu", priority=-1, factory="torchport_acme:Acme",
                      probe="torchport_acme:probe")

@hookimpl
def torchport_strategies():
    yield StrategySpec(name="spread", factory="torchport.builtin.single:SingleStrategy",
                       start_process="torchport_acme:start")

def probe():
    return Probe(available=True, count=1)

def start(topology):
    done.append(f"strategy sets up rank {topology.rank}")

class Acme(Backend):
    def start_process(self, topology):
        done.append(f"backend sets up rank {topology.rank}")

    def device(self, local_rank):
        done.append("device is opened")
        return torch.device("cpu")

    def capabilities(self):
        return Capabilities()

    def read_ahead(self, device):
        def read(batches):
            whole = list(batches)
            done.append(f"{len(whole)} batches read ahead")
            yield from whole
        return read
"""


@pytest.fixture
def done(site):
    """What the plugin has written down of itself."""
    site.install("torchport-acme", ACME)
    import torchport_acme

    yield torchport_acme.done
    AcceleratorState._reset_state()


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2)


def test_a_strategy_sets_up_its_process_behind_the_backend_and_before_the_device_is_opened(done):
    Accelerator(backend="acme", strategy="spread")
    assert done == ["backend sets up rank 0", "strategy sets up rank 0", "device is opened"]


def test_another_strategy_sets_up_nothing(done):
    Accelerator(backend="acme", strategy="single")
    assert done == ["backend sets up rank 0", "device is opened"]


def test_a_backend_reads_ahead_in_its_own_way_unless_told_not_to(done):
    prepared = Accelerator(backend="acme").prepare(loader())
    ends = [(batch.tolist(), prepared.end_of_dataloader) for (batch,) in prepared]
    assert ends == [([0.0, 1.0], False), ([2.0, 3.0], False), ([4.0, 5.0], True)]
    assert done[-1] == "3 batches read ahead"
    AcceleratorState._reset_state()
    plain = DataLoaderConfiguration(prefetch_to_device=False)
    assert Accelerator(backend="acme", dataloader_config=plain).prepare(loader()).prefetch is None


def test_what_sets_up_a_process_must_be_named_as_modules_are():
    with pytest.raises(InvalidSpecError, match="start_process must be of the form 'module:Name'"):
        StrategySpec(name="spread", factory="a:B", start_process="start")
