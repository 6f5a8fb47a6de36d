"""The variables that tell a process its rank."""

from __future__ import annotations

import pytest
from torchport.builtin import torchport_launchers
from torchport.builtin.local import LocalLauncher
from torchport.builtin.ranks import rank_variables, read_topology
from torchport.builtin.torchrun import TorchrunLauncher
from torchport.plugin import Job, Topology

SPECS = {spec.name: spec for spec in torchport_launchers()}
FIRST_OF_TWO = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_what_is_written_is_read_back():
    topology = Topology(
        rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, num_nodes=2,
        master_addr="10.0.0.1", master_port=29500, source="test",
    )  # fmt: skip
    assert read_topology(rank_variables(topology), "test") == topology


def test_no_variables_is_no_launcher():
    assert read_topology({}, "test") is None
    assert read_topology({"WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, "test") is None


def test_the_machine_follows_from_the_rank_where_nobody_says_it():
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}  # fmt: skip
    topology = read_topology(variables, "test")
    assert (topology.node_rank, topology.num_nodes) == (1, 2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"WORLD_SIZE": ""}, "RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2 without WORLD_SIZE"),
        ({"RANK": ""}, "without RANK"),
        (
            {"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""},
            "RANK=0, WORLD_SIZE=2 without LOCAL_RANK, LOCAL_WORLD_SIZE",
        ),
        ({"RANK": "", "LOCAL_RANK": ""}, "WORLD_SIZE=2 is set, but RANK is not"),
        ({"RANK": "2"}, "RANK=2 contradicts WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1 contradicts WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 contradicts LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 contradicts WORLD_SIZE=2"),
        ({"RANK": "first"}, "RANK='first' is not a whole number"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x' is not a whole number"),
    ],
)
def test_variables_that_are_missing_or_contradict_each_other_are_named(change, expected):
    with pytest.raises(ValueError) as caught:
        read_topology(FIRST_OF_TWO | change, "test")
    assert expected in str(caught.value)


@pytest.mark.parametrize(("extra", "source"), [({}, "local"), ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun")])
def test_exactly_one_launcher_recognizes_the_variables(extra, source):
    launchers = (LocalLauncher(SPECS["local"]), TorchrunLauncher(SPECS["torchrun"]))
    found = [topology for launcher in launchers if (topology := launcher.detect(FIRST_OF_TWO | extra))]
    assert [topology.source for topology in found] == [source]


def options(**changes) -> tuple[str, ...]:
    job = Job(
        command=("python", "train.py", "--lr", "1"),
        environ={},
        num_processes=4,
        main_process_port=4242,
        **changes,
    )
    return TorchrunLauncher(SPECS["torchrun"]).command(job)[3:]


def test_the_agent_gets_the_options_of_a_static_rendezvous():
    assert options(num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", max_restarts=3, log_dir="/logs", tee=1) == (
        "--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.1",
        "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "4242",
        "--log-dir", "/logs", "--redirects", "3", "--tee", "1",
        "--no-python", "python", "train.py", "--lr", "1",
    )  # fmt: skip


def test_the_agent_gets_the_options_of_a_dynamic_rendezvous():
    assert options(rdzv_backend="c10d", rdzv_id="job", rdzv_conf="timeout=9", role="trainer", extra_args=("--x",)) == (
        "--nnodes", "1", "--nproc-per-node", "4", "--max-restarts", "0", "--monitor-interval", "0.1",
        "--role", "trainer", "--rdzv-id", "job", "--rdzv-conf", "timeout=9",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:4242", "--x",
        "--no-python", "python", "train.py", "--lr", "1",
    )  # fmt: skip
