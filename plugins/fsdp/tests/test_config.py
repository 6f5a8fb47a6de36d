"""Every documented field, and how flags, keys and variables become settings."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torchport.config import schema
from torchport.plugin import ParallelismConfig
from torchport_fsdp import AutoWrapPolicy, BackwardPrefetch, ShardingStrategy, StateDictType
from torchport_fsdp import FullyShardedDataParallelPlugin as Fsdp

TORCHPORT = str(Path(sys.executable).parent / "torchport")
FIELDS = [
    "fsdp_version", "sharding_strategy", "reshard_after_forward", "backward_prefetch", "mixed_precision_policy",
    "auto_wrap_policy", "cpu_offload", "ignored_modules", "state_dict_type", "state_dict_config",
    "optim_state_dict_config", "limit_all_gathers", "use_orig_params", "param_init_fn", "sync_module_states",
    "forward_prefetch", "activation_checkpointing", "cpu_ram_efficient_loading", "transformer_cls_names_to_wrap",
    "min_num_params",
]  # fmt: skip
GUIDE = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch_policy: BACKWARD_PRE
  fsdp_forward_prefetch: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_transformer_layer_cls_to_wrap: BertLayer
  fsdp_use_orig_params: true
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
SHOW = """
import json, os, sys
print(json.dumps({key: value for key, value in os.environ.items() if key.startswith(("FSDP_", "TORCHPORT_"))}))
"""


def torchport(*arguments: str, code: int = 0, **variables: str) -> str:
    done = subprocess.run(
        [TORCHPORT, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def show(tmp_path) -> str:
    (tmp_path / "show.py").write_text(SHOW)
    return str(tmp_path / "show.py")


def test_every_documented_field_is_there():
    assert set(FIELDS) <= {field.name for field in dataclasses.fields(Fsdp)}


def test_flags_reach_the_workers_as_variables_under_either_name(show):
    flags = ["--use_fsdp", "--fsdp_sharding_strategy", "2", "--fsdp_backward_prefetch_policy", "NO_PREFETCH"]
    flags += [
        "--fsdp_offload_params",
        "true",
        "--fsdp_reshard_after_forward",
        "false",
        "--fsdp_min_num_params",
        "7",
    ]
    found = json.loads(torchport("launch", *flags, show))
    assert found["TORCHPORT_STRATEGY"] == "fsdp"
    settings = Fsdp(**schema.from_environment(Fsdp, found))
    assert settings.sharding_strategy is ShardingStrategy.SHARD_GRAD_OP
    assert settings.backward_prefetch is BackwardPrefetch.NO_PREFETCH
    assert (settings.cpu_offload, settings.reshard_after_forward, settings.min_num_params) == (True, False, 7)


def test_the_file_of_the_documented_guide_launches_as_it_is(tmp_path):
    (tmp_path / "config.yaml").write_text(GUIDE)
    script = "from torchport import Accelerator\na = Accelerator()\n"
    script += "p = a.plan['strategy'].config\n"
    script += (
        "a.print(a.distributed_type.value, a.mixed_precision, a.num_processes, p.sharding_strategy.value,"
    )
    script += (
        " p.state_dict_type.value, p.cpu_ram_efficient_loading, p.auto_wrap_policy.value)\na.end_training()\n"
    )
    (tmp_path / "run.py").write_text(script)
    output = torchport("launch", "--config_file", str(tmp_path / "config.yaml"), str(tmp_path / "run.py"))
    assert output.strip() == "[rank0]: FSDP bf16 2 FULL_SHARD SHARDED_STATE_DICT True TRANSFORMER_BASED_WRAP"


def test_an_unknown_key_or_value_is_an_error_with_the_nearest_known(tmp_path, show):
    (tmp_path / "config.yaml").write_text("fsdp_config: {fsdp_sharding_strateg: 1}\n")
    error = torchport("launch", "--config_file", str(tmp_path / "config.yaml"), show, code=2)
    assert "did you mean 'fsdp_sharding_strategy'?" in error
    error = torchport("launch", "--fsdp-sharding-strategy", "FULL_SHART", show, code=2)
    assert "FULL_SHARD" in error
    (tmp_path / "config.yaml").write_text(
        "fsdp_config: {fsdp_backward_prefetch: BACKWARD_PRE, fsdp_backward_prefetch_policy: BACKWARD_POST}\n"
    )
    error = torchport("launch", "--config_file", str(tmp_path / "config.yaml"), show, code=2)
    assert "are one setting" in error


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({}, (2, "FULL_SHARD", True, "SHARDED_STATE_DICT")),
        ({"fsdp_version": 1}, (1, "FULL_SHARD", True, "FULL_STATE_DICT")),
        ({"reshard_after_forward": False}, (2, "SHARD_GRAD_OP", False, "SHARDED_STATE_DICT")),
        ({"reshard_after_forward": "SHARD_GRAD_OP"}, (2, "SHARD_GRAD_OP", False, "SHARDED_STATE_DICT")),
        ({"reshard_after_forward": "4"}, (2, "FULL_SHARD", 4, "SHARDED_STATE_DICT")),
        ({"sharding_strategy": 4}, (2, "HYBRID_SHARD", True, "SHARDED_STATE_DICT")),
        ({"sharding_strategy": "5"}, (2, "HYBRID_SHARD_ZERO2", False, "SHARDED_STATE_DICT")),
        ({"state_dict_type": "full_state_dict"}, (2, "FULL_SHARD", True, "FULL_STATE_DICT")),
    ],
)
def test_settings_that_follow_from_others_are_settled_when_the_object_is_made(given, settled):
    made = Fsdp(**given)
    found = (
        made.fsdp_version,
        made.sharding_strategy.value,
        made.reshard_after_forward,
        made.state_dict_type.value,
    )
    assert found == settled
    assert made.use_orig_params
    assert made.sync_module_states


def test_members_of_pytorchs_enumerations_are_taken_too():
    from torch.distributed import fsdp

    made = Fsdp(
        fsdp_version=1,
        sharding_strategy=fsdp.ShardingStrategy.SHARD_GRAD_OP,
        backward_prefetch=fsdp.BackwardPrefetch.BACKWARD_POST,
        state_dict_type=fsdp.StateDictType.SHARDED_STATE_DICT,
        cpu_offload=fsdp.CPUOffload(offload_params=True),
    )
    assert made.sharding_strategy is ShardingStrategy.SHARD_GRAD_OP
    assert made.backward_prefetch is BackwardPrefetch.BACKWARD_POST
    assert made.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert made.cpu_offload is True
    assert Fsdp(auto_wrap_policy="no_wrap").auto_wrap_policy is AutoWrapPolicy.NO_WRAP


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fsdp_version": 3}, "must be 1 or 2"),
        ({"sharding_strategy": 6}, "sharding_strategy must be one of FULL_SHARD"),
        ({"sharding_strategy": "FULL_SHARD", "reshard_after_forward": False}, "disagree"),
        ({"backward_prefetch": "BACKWARD_POST"}, "BACKWARD_POST needs fsdp_version=1"),
        ({"use_orig_params": False}, "use_orig_params=False needs fsdp_version=1"),
        ({"state_dict_type": "LOCAL_STATE_DICT"}, "use SHARDED_STATE_DICT"),
        ({"cpu_ram_efficient_loading": True, "sync_module_states": False}, "needs sync_module_states"),
        ({"fsdp_version": 1, "reshard_after_forward": 2}, "true or false with fsdp_version=1"),
    ],
)
def test_what_cannot_be_done_is_refused_when_the_object_is_made(given, words):
    with pytest.raises(ValueError, match=words):
        Fsdp(**given)


def test_to_fsdp2_converts_what_has_another_name_and_keeps_the_rest(tmp_path):
    source, target = tmp_path / "old.yaml", tmp_path / "new.yaml"
    source.write_text(GUIDE.replace("FULL_SHARD", "SHARD_GRAD_OP"))
    torchport("to-fsdp2", "--config_file", str(source), "--output_file", str(target))
    written = yaml.safe_load(target.read_text())
    assert written["fsdp_config"] == {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_forward_prefetch": False,
        "fsdp_offload_params": False,
        "fsdp_reshard_after_forward": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
    }
    rest = {key: value for key, value in yaml.safe_load(GUIDE).items() if key != "fsdp_config"}
    assert {key: value for key, value in written.items() if key != "fsdp_config"} == rest
    Fsdp(**schema.from_mapping(Fsdp, written["fsdp_config"], "new.yaml"))
    error = torchport("to-fsdp2", "--config_file", str(target), "--overwrite", code=2)
    assert "is for FSDP2 already" in error
    error = torchport("to-fsdp2", "--config_file", str(source), code=2)
    assert "either --output-file FILE or --overwrite" in error


def test_merge_weights_says_what_it_needs(tmp_path):
    error = torchport("merge-weights", str(tmp_path), str(tmp_path / "out"), code=2)
    assert "holds no sharded model" in error


def test_documented_names_come_from_the_core_where_users_look_for_them():
    import torch
    import torchport
    import torchport.utils
    import torchport_fsdp
    from torchport.aliases import PLUGIN_NAMES

    for name in [name for name, plugin in PLUGIN_NAMES.items() if plugin == "fsdp"]:
        assert getattr(torchport.utils, name) is getattr(torchport_fsdp, name)
    assert torchport.FullyShardedDataParallelPlugin is Fsdp
    with pytest.raises(AttributeError, match="has no attribute 'merge_fsdp_weight'"):
        torchport.utils.merge_fsdp_weight  # noqa: B018
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.Tanh()))
    pairs = torchport_fsdp.get_module_children_bottom_up(model, return_fqns=True)
    assert [name for name, _ in pairs] == ["0", "1.0", "1", ""]


def test_switching_parameters_by_hand_keeps_groups_and_state():
    import torch
    from torchport_fsdp import fsdp2_switch_optimizer_parameters

    before, after = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(before.parameters(), lr=0.5)
    before(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    states = list(optimizer.state.values())
    new = dict(zip(before.parameters(), after.parameters(), strict=True))
    fsdp2_switch_optimizer_parameters(optimizer, new)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in after.parameters()]
    assert [optimizer.state[p] for p in after.parameters()] == states
    with pytest.raises(KeyError):
        fsdp2_switch_optimizer_parameters(optimizer, {})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fsdp_version": 1}, "FSDP1 knows one dimension"),
        ({"sharding_strategy": "HYBRID_SHARD"}, "dp_replicate_size and dp_shard_size say the same"),
        ({"sharding_strategy": "NO_SHARD"}, "divides the processes by itself"),
        ({"shard_group_size": 2}, "said by dp_shard_size"),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, ""),
        ({}, ""),
    ],
)
def test_settings_that_divide_the_processes_by_themselves_do_not_go_with_a_mesh(settings, reason):
    found = Fsdp(**settings).parallelism_problem(ParallelismConfig(dp_shard_size=2, tp_size=2))
    assert reason in found
    assert bool(found) == bool(reason)
