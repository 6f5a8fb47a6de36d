"""The kit of stubs: a device described by documentation, put in place for a test and taken away again."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest
import torch
from torchport.errors import ConfigurationError, LaunchError, UnsupportedOperationError
from torchport.plugin import Backend, BackendSpec, Capabilities, missing_runtime
from torchport.testing.stubs import Call, StubDevice, StubModule, installed

PAGES = ("https://acme.example/torch.acme.html",)


class AnyBackend(Backend):
    """Nothing but the defaults."""

    def device(self, local_rank):
        device = torch.device(self.spec.device_type, local_rank)
        self.module.set_device(device)
        return device

    def capabilities(self):
        return Capabilities(streams=True, pinned_memory=True)


@pytest.fixture
def acme():
    stub = StubDevice("privateuseone", documentation=PAGES, count=2, memory=1000)
    with installed(stub):
        yield stub


@pytest.fixture
def backend(acme):
    return AnyBackend(
        BackendSpec(name="acme", factory="a:B", probe="a:probe", device_type=acme.device_type),
    )


def test_a_stub_says_what_it_was_made_from():
    with pytest.raises(ConfigurationError, match="acme says nowhere"):
        StubModule("acme", documentation=())


def test_asking_for_the_number_of_devices_does_not_initialise_the_runtime(acme):
    assert (torch.privateuseone.device_count(), torch.privateuseone.is_available()) == (2, True)
    assert (acme.initialized, acme.calls) == (False, [])
    torch.privateuseone.synchronize()
    assert (acme.initialized, acme.calls) == (True, [Call("synchronize")])


def test_the_defaults_of_a_backend_work_on_a_stub(acme, backend):
    device = backend.device(1)
    assert acme.calls == [Call("set_device", (device,))]
    assert (acme.current_device(), backend.count()) == (1, 2)
    acme.occupy(300)
    acme.occupy(-100)
    assert backend.memory_info(device) == (800, 1000)
    assert (backend.memory_allocated(device), backend.max_memory_allocated(device)) == (200, 300)
    backend.reset_peak_memory(device)
    assert backend.max_memory_allocated(device) == 200
    assert backend.memory_allocated(torch.device("privateuseone", 0)) == 0


def test_an_index_that_the_vendor_would_refuse_is_refused(backend):
    with pytest.raises(RuntimeError, match="invalid device ordinal 2: there are 2"):
        backend.device(2)


def test_each_process_has_a_device_of_its_own_or_is_told_how_many_there_are(acme, backend, monkeypatch):
    assert [backend.device_index(rank) for rank in range(2)] == [0, 1]
    monkeypatch.setenv("ACME_VISIBLE", "4,7")
    object.__setattr__(backend.spec, "visible_devices_env", "ACME_VISIBLE")
    with pytest.raises(LaunchError) as refused:
        backend.device_index(2)
    assert refused.value.problem == "the process of local rank 2 has no device of its own"
    assert refused.value.found == "2 visible devices of the backend 'acme' (ACME_VISIBLE=4,7)"
    assert refused.value.hint == "start 2 processes on this machine, or let ACME_VISIBLE show more"
    acme.count = 1  # each process was given one of its own
    assert backend.device_index(2) == 0


def test_random_numbers_are_kept_for_each_device(acme, backend):
    first, second = torch.device("privateuseone", 0), torch.device("privateuseone", 1)
    backend.seed(3)
    assert backend.rng_state(first).equal(backend.rng_state(second))
    state = backend.rng_state(first)
    acme.manual_seed(4)  # the current device, 0
    assert not backend.rng_state(first).equal(state)
    assert backend.rng_state(second).equal(state)
    backend.set_rng_state(state, first)
    assert backend.rng_state(first).equal(state)


def test_streams_are_current_inside_their_context_and_waited_for(acme, backend):
    device = torch.device("privateuseone", 0)
    stream = backend.stream(device)
    outside = acme.current_stream(device)
    with backend.use_stream(stream):
        assert acme.current_stream(device) is stream
    assert acme.current_stream(device) is outside
    with acme.on_host():
        backend.join_stream(stream, [torch.ones(2)], device)
    assert acme.arguments("Stream.wait_stream") == [(stream,)]
    assert acme.arguments("Tensor.record_stream") == [(outside,)]


def test_tensors_for_the_device_are_put_on_the_host(acme, backend):
    with acme.on_host():
        model = torch.nn.Linear(2, 1, device="privateuseone:1").to(torch.device("privateuseone", 0))
        made = [torch.ones(2, device="privateuseone"), backend.pin(torch.ones(2)).to("privateuseone")]
        assert {tensor.device.type for tensor in [*made, *model.parameters()]} == {"cpu"}
    assert acme.calls == [Call("Tensor.pin_memory")]


def test_modules_and_distributions_are_there_in_the_block_only():
    core = StubModule(
        "acme_runtime.inner.core", documentation=PAGES, step=None, add=lambda a, b: a + b, LEVEL=3
    )
    outer = StubModule("acme_runtime.inner.other", documentation=PAGES)
    with installed(core, outer, distributions={"Acme_Torch": "2.4.0"}):
        module = importlib.import_module("acme_runtime.inner.core")
        assert (module.step(), module.add(1, b=2), module.LEVEL) == (None, 3, 3)
        assert sys.modules["acme_runtime"].inner.other is outer
        assert importlib.metadata.version("acme-torch") == "2.4.0"
        assert missing_runtime(["acme-torch>=2.4"]) == ""
        assert "found acme-torch 2.4.0" in missing_runtime(["acme-torch>=3"])
    assert core.calls == [Call("step"), Call("add", (1,), {"b": 2})]
    assert not [name for name in sys.modules if name.startswith("acme_runtime")]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("acme-torch")


def test_a_module_that_is_loaded_is_changed_in_place_and_restored():
    module, before = torch.mtia, dict(vars(torch.mtia))
    stub = StubDevice("mtia", documentation=PAGES, count=3, without=("memory_stats",), further=None)
    with installed(stub):
        assert torch.mtia is module
        assert (module.device_count(), module.is_available()) == (3, True)
        assert module.further() is None
        assert not hasattr(module, "memory_stats")
        assert torch.get_device_module("mtia") is module
    assert vars(module) == before


def test_a_device_type_that_pytorch_does_not_know_is_reached_by_both_names():
    stub = StubDevice("acmedevice", documentation=PAGES)
    with installed(stub):
        assert torch.acmedevice is torch.privateuseone is stub
        assert torch.get_device_module("privateuseone:0") is stub
    assert not hasattr(torch, "acmedevice")
    assert not hasattr(torch, "privateuseone")


def test_without_a_device_module_memory_is_not_told_and_nothing_is_cached():
    spec = BackendSpec(name="lazy", device_type="vulkan", factory="a:B", probe="a:probe")
    backend = AnyBackend(spec)
    backend.empty_cache()
    with pytest.raises(UnsupportedOperationError, match="'lazy' has no such figure of its memory") as refused:
        backend.reset_peak_memory(torch.device("cpu"))
    assert refused.value.reason == "torch.vulkan has no reset_peak_memory_stats"
