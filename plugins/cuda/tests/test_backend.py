"""The backend against stubs of `torch.cuda` and NVML: which of their functions are called with what."""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torchport_cuda
from torchport.errors import LaunchError, UnsupportedOperationError
from torchport.plugin import Capabilities, Topology
from torchport.testing.stubs import Call
from torchport_cuda import torchport_collectives, torchport_plan_resolved
from torchport_cuda.backend import CudaBackend, NcclCollectives
from torchport_cuda.config import CudaSettings

from .conftest import SPEC, Card

TWO = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2)
SWITCHES = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")


# --- devices -------------------------------------------------------------------------------------------------


def test_each_process_makes_the_gpu_of_its_local_rank_the_current_one(cuda, backend):
    device = backend.device(1)
    assert device == torch.device("cuda", 1)
    assert cuda.calls == [Call("set_device", (device,))]
    with pytest.raises(LaunchError, match="2 visible devices of the backend 'cuda'"):
        backend.device(2)
    cuda.count = 1  # the cluster gives each process one GPU
    assert backend.device(1) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("asked", "precision", "convolutions"),
    [(None, "medium", "as before"), (True, "high", True), (False, "highest", False)],
)
@pytest.mark.usefixtures("cuda")
def test_tf32_is_set_if_the_settings_say_so_and_left_alone_otherwise(
    monkeypatch, asked, precision, convolutions
):
    set_to = ["medium"]
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    cudnn = SimpleNamespace(allow_tf32="as before")
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    CudaBackend(SPEC, CudaSettings(tf32=asked)).device(0)
    assert (set_to[-1], cudnn.allow_tf32) == (precision, convolutions)


def test_memory_random_numbers_and_streams_are_those_of_torch_cuda(cuda, backend):
    device = torch.device("cuda", 1)
    cuda.occupy(100, device)
    assert backend.memory_info(device) == (cuda.memory - 100, cuda.memory)
    assert (backend.memory_allocated(device), backend.max_memory_allocated(device)) == (100, 100)
    backend.reset_peak_memory(device)
    backend.empty_cache()
    backend.synchronize(device)
    backend.seed(5)
    state = backend.rng_state(device)
    backend.set_rng_state(state, device)
    on = [(device,)]
    assert [(call.name, call.args) for call in cuda.calls] == [
        ("mem_get_info", *on),
        ("memory_allocated", *on),
        ("max_memory_allocated", *on),
        ("reset_peak_memory_stats", *on),
        ("empty_cache", ()),
        ("synchronize", *on),
        ("manual_seed_all", (5,)),
        ("get_rng_state", *on),
        ("set_rng_state", (state, device)),
    ]


def test_batches_are_pinned_and_copied_on_a_stream_of_their_own(cuda, backend):
    device = torch.device("cuda", 0)
    stream = backend.stream(device)
    with cuda.on_host(), backend.use_stream(stream):
        backend.pin(torch.ones(2)).to(device, non_blocking=True)
    names = [call.name for call in cuda.calls]
    assert [name for name in names if name != "get_device_capability"] == [
        "Stream",
        "stream",
        "Tensor.pin_memory",
    ]


# --- capabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "autocast", "features"),
    [
        ((6, 1), {"float16"}, set()),
        ((7, 0), {"float16"}, set()),
        ((7, 5), {"float16"}, set()),
        ((8, 0), {"float16", "bfloat16"}, set()),
        ((8, 6), {"float16", "bfloat16"}, set()),
        ((8, 9), {"float16", "bfloat16"}, {"fp8"}),
        ((9, 0), {"float16", "bfloat16"}, {"fp8"}),
        ((10, 0), {"float16", "bfloat16"}, {"fp8", "mxfp8"}),
        ((12, 0), {"float16", "bfloat16"}, {"fp8", "mxfp8"}),
    ],
)
def test_number_formats_follow_from_the_compute_capability_without_initialising_cuda(
    cuda, nvml, backend, capability, autocast, features
):
    nvml(Card("GPU-1", capability=(12, 0)), Card("GPU-2", capability=capability))
    found = backend.capabilities()
    assert (found.autocast, found.features) == (autocast, features)
    assert not cuda.initialized


