"""The layers of a launch's settings: flags, variables, files, and their documented older spellings."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import pytest
from torchport import aliases, envvars
from torchport.config import schema
from torchport.config.launch import LaunchConfig
from torchport.config.layers import Layer, resolve
from torchport.config.plugins import PluginSettings, apply_settings
from torchport.errors import ConfigurationError
from torchport.plugin import StrategySpec, setting


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a configuration file and return the flags that name it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Layer:
        (tmp_path / "c.yaml").write_text(textwrap.dedent(text))
        flags = Layer()
        flags.put("config_file", "c.yaml", "--config-file")
        return flags

    return write


def _template(name: str) -> str:
    folder = Path(__file__).parents[1] / "fixtures" / "accelerate" / "config_yaml_templates"
    return (folder / f"{name}.yaml").read_text()


# The files under examples/config_yaml_templates of the reference documents, and those of its guides.
TEMPLATES = {
    "deepspeed": (_template("deepspeed"), {"strategy": "deepspeed", "num_processes": 2}),
    "fp8": (_template("fp8"), {"precision": "fp8", "num_processes": 1}),
    "fsdp": (_template("fsdp"), {"strategy": "fsdp", "precision": "bf16", "num_processes": 2}),
    "multi_gpu": (_template("multi_gpu"), {"backend": "cuda", "precision": "bf16", "num_processes": 2}),
    "multi_node": (_template("multi_node"), {
            "backend": "cuda", "machine_rank": 0, "main_process_ip": "1234", "main_process_port": 9999,
            "num_machines": 2, "num_processes": 8, "rdzv_backend": "static", "same_network": False,
        }),
    "single_gpu": (_template("single_gpu"), {"precision": "bf16", "num_processes": 1}),
    "intel_cpu": ("""
        compute_environment: LOCAL_MACHINE
        distributed_type: MULTI_CPU
        downcast_bf16: 'no'
        machine_rank: 0
        main_process_ip: 36.112.23.24
        main_process_port: 29500
        main_training_function: main
        mixed_precision: bf16
        mpirun_config:
          mpirun_ccl: '1'
          mpirun_hostfile: /home/user/hostfile
        num_machines: 4
        num_processes: 16
        rdzv_backend: static
        same_network: true
        tpu_env: []
        tpu_use_cluster: false
        tpu_use_sudo: false
        use_cpu: true
        """, {
            "backend": "cpu", "machine_rank": 0, "main_process_ip": "36.112.23.24", "main_process_port": 29500,
            "precision": "bf16", "launcher": "mpirun", "host_file": "/home/user/hostfile", "num_machines": 4,
            "num_processes": 16, "rdzv_backend": "static", "same_network": True,
        }),
    "default_config": ("""
        compute_environment: LOCAL_MACHINE
        deepspeed_config: {}
        distributed_type: MULTI_CPU
        downcast_bf16: no
        dynamo_backend: 'NO'
        fsdp_config: {}
        gpu_ids: null
        machine_rank: 0
        main_process_ip: null
        main_process_port: null
        main_training_function: main
        megatron_lm_config: {}
        mixed_precision: no
        num_machines: 1
        num_processes: 2
        tpu_name: null
        tpu_zone: null
        use_cpu: false
        """, {"backend": "cpu", "machine_rank": 0, "precision": "no", "num_machines": 1, "num_processes": 2}),
    "sagemaker": ("""
        compute_environment: AMAZON_SAGEMAKER
        distributed_type: DATA_PARALLEL
        num_machines: 1
        """, {"launcher": "sagemaker", "strategy": "ddp", "num_machines": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_documented_files_are_understood(file, name):
    text, expected = TEMPLATES[name]
    config = resolve(file(text), {}).config
    default = LaunchConfig(config_file="c.yaml")
    changed = {
        item.name: getattr(config, item.name)
        for item in schema.settings_of(LaunchConfig)
        if getattr(config, item.name) != getattr(default, item.name)
    }
    unchanged = {key: value for key, value in expected.items() if getattr(default, key) == value}
    assert {**changed, **unchanged} == expected


def test_a_label_of_tensor_parallelism_is_the_strategy_that_lays_layers_out_over_a_mesh(file):
    text = "distributed_type: TP\nparallelism_config: {parallelism_config_tp_size: 2}"
    assert resolve(file(text), {}).config.strategy == "fsdp"


def test_every_label_of_a_distributed_type_is_a_key_that_files_may_use():
    assert set(aliases.DISTRIBUTED_TYPES) <= set(aliases.DISTRIBUTED_TYPE_SLOTS)


@pytest.mark.parametrize(
    ("flag", "variable", "yaml", "expected", "origin"),
    [
        ("bf16", "fp16", "no", "bf16", "--precision"),
        ("bf16", "fp16", None, "bf16", "--precision"),
        ("bf16", None, "no", "bf16", "--precision"),
        (None, "fp16", "no", "fp16", "TORCHPORT_PRECISION"),
        (None, None, "no", "no", "c.yaml: precision"),
        (None, None, None, "", None),
    ],
)
def test_the_command_line_comes_before_the_environment_and_that_before_the_file(
    file, flag, variable, yaml, expected, origin
):
    flags = file(f"precision: {yaml}" if yaml else "")
    if flag:
        flags.put("precision", flag, "--precision")
    environ = {"TORCHPORT_PRECISION": variable} if variable else {}
    resolved = resolve(flags, environ)
    assert resolved.config.precision == expected
    assert resolved.origins.get("precision") == origin
    assert resolved.environ.get("TORCHPORT_PRECISION", "") == expected
    known = envvars.origins(resolved.environ).get("TORCHPORT_PRECISION")
    assert known == (None if origin == "TORCHPORT_PRECISION" else origin)
    assert len(resolved.overrides) == (1 if flag and variable else 0)


def test_the_file_can_be_named_by_a_variable(file):
    file("num_processes: 3")
    resolved = resolve(Layer(), {"TORCHPORT_CONFIG_FILE": "c.yaml"})
    assert resolved.config.num_processes == 3
    assert "TORCHPORT_CONFIG_FILE" in envvars.origins(resolved.environ)  # its workers know that it was read


def test_a_flag_that_says_the_same_as_the_variable_overrides_nothing():
    flags = Layer()
    flags.put("debug", True, "--debug")
    assert resolve(flags, {"TORCHPORT_DEBUG": "1"}).overrides == ()


def test_a_flag_can_switch_off_what_a_variable_switches_on():
    flags = Layer()
    flags.put("debug", False, "--no-debug")
    resolved = resolve(flags, {"TORCHPORT_DEBUG": "1"})
    assert not envvars.flag(resolved.environ, "TORCHPORT_DEBUG")
    assert resolved.overrides == ("--no-debug (debug=False) overrides TORCHPORT_DEBUG=1",)


def test_documented_variables_are_translated_and_named_in_messages():
    resolved = resolve(Layer(), {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_DEBUG_MODE": "1"})
    assert (resolved.config.strategy, resolved.config.debug) == ("fsdp", True)
    assert envvars.origins(resolved.environ) == {
        "TORCHPORT_STRATEGY": "ACCELERATE_USE_FSDP",
        "TORCHPORT_DEBUG": "ACCELERATE_DEBUG_MODE",
    }


def test_a_variable_of_our_own_comes_before_a_documented_one():
    environ = {"ACCELERATE_MIXED_PRECISION": "fp16", "TORCHPORT_PRECISION": "bf16"}
    assert aliases.translate_environment(environ) == environ


def test_documented_variables_that_disagree_are_refused():
    with pytest.raises(
        ConfigurationError, match="ACCELERATE_USE_DEEPSPEED asks for TORCHPORT_STRATEGY=deepspeed"
    ):
        aliases.translate_environment({"ACCELERATE_USE_FSDP": "1", "ACCELERATE_USE_DEEPSPEED": "1"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_processes: two", "c.yaml: num_processes must be a whole number"),
        ("distributed_type: MULTI_CUP", "did you mean 'MULTI_CPU'?"),
        ("distributed_type: MULTI_GPU\nuse_cpu: true", "c.yaml: distributed_type says backend=cuda, and c.yaml: use_cpu says backend=cpu"),
        ("mixed_precision: bf16\nprecision: fp16", "leave out one of them"),
        ("tpu_use_cluster: true", "c.yaml: tpu_use_cluster: True is not supported"),
        ("distributed_type: TP", "in its place `strategy: fsdp` and `parallelism_config: {parallelism_config_tp_size: N}`"),
        ("distributed_type: model_parallel", "--parallelism-config-tp-size N"),
        ("- a\n- b", "must hold keys and values\n  found:  a list"),
        ("a: [", "is not YAML"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_followed_is_refused(file, text, expected):
    with pytest.raises(ConfigurationError) as caught:
        resolve(file(text), {})
    assert expected in str(caught.value)


# --- settings of plugins ---


def _plugin() -> PluginSettings:
    import dataclasses

    @dataclasses.dataclass
    class Sharding:
        __torchport_prefix__ = "shard"
        degree: int = setting(1, help="How many shards.")
        offload: bool = setting(False, help="Whether to offload.")
        hook: str = setting("", help="Only in the script.", flag="", env="")

    Sharding.__annotations__ = {"degree": int, "offload": bool, "hook": str}
    return PluginSettings(StrategySpec(name="shard", factory="m:C", config="m:Sharding"), Sharding)


@pytest.mark.parametrize(
    ("flag", "variable", "yaml", "expected", "origin"),
    [
        ("3", "2", "1", "3", "--shard-degree"),
        (None, "2", "1", "2", None),
        (None, None, "1", "1", "c.yaml: shard_config: shard_degree"),
        (None, None, None, None, None),
    ],
)
def test_settings_of_plugins_have_the_same_precedence(file, flag, variable, yaml, expected, origin):
    flags = file(f"shard_config: {{shard_degree: {yaml}}}" if yaml else "shard_config: {}")
    resolved = resolve(flags, {"SHARD_DEGREE": variable} if variable else {})
    applied = apply_settings(resolved, {"shard-degree": flag} if flag else {}, [_plugin()])
    assert applied.environ.get("SHARD_DEGREE") == expected
    assert envvars.origins(applied.environ).get("SHARD_DEGREE") == origin


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shard_config: {shard_degre: 1}", "c.yaml: shard_config: unknown key 'shard_degre'\n  try:    did you mean 'shard_degree'?"),
        ("shard_config: {shard_degree: many}", "c.yaml: shard_config: shard_degree must be a whole number"),
        ("shard_config: {shard_hook: x}", "shard_hook cannot be set in a file\n  try:    give it to Sharding in the script"),
        ("shard_config: 3", "c.yaml: shard_config must hold keys and values"),
        ("num_proceses: 3", "c.yaml: unknown key 'num_proceses'\n  try:    did you mean 'num_processes'?"),
        ("fsdp_config: {fsdp_x: 1}", "pip install torchport-fsdp"),
        ("shard_confg: {shard_degree: 1}", "did you mean 'shard_config'?"),
    ],
)  # fmt: skip
def test_a_key_that_nobody_reads_is_refused(file, text, expected):
    resolved = resolve(file(text), {})
    with pytest.raises(ConfigurationError) as caught:
        apply_settings(resolved, {}, [_plugin()])
    assert expected in str(caught.value)


def test_every_setting_of_a_launch_has_help_and_a_flag():
    for item in schema.settings_of(LaunchConfig):
        assert item.help.endswith("."), item.name
        assert item.flag, item.name


@dataclasses.dataclass
class Lists:
    names: tuple[str, ...] = setting((), help="Names.")
    flags: tuple[bool, bool, bool] = setting((False, False, False), help="Three of them.")


@pytest.mark.parametrize("given", ["(true, false, no)", "[1,0,0]", "true,false,false", [True, False, False]])
def test_items_of_a_sequence_are_converted_one_by_one(given):
    assert schema.from_mapping(Lists, {"flags": given}, "f")["flags"] == (True, False, False)


def test_a_sequence_of_names_may_have_any_length():
    assert schema.from_mapping(Lists, {"names": "a, b,,c "}, "f")["names"] == ("a", "b", "c")
    assert schema.from_mapping(Lists, {"names": []}, "f")["names"] == ()


@pytest.mark.parametrize("given", ["true,false", "true,false,maybe", 3])
def test_a_sequence_of_another_length_or_kind_is_refused(given):
    with pytest.raises(ConfigurationError, match="3 values with commas, each true or false"):
        schema.from_mapping(Lists, {"flags": given}, "f")
