"""A mesh of processes: who asked for it, how many processes it takes, and which strategies can lay it out."""

from __future__ import annotations

import dataclasses
import json

import pytest
from torchport.errors import ConfigurationError, IncompatibleError
from torchport.plan.registry import Entry, Installed, Plugin
from torchport.plan.selection import Request, plan
from torchport.plugin import (
    BackendSpec,
    Capabilities,
    CollectivesSpec,
    ParallelismConfig,
    PrecisionSpec,
    Probe,
    StrategySpec,
    Topology,
)
from torchport.utils import (
    DeepSpeedSequenceParallelConfig,
    SequenceParallelConfig,
    TorchContextParallelConfig,
    TorchTensorParallelConfig,
)

CORE = Plugin("core", "torchport-core", "0")


@dataclasses.dataclass
class Settings:
    old: bool = False

    def parallelism_problem(self, parallelism) -> str:
        return "the old version knows one dimension" if self.old else ""


def installed(*, mesh: bool = True) -> Installed:
    specs = [
        BackendSpec(
            name="host", device_type="host", factory="nowhere:B", probe="nowhere:p", collectives="hostccl"
        ),
        CollectivesSpec(name="hostccl", factory="nowhere:C"),
        PrecisionSpec(name="no", factory="nowhere:P", default=True),
        StrategySpec(name="single", factory="nowhere:S", priority=10, max_processes=1),
        StrategySpec(
            name="ddp", factory="nowhere:S", priority=10, min_processes=2, parallelism=("dp_replicate",)
        ),
    ]
    if mesh:
        every = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
        config = f"{__name__}:Settings"
        specs.append(StrategySpec(name="mesh", factory="nowhere:S", config=config, parallelism=every))
    made = Installed()
    made.add([Entry(spec, CORE) for spec in specs])
    for kind in made.entries:
        for spec in made.specs(kind):
            made._probes[kind, spec.name] = Probe(available=True, count=1)
    made._capabilities["host"] = Capabilities()
    return made


def of(world: int, rank: int = 0) -> Topology:
    return Topology(rank=rank, world_size=world, local_rank=rank, local_world_size=world)


def made(world=4, *, environ=None, strategy="mesh", there=None, settings=None, **arguments):
    arguments = {"arguments": {"strategy": strategy} if strategy else {}, **arguments}
    request = Request(settings=settings or {}, config_file="mesh.yaml", **arguments)
    return plan(request, environ or {}, there or installed(), of(world))


# --- who asks ------------------------------------------------------------------------------------------------


def test_an_argument_comes_before_variables_and_these_before_the_file():
    section = {"parallelism_config": {"parallelism_config_tp_size": 4}}
    environ = {"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    from_file = made(settings=section)
    assert from_file.parallelism.active == {"tp": 4}
    assert from_file.parallelism_source == "mesh.yaml: parallelism_config"
    from_variables = made(environ=environ, settings=section)
    assert from_variables.parallelism.active == {"dp_shard": 2, "tp": 2}
    assert from_variables.parallelism_source == "PARALLELISM_CONFIG_DP_SHARD_SIZE, PARALLELISM_CONFIG_TP_SIZE"
    given = made(environ=environ, settings=section, parallelism=ParallelismConfig(cp_size=4))
    assert given.parallelism.active == {"cp": 4}


def test_a_plan_shows_its_mesh():
    shown = made(parallelism=ParallelismConfig(dp_shard_size=2, tp_size=2))
    assert "parallelism  dp_shard 2 x tp 2  " in shown.explain()
    told = json.loads(json.dumps(shown.to_dict()))
    assert told["parallelism"]["sizes"] == {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "sp": 1, "tp": 2}
    assert made().to_dict()["parallelism"] is None
    assert "parallelism" not in made().explain()


def test_processes_that_differ_in_the_mesh_or_its_settings_have_different_fingerprints():
    def fingerprint(**sizes):
        return made(parallelism=ParallelismConfig(**sizes) if sizes else None).fingerprint()

    assert fingerprint(tp_size=4) == fingerprint(tp_size=4)
    for other in (fingerprint(cp_size=4), fingerprint(), fingerprint(tp_size=4, tp_plan={"a": "colwise"})):
        one = fingerprint(tp_size=4)
        assert {slot for slot in one if one[slot] != other[slot]} == {"parallelism"}


def test_sizes_of_1_ask_for_nothing():
    environ = {"PARALLELISM_CONFIG_TP_SIZE": "1", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "1"}
    assert made(environ=environ, strategy="ddp").parallelism is None
    assert made(parallelism=ParallelismConfig(), strategy=None).strategy == "ddp"


# --- how many processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "world", "takes", "hint"),
    [
        ({"tp_size": 4}, 2, "tp 4, which takes 4", "--num-processes 4"),
        ({"tp_size": 2}, 4, "tp 2, which takes 2", "--num-processes 2, or dp_shard_size=2"),
        ({"dp_replicate_size": 3, "cp_size": 2}, 4, "dp_replicate 3 x cp 2, which takes 6", "--num-processes 6"),
    ],
)  # fmt: skip
def test_another_number_of_processes_is_refused_with_what_to_type(sizes, world, takes, hint):
    with pytest.raises(ConfigurationError) as error:
        made(world, parallelism=ParallelismConfig(**sizes))
    assert takes in error.value.problem
    assert error.value.found == f"{world} processes"
    assert error.value.hint == hint


