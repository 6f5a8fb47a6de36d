"""The backend `hpu` and its probes, against stubs of Habana's packages made from their public documentation."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torchport.errors import ConfigurationError
from torchport.plugin import Capabilities, PrepareRequest, Probe, Topology
from torchport.testing.stubs import Call, StubDevice, StubModule, installed
from torchport_hpu import probe, probe_hccl, torchport_backends, torchport_collectives
from torchport_hpu.backend import HcclCollectives, HpuBackend
from torchport_hpu.config import LAZY, HpuSettings

API = (
    "https://docs.habana.ai/en/latest/PyTorch/Reference/Python_Packages.html",
    "https://docs.habana.ai/en/latest/PyTorch/Reference/PyTorch_Gaudi_Theory_of_Operations.html",
    "https://docs.habana.ai/en/latest/PyTorch/Reference/Runtime_Flags.html",
)
SCALING = (
    "https://docs.habana.ai/en/latest/PyTorch/PyTorch_Scaling_Guide/Distributed_Backend_Initialization.html",
    "https://docs.habana.ai/en/latest/PyTorch/PyTorch_Scaling_Guide/Gaudi_Assignment.html",
)
GRAPHS = ("https://docs.habana.ai/en/latest/PyTorch/Inference_on_PyTorch/Inference_Using_HPU_Graphs.html",)
SPEC = next(iter(torchport_backends()))
HPU = torch.device("hpu", 0)
TWO = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2)
NOT_THERE = (
    "set_device",
    "manual_seed",
    "manual_seed_all",
    "get_rng_state",
    "set_rng_state",
    "is_bf16_supported",
)


class Gaudi:
    """Habana's packages on a machine with two processors."""

    def __init__(self) -> None:
        self.name, self.lazy = "GAUDI2", False
        seeded = StubDevice("hpu", documentation=API)
        self.random = StubModule(
            "habana_frameworks.torch.hpu.random",
            documentation=API,
            **{name: getattr(seeded, name) for name in ("get_rng_state", "set_rng_state", "manual_seed_all")},
        )
        self.device = StubDevice(
            "hpu",
            documentation=API + GRAPHS,
            count=2,
            without=NOT_THERE,
            get_device_name=lambda device=None: self.name,
            synchronize=lambda: None,
            wrap_in_hpu_graph=lambda module: module,
        )
        self.hpu = StubModule("habana_frameworks.torch.hpu", documentation=API, **self.device.members)
        self.core = StubModule("habana_frameworks.torch.core", documentation=API, mark_step=None)
        self.internal = StubModule(
            "habana_frameworks.torch.utils.internal", documentation=API, is_lazy=lambda: self.lazy
        )
        self.hccl = StubModule(
            "habana_frameworks.torch.distributed.hccl",
            documentation=SCALING,
            initialize_distributed_hpu=lambda world_size=None, rank=None, local_rank=None: None,
        )


@pytest.fixture
def gaudi(monkeypatch):
    monkeypatch.setenv(LAZY, "")  # so that it is restored
    monkeypatch.delenv(LAZY)
    monkeypatch.delenv("HABANA_VISIBLE_MODULES", raising=False)
    made = Gaudi()
    with ExitStack() as stack:
        stack.enter_context(
            installed(made.device, made.hpu, made.random, made.core, made.internal, made.hccl)
        )
        yield made


@pytest.mark.skipif(
    "__import__('importlib').util.find_spec('habana_frameworks')", reason="it is installed here"
)
def test_without_habanas_packages_the_reason_says_where_they_are():
    answer = probe()
    assert (answer.available, answer) == (False, probe_hccl())
    assert "habana-torch-plugin is not installed; it is not on PyPI" in answer.reason


def test_the_probe_counts_without_taking_a_processor(gaudi, monkeypatch):
    assert probe() == Probe(available=True, count=2)
    assert probe_hccl() == Probe(available=True)
    gaudi.device.count = 0
    assert probe().reason == "no Gaudi answers: is its driver loaded, or is it in use? (hl-smi)"
    monkeypatch.setenv("HABANA_VISIBLE_MODULES", "9")
    assert probe().reason.startswith("no Gaudi answers with HABANA_VISIBLE_MODULES='9': ")
    assert not gaudi.device.initialized


def test_each_process_knows_its_processor_by_index_0(gaudi):
    backend = HpuBackend(SPEC)
    assert [backend.device(rank) for rank in range(2)] == [HPU, HPU]
    assert gaudi.device.calls == []  # there is nothing to set: the bridge maps processes by their local rank


@pytest.mark.parametrize(("topology", "calls"), [(Topology(), 0), (TWO, 1)])
def test_the_bridge_is_told_the_place_of_each_of_several_processes(gaudi, topology, calls):
    HpuBackend(SPEC).start_process(topology)
    place = {"world_size": 2, "rank": 1, "local_rank": 1}
    assert gaudi.hccl.calls == [Call("initialize_distributed_hpu", (), place)] * calls