@pytest.mark.usefixtures("no_nvml")
def test_without_nvml_cuda_is_asked_for_each_gpu_once(cuda, backend):
    assert backend.capabilities().autocast == {"float16", "bfloat16"}
    assert backend.capabilities().features == frozenset()
    assert cuda.calls == [Call("get_device_capability", (0,)), Call("get_device_capability", (1,))]


@pytest.mark.parametrize(
    ("names", "features"),
    [
        (["gfx90a:sramecc+:xnack-"] * 2, set()),
        (["gfx942:sramecc+:xnack-"] * 2, {"fp8"}),
        (["gfx950"] * 2, {"fp8", "mxfp8"}),
        (["gfx1201"] * 2, {"fp8"}),
        (["gfx950", "gfx90a"], set()),
    ],
)
def test_on_rocm_they_follow_from_the_architecture(rocm, backend, names, features):
    rocm_properties = lambda index: SimpleNamespace(gcnArchName=names[index])  # noqa: E731
    torch.cuda.get_device_properties = rocm_properties  # restored with the stub
    found = backend.capabilities()
    assert (found.autocast, found.features) == ({"float16", "bfloat16"}, features)


def test_the_rest_is_declared(cuda, nvml, backend, monkeypatch):
    nvml(Card("GPU-1"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "triton" else None)
    assert backend.capabilities() == Capabilities(
        autocast=frozenset({"float16", "bfloat16"}),
        features=frozenset({"fp8"}),
        grad_scaler=True,
        distributed=True,
        pinned_memory=True,
        streams=True,
        memory_stats=True,
        compile=True,
    )


# --- processes -----------------------------------------------------------------------------------------------


def plan(topology: Topology, backend: str = "cuda"):
    class Plan(SimpleNamespace):
        def __getitem__(self, slot):
            return SimpleNamespace(name=backend)

    return Plan(topology=topology)


@pytest.fixture
def no_switches(monkeypatch):
    for name in SWITCHES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "consumer"),
    [
        ("NVIDIA GeForce RTX 3090", True),
        ("NVIDIA GeForce RTX 4060 Ti", True),
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA GeForce RTX 4090 D", True),
        ("NVIDIA GeForce RTX 5080", True),
        ("NVIDIA GeForce RTX 2080 Ti", False),
        ("NVIDIA RTX 4000 Ada Generation", False),
        ("NVIDIA H100 80GB HBM3", False),
    ],
)
@pytest.mark.usefixtures("cuda", "no_switches")
def test_transfers_that_consumer_cards_lack_are_switched_off_and_the_operator_is_told(
    nvml, backend, name, consumer
):
    nvml(Card("GPU-1"), Card("GPU-2", name))
    told = torchport_plan_resolved(plan(TWO))
    backend.start_process(TWO)
    assert [os.environ.get(variable) for variable in SWITCHES] == (["1", "1"] if consumer else [None, None])
    said = f"NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1: {name} has no peer-to-peer or InfiniBand transfers (set 0 to try)"
    assert list(told) == ([said] if consumer else [])


@pytest.mark.usefixtures("cuda", "no_switches")
def test_what_the_user_has_set_stays(nvml, backend, monkeypatch):
    nvml(Card("GPU-1", "NVIDIA GeForce RTX 4090"))
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    assert next(iter(torchport_plan_resolved(plan(TWO)))).startswith(
        "NCCL_IB_DISABLE=1: NVIDIA GeForce RTX 4090"
    )
    backend.start_process(TWO)
    assert [os.environ.get(name) for name in SWITCHES] == ["0", "1"]
    assert list(torchport_plan_resolved(plan(TWO))) == []


@pytest.mark.usefixtures("cuda", "no_switches")
def test_one_process_another_backend_and_rocm_are_left_alone(nvml, backend, monkeypatch):
    nvml(Card("GPU-1", "NVIDIA GeForce RTX 4090"))
    assert list(torchport_plan_resolved(plan(Topology()))) == []
    assert list(torchport_plan_resolved(plan(TWO, "cpu"))) == []
    backend.start_process(Topology())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    backend.start_process(TWO)
    assert [os.environ.get(name) for name in SWITCHES] == [None, None]