# --- which strategies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"tp_size": 4}, {"cp_size": 4}, {"sp_size": 4}, {"dp_shard_size": 4}])
@pytest.mark.parametrize("strategy", ["ddp", None])
def test_a_strategy_that_cannot_lay_it_out_is_refused_before_the_start(sizes, strategy):
    with pytest.raises(IncompatibleError) as error:
        made(parallelism=ParallelismConfig(**sizes), strategy=strategy)
    assert "strategy 'ddp'" in error.value.found
    assert f"({next(iter(sizes))}=4)" in error.value.reason
    assert error.value.hint == "--strategy mesh, or TORCHPORT_STRATEGY=mesh"


def test_replicas_alone_are_what_data_parallelism_does():
    shown = made(parallelism=ParallelismConfig(dp_replicate_size=4), strategy=None)
    assert (shown.strategy, shown.parallelism.describe()) == ("ddp", "dp_replicate 4")


def test_where_no_installed_strategy_can_the_package_is_named():
    with pytest.raises(IncompatibleError, match="pip install torchport-fsdp"):
        made(parallelism=ParallelismConfig(tp_size=4), strategy=None, there=installed(mesh=False))


def test_settings_of_a_strategy_may_refuse_a_mesh():
    with pytest.raises(IncompatibleError, match="the old version knows one dimension"):
        made(strategy=Settings(old=True), parallelism=ParallelismConfig(tp_size=4))


def test_a_request_that_lays_nothing_out_only_counts_processes():
    shown = made(parallelism=ParallelismConfig(tp_size=4), strategy=None, lays_out=False)
    assert shown.strategy == "ddp"
    with pytest.raises(ConfigurationError, match="which takes 4 processes"):
        made(2, parallelism=ParallelismConfig(tp_size=4), strategy=None, lays_out=False)


# --- sizes and settings --------------------------------------------------------------------------------------


def test_places_follow_from_ranks_and_processes_of_one_batch_are_neighbours():
    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2, cp_size=2, tp_size=2)
    assert mesh.total_size == 16
    assert mesh.place(13) == {"dp_replicate": 1, "dp_shard": 1, "cp": 0, "sp": 0, "tp": 1}
    assert [mesh.data_share(of(16, rank)) for rank in (0, 3, 4, 15)] == [(0, 4), (0, 4), (1, 4), (3, 4)]
    assert (mesh.data_parallel_size, mesh.non_data_parallel_size) == (4, 4)
    assert (mesh.tp_enabled, mesh.cp_enabled, mesh.sp_enabled) == (True, True, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp_size": 0}, "tp_size must be a whole number, at least 1"),
        ({"tp_size": True}, "tp_size must be a whole number, at least 1"),
        ({"cp_size": 2, "sp_size": 2}, "both spread sequences"),
        ({"sp_size": 2, "sp_backend": "deepspeed"}, "sp_backend='deepspeed' is not supported"),
        ({"cp_comm_strategy": "gossip"}, "'allgather' or 'alltoall'"),
        ({"cp_handler": "allgather"}, "cp_handler takes a TorchContextParallelConfig"),
        (
            {"cp_handler": TorchContextParallelConfig("alltoall"), "cp_comm_strategy": "allgather"},
            "leave out one of them",
        ),
        ({"sp_attn_implementation": "flash_attention_2"}, "sp_attn_implementation='sdpa'"),
        ({"sp_seq_length_is_variable": False}, "needs a length"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ParallelismConfig(**settings)
    with pytest.raises(ConfigurationError, match="enable_async_tp"):
        TorchTensorParallelConfig(enable_async_tp=True)


def test_handlers_and_fields_are_two_ways_to_say_the_same():
    handled = ParallelismConfig(cp_size=2, cp_handler=TorchContextParallelConfig(cp_comm_strategy="alltoall"))
    assert handled == ParallelismConfig(cp_size=2, cp_comm_strategy="alltoall")
    assert DeepSpeedSequenceParallelConfig is SequenceParallelConfig
    environ = {
        "PARALLELISM_CONFIG_SP_SIZE": "4",
        "PARALLELISM_CONFIG_SP_SEQ_LENGTH": "256",
        "PARALLELISM_CONFIG_SP_SEQ_LENGTH_IS_VARIABLE": "false",
        "PARALLELISM_CONFIG_TP_PLAN": '{"up": "colwise"}',
    }
    read = made(environ=environ).parallelism
    assert read.sp_handler == SequenceParallelConfig(sp_seq_length=256, sp_seq_length_is_variable=False)
    assert read.tp_handler.plan == {"up": "colwise"}
