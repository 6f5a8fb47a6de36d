"""The CPU backend and gloo."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torchport.errors import ConfigurationError, LaunchError
from torchport.plugin import BackendSpec, CollectivesSpec, Topology
from torchport_cpu.backend import CpuBackend
from torchport_cpu.cores import share_of_cores
from torchport_cpu.gloo import GlooCollectives

MEBIBYTE = 2**20
CPU = torch.device("cpu")


@pytest.fixture
def backend() -> CpuBackend:
    spec = BackendSpec(
        name="cpu", factory="torchport_cpu.backend:CpuBackend", probe="torchport_cpu:probe", device_type="cpu"
    )
    return CpuBackend(spec)


@pytest.fixture
def gloo() -> GlooCollectives:
    return GlooCollectives(CollectivesSpec(name="gloo", factory="torchport_cpu.gloo:GlooCollectives"))


def test_there_is_one_device_whatever_the_rank(backend):
    assert [backend.device(rank) for rank in range(3)] == [CPU] * 3
    assert backend.count() == 1
    assert backend.stream(CPU) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_matrix_products_in_both_claimed_formats(backend, dtype):
    assert str(dtype).removeprefix("torch.") in backend.capabilities().autocast
    with backend.autocast(dtype):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_the_gradient_scaler_skips_a_step_with_infinite_gradients(backend):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = backend.grad_scaler(init_scale=4.0)
    scaler.scale(weight * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (weight.item(), scaler.get_scale()) == (1.0, 2.0)


def test_a_large_tensor_shows_in_the_memory_in_use_and_in_its_peak(backend):
    available, total = backend.memory_info(CPU)
    assert 0 < available < total
    backend.reset_peak_memory(CPU)
    before = backend.memory_allocated(CPU)
    tensor = torch.ones(64 * MEBIBYTE // 4)
    assert backend.memory_allocated(CPU) - before >= 60 * MEBIBYTE
    del tensor
    assert backend.max_memory_allocated(CPU) - before >= 60 * MEBIBYTE
    backend.reset_peak_memory(CPU)
    assert backend.max_memory_allocated(CPU) - before < 30 * MEBIBYTE


def test_random_numbers_repeat_after_seeding_and_after_restoring_the_state(backend):
    backend.seed(3)
    first = torch.rand(4)
    state = backend.rng_state(CPU)
    second = torch.rand(4)
    backend.set_rng_state(state, CPU)
    assert torch.rand(4).equal(second)
    backend.seed(3)
    assert torch.rand(4).equal(first)


@pytest.mark.parametrize(
    ("cores", "processes", "shares"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([4, 5, 6, 7, 8], 2, [[4, 5], [6, 7, 8]]),
        ([0, 2, 4, 6], 3, [[0], [2], [4, 6]]),
        ([0, 1], 3, [[0], [1], [0]]),
        ([5], 1, [[5]]),
    ],
)
def test_shares_of_cores_are_contiguous_and_even(cores, processes, shares):
    assert [share_of_cores(cores, rank, processes) for rank in range(processes)] == shares


@pytest.mark.parametrize(
    ("processes", "variable", "threads"),
    [(2, None, max(1, len(os.sched_getaffinity(0)) // 2)), (2, "3", 7), (1, None, 7)],
)
def test_each_of_several_processes_gets_its_share_of_threads_unless_told(
    backend, monkeypatch, processes, variable, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        backend.start_process(Topology(world_size=processes, local_world_size=processes))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


BIND = """
import os, torch
from torchport.plugin import BackendSpec, Topology
from torchport_cpu.backend import CpuBackend
spec = BackendSpec(name="cpu", factory="a:B", probe="a:b", device_type="cpu")
torch.ones(500, 500) @ torch.ones(500, 500)  # starts the threads of the matrix product
cores = sorted(os.sched_getaffinity(0))
CpuBackend(spec).bind_cpu(Topology(rank=1, world_size=2, local_rank=1, local_world_size=2))
share = cores[len(cores) // 2:] if len(cores) > 1 else cores
threads = [int(name) for name in os.listdir("/proc/self/task")]
assert all(sorted(os.sched_getaffinity(thread)) == share for thread in threads), (threads, share)
assert torch.get_num_threads() == len(share)
"""


def test_binding_moves_every_thread_of_the_process_to_its_share_of_the_cores():
    done = subprocess.run([sys.executable, "-c", BIND], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- gloo ---


def test_a_job_of_one_process_needs_no_address(gloo):
    store = gloo.rendezvous(Topology(), timedelta(seconds=5))
    gloo.open(Topology(), CPU, timedelta(seconds=5), store)
    assert dist.get_backend() == "gloo"
    assert gloo.all_reduce(torch.ones(2)).equal(torch.ones(2))
    gloo.close()
    assert not dist.is_initialized()
    gloo.close()  # twice does no harm


def test_a_group_of_the_script_is_joined_and_left_alone(gloo):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        gloo.open(Topology(), CPU, timedelta(seconds=5), dist.HashStore())
        gloo.close()
        assert dist.is_initialized()
        other = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2)
        with pytest.raises(ConfigurationError, match=r"rank 1 of 2(.|\n)*rank 0 of 1"):
            gloo.open(other, CPU, timedelta(seconds=5), dist.HashStore())
    finally:
        dist.destroy_process_group()


def test_several_machines_without_an_address_are_told_which_variables_to_set(gloo):
    place = Topology(rank=0, world_size=4, local_rank=0, local_world_size=2, num_nodes=2, source="MPICH")
    with pytest.raises(LaunchError, match=r"MASTER_ADDR(.|\n)*MASTER_PORT"):
        gloo.rendezvous(place, timedelta(seconds=5))


def test_an_address_where_nobody_listens_is_named_in_the_error(gloo):
    place = Topology(
        rank=1, world_size=2, local_rank=1, local_world_size=2, master_addr="127.0.0.1", master_port=9
    )
    with pytest.raises(LaunchError, match=r"rank 1 cannot meet the other processes at 127\.0\.0\.1:9"):
        gloo.rendezvous(place, timedelta(seconds=1))


def _meet(rank: int, port: int, answers) -> None:
    collectives = GlooCollectives(CollectivesSpec(name="gloo", factory="torchport_cpu.gloo:GlooCollectives"))
    place = Topology(
        rank=rank,
        world_size=2,
        local_rank=rank,
        local_world_size=2,
        master_addr="127.0.0.1",
        master_port=port,
    )
    store = collectives.rendezvous(place, timedelta(seconds=60))
    collectives.open(place, CPU, timedelta(seconds=60), store)
    answers.put((rank, collectives.all_reduce(torch.tensor([rank + 1.0])).item()))
    collectives.close()


@pytest.mark.multiprocess
@pytest.mark.alone
def test_processes_meet_at_the_topologys_address_without_any_variable_set(monkeypatch):
    import socket

    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_meet, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        assert sorted(answers.get(timeout=60) for _ in processes) == [(0, 3.0), (1, 3.0)]
        for process in processes:
            process.join(timeout=30)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