@pytest.mark.usefixtures("cuda", "no_switches", "no_nvml")
def test_without_nvml_the_driver_tells_which_cards_there_are(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(torchport_cuda.gpus, "_DRIVER", str(tmp_path))
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "information").write_text("Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 123\n")
    backend.start_process(TWO)
    assert [os.environ.get(name) for name in SWITCHES] == ["1", "1"]


def test_a_process_is_bound_to_the_cores_nearest_to_its_gpu(cuda, nvml, backend, monkeypatch):
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 65, 66})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: bound.append((thread, cores)))
    nvml(Card("GPU-1", affinity=(0b11,)), Card("GPU-2", affinity=(0b100, 0b110)))
    backend.bind_cpu(TWO)
    assert {thread for thread, _ in bound} == {int(name) for name in os.listdir("/proc/self/task")}
    assert all(cores == {2, 65, 66} for _, cores in bound)
    assert backend.bind_cpu(Topology()) is None
    assert bound[-1][1] == {1}


def test_a_node_of_which_the_process_may_use_no_core_is_an_error(cuda, nvml, backend, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    nvml(Card("GPU-1", affinity=(0b11,)))
    with pytest.raises(UnsupportedOperationError, match=r"cores \[0, 1\](.|\n)*it may use \[5\]"):
        backend.bind_cpu(Topology())


@pytest.mark.usefixtures("cuda", "no_nvml")
def test_binding_without_nvml_says_what_to_install(backend):
    with pytest.raises(UnsupportedOperationError, match=r"pip install 'torchport-cuda\[nvml\]'"):
        backend.bind_cpu(Topology())


@pytest.mark.usefixtures("cuda")
def test_the_process_group_is_nccl_beside_gloo_and_connects_at_once(monkeypatch):
    given, store, device = [], dist.HashStore(), torch.device("cuda", 1)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.append((args, kwargs)))
    NcclCollectives(next(iter(torchport_collectives()))).open(TWO, device, timedelta(minutes=1), store)
    place = {"rank": 1, "world_size": 2, "timeout": timedelta(minutes=1)}
    assert given == [(("cpu:gloo,cuda:nccl",), {"store": store, "device_id": device, **place})]


# --- a whole run ---------------------------------------------------------------------------------------------


def test_a_run_prefetches_pinned_batches_on_one_stream_and_steps_in_bf16_without_waiting(cuda, nvml):
    """The loop of a script on the stub; tensors for the device are put on the host."""
    from torchport import Accelerator
    from torchport.state import AcceleratorState

    nvml(Card("GPU-1"), Card("GPU-2"))
    with cuda.on_host():
        accelerator = Accelerator(backend="cuda", precision="bf16")
        try:
            assert accelerator.device == torch.device("cuda", 0)
            model = torch.nn.Linear(4, 1)
            data = torch.utils.data.DataLoader(torch.arange(32.0).view(8, 4), batch_size=2)
            model, optimizer, data = accelerator.prepare(
                model, torch.optim.SGD(model.parameters(), lr=1e-3), data
            )
            cuda.calls.clear()
            outputs = []
            for batch in data:
                outputs.append(model(batch))
                accelerator.backward(outputs[-1].float().mean())
                optimizer.step()
                optimizer.zero_grad()
        finally:
            AcceleratorState._reset_state()
    each = ["Tensor.pin_memory", "stream", "current_stream", "Stream.wait_stream", "Tensor.record_stream"]
    asked_by_autocast = "is_bf16_supported"
    counted = Counter(call.name for call in cuda.calls if call.name != asked_by_autocast)
    assert counted == dict.fromkeys(each, 4)  # four batches; nothing waits for the device
    assert len({id(stream) for (stream,) in cuda.arguments("Stream.wait_stream")}) == 1
    assert [output.dtype for output in outputs] == [torch.float32] * 4