@pytest.mark.parametrize(
    ("name", "lazy", "autocast", "features"),
    [
        ("GAUDI", False, {"bfloat16"}, set()),
        ("GAUDI", True, {"bfloat16"}, {"hpu_graphs"}),
        ("GAUDI2", False, {"bfloat16", "float16"}, {"fp8"}),
        ("GAUDI3", True, {"bfloat16", "float16"}, {"fp8", "hpu_graphs"}),
    ],
)
def test_capabilities_follow_from_the_generation_and_the_mode(gaudi, name, lazy, autocast, features):
    gaudi.name, gaudi.lazy = name, lazy
    backend = HpuBackend(SPEC)
    assert backend.capabilities() == Capabilities(
        autocast=frozenset(autocast),
        grad_scaler="float16" in autocast,
        distributed=True,
        pinned_memory=True,
        memory_stats=True,
        compile=not lazy,
        features=frozenset(features),
    )
    assert (backend.compile_backend(), backend.stream(HPU)) == ("hpu_backend", None)


@pytest.mark.parametrize(
    ("variable", "bridge", "lazy"), [("1", False, True), ("0", True, False), (None, True, True)]
)
def test_the_mode_is_that_of_the_variable_or_else_of_the_bridge(gaudi, monkeypatch, variable, bridge, lazy):
    gaudi.lazy = bridge
    if variable is not None:
        monkeypatch.setenv(LAZY, variable)
    assert HpuBackend(SPEC).lazy is lazy


def test_a_setting_of_the_mode_must_agree_with_the_variable(gaudi, monkeypatch):
    assert HpuBackend(SPEC, HpuSettings(lazy_mode="1")).lazy is True
    with pytest.raises(ConfigurationError, match="torchport launch --hpu-lazy-mode 0"):
        HpuBackend(SPEC, HpuSettings(lazy_mode="0"))


def test_memory_random_numbers_and_pinning_are_those_of_the_bridge(gaudi, monkeypatch):
    backend = HpuBackend(SPEC)
    gaudi.device.occupy(100)
    assert backend.memory_info(HPU) == (gaudi.device.memory - 100, gaudi.device.memory)
    assert (backend.memory_allocated(HPU), backend.max_memory_allocated(HPU)) == (100, 100)
    backend.reset_peak_memory(HPU)
    backend.synchronize(HPU)
    assert gaudi.device.calls[-1] == Call("synchronize")
    backend.seed(5)
    state = backend.rng_state(HPU)
    backend.set_rng_state(state, HPU)
    assert gaudi.random.calls == [
        Call("manual_seed_all", (5,)),
        Call("get_rng_state"),
        Call("set_rng_state", (state,)),
    ]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device: pinned.append(device) or tensor)
    backend.pin(torch.ones(2))
    assert pinned == ["hpu"]


@pytest.mark.parametrize(("lazy", "marks"), [(True, 1), (False, 0)])
def test_recorded_work_is_run_before_an_optimizer_step_and_at_its_end(gaudi, lazy, marks):
    gaudi.lazy = lazy
    backend = HpuBackend(SPEC)
    order = []
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: order.append(len(gaudi.core.calls)))
    backend.optimizer_step(optimizer)
    assert (order, weight.item()) == ([marks], 0.0)
    backend.step_boundary()
    assert gaudi.core.calls == [Call("mark_step")] * (2 * marks)


def request(model, **more):
    return PrepareRequest(models=(model,), optimizers=(), context=SimpleNamespace(), **more)


def test_models_for_evaluation_are_captured_in_graphs_if_the_settings_say_so(gaudi):
    gaudi.lazy = True
    model = torch.nn.Linear(2, 1)
    HpuBackend(SPEC).adapt(request(model, evaluation_only=True))
    HpuBackend(SPEC, HpuSettings(graphs=True)).adapt(request(model))
    assert gaudi.device.arguments("wrap_in_hpu_graph") == []
    HpuBackend(SPEC, HpuSettings(graphs=True)).adapt(request(model, evaluation_only=True))
    assert gaudi.device.arguments("wrap_in_hpu_graph") == [(model,)]
    gaudi.lazy = False
    with pytest.raises(ConfigurationError, match="HPU graphs need the lazy mode"):
        HpuBackend(SPEC, HpuSettings(graphs=True)).adapt(request(model, evaluation_only=True))


@pytest.mark.usefixtures("gaudi")
def test_the_process_group_is_hccl_which_the_import_registers(monkeypatch):
    given, store = [], dist.HashStore()
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.append((args, kwargs)))
    HcclCollectives(next(iter(torchport_collectives()))).open(TWO, HPU, timedelta(minutes=1), store)
    place = {"rank": 1, "world_size": 2, "timeout": timedelta(minutes=1), "device_id": None}
    assert given == [(("hccl",), {"store": store, **place})]


def test_a_training_loop_marks_each_micro_batch_and_each_backward_before_a_step(gaudi):
    """The whole run on the stub: tensors for the device are put on the host."""
    from torchport import Accelerator
    from torchport.state import AcceleratorState

    gaudi.lazy = True
    with gaudi.device.on_host():
        accelerator = Accelerator(backend="hpu", gradient_accumulation_steps=2)
        try:
            model = torch.nn.Linear(2, 1)
            model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in range(4):
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(1, 2, device=accelerator.device)).sum())
                    optimizer.step()
                    optimizer.zero_grad()
            assert accelerator.device == HPU
        finally:
            AcceleratorState._reset_state()
    assert len(gaudi.core.calls) == MARKS


MARKS = 4 + 2
"""One at the end of each micro-batch, and one before each of the two optimizer steps."""
