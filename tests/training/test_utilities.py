"""The documented utilities: environment, versions, precision, nested structures."""

import inspect
import os
import socket

import pytest
import torch
from torchport import Accelerator, PartialState, utils
from torchport.errors import ConfigurationError
from torchport.state import AcceleratorState, is_initialized


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_variables_are_patched_in_a_block_and_restored_even_after_an_error(monkeypatch):
    monkeypatch.setenv("KEPT", "old")
    monkeypatch.delenv("NEW", raising=False)
    seen = {}

    def fail() -> None:
        seen.update(os.environ)
        raise RuntimeError

    with pytest.raises(RuntimeError), utils.patch_environment(kept=1, new="two"):
        fail()
    assert (seen["KEPT"], seen["NEW"]) == ("1", "two")
    assert os.environ["KEPT"] == "old"
    assert "NEW" not in os.environ


def test_the_environment_is_cleared_in_a_block(monkeypatch):
    monkeypatch.setenv("KEPT", "old")
    with utils.clear_environment():
        assert not os.environ
        os.environ["NEW"] = "1"
    assert os.environ["KEPT"] == "old"
    assert "NEW" not in os.environ


def test_variables_that_a_function_sets_are_purged(monkeypatch):
    monkeypatch.setenv("ACCELERATE_KEPT", "old")

    @utils.purge_accelerate_environment
    def change() -> None:
        os.environ |= {"TORCHPORT_NEW": "1", "ACCELERATE_KEPT": "new", "OTHER_OF_THE_TEST": "1"}

    @utils.purge_accelerate_environment
    class Changes:
        def change(self) -> int:
            os.environ["ACCELERATE_NEW"] = "1"
            return 3

    change()
    assert Changes().change() == 3
    assert os.environ["ACCELERATE_KEPT"] == "old"
    assert not {"TORCHPORT_NEW", "ACCELERATE_NEW"} & os.environ.keys()
    assert os.environ.pop("OTHER_OF_THE_TEST") == "1"


def test_variables_are_read_as_flags_choices_and_numbers(monkeypatch):
    monkeypatch.setenv("A_FLAG", "Yes")
    monkeypatch.setenv("A_NUMBER", "7")
    monkeypatch.setenv("A_TEXT", "seven")
    assert utils.parse_flag_from_env("A_FLAG") is True
    assert utils.parse_flag_from_env("NOT_SET", True) is True
    assert utils.parse_choice_from_env("A_TEXT") == "seven"
    assert utils.parse_choice_from_env("NOT_SET") == "no"
    assert utils.get_int_from_env(["NOT_SET", "A_TEXT", "A_NUMBER"], 1) == 7
    assert utils.get_int_from_env(["NOT_SET"], 1) == 1
    assert [utils.str_to_bool(text) for text in ("ON", "n", "1", "False")] == [1, 0, 1, 0]
    assert utils.str_to_bool("true", to_bool=True) is True
    with pytest.raises(ConfigurationError, match="'maybe' means neither yes nor no"):
        utils.str_to_bool("maybe")


def test_a_port_is_in_use_while_something_listens():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        assert utils.is_port_in_use(port)
    assert not utils.is_port_in_use(port)


def test_versions_are_compared():
    assert utils.is_torch_version(">=", "2.6")
    assert not utils.is_torch_version("<", "2.6")
    assert utils.compare_versions("torch", ">", "1.0")
    with pytest.raises(ConfigurationError, match="'=>' does not compare versions"):
        utils.compare_versions("torch", "=>", "1.0")


def test_what_is_available_is_asked_of_plugins_and_packages(monkeypatch):
    assert not utils.is_npu_available()
    assert not utils.is_xpu_available(check_device=True)
    assert not utils.is_mps_available(min_version="99.0")
    assert not utils.is_torch_xla_available(check_is_tpu=True)
    assert not utils.is_ipex_available()
    assert isinstance(utils.is_schedulefree_available(), bool)
    assert list(inspect.signature(utils.is_xpu_available).parameters) == ["check_device"]
    with pytest.raises(TypeError, match="device"):
        utils.is_npu_available(device=1)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setenv("TORCHPORT_DISABLE_PLUGINS", "xpu")  # without a plugin, PyTorch is asked
    assert utils.is_xpu_available()


def test_bf16_is_available_where_the_backend_says_so():
    PartialState()
    assert utils.is_bf16_available()


def test_the_precision_of_the_run_is_a_context():
    with pytest.raises(ConfigurationError, match="precision of the run is not known"):
        utils.get_mixed_precision_context_manager(native_amp=True)
    Accelerator(mixed_precision="bf16")
    a = torch.ones(2, 2)
    with utils.get_mixed_precision_context_manager(native_amp=True):
        assert (a @ a).dtype == torch.bfloat16
    with utils.get_mixed_precision_context_manager(
        native_amp=True, autocast_kwargs=utils.AutocastKwargs(False)
    ):
        assert (a @ a).dtype == torch.float32
    with utils.get_mixed_precision_context_manager():
        assert (a @ a).dtype == torch.float32


def test_a_scaler_is_made_with_and_without_a_run():
    assert utils.get_grad_scaler(init_scale=8.0).get_scale() == 8.0
    Accelerator(mixed_precision="fp16")
    assert utils.get_grad_scaler(init_scale=4.0).get_scale() == 4.0


def test_a_process_is_bound_to_cores_again_only_when_told_to():
    before = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        with pytest.raises(ConfigurationError, match="device of this process is not known"):
            utils.override_numa_affinity(0)
        PartialState()
        utils.override_numa_affinity(0)
        assert os.sched_getaffinity(0) <= before[0]
        utils.set_numa_affinity(0)
    finally:
        os.sched_setaffinity(0, before[0])
        torch.set_num_threads(before[1])
        utils.set_numa_affinity.cache_clear()


def test_whether_a_run_is_open_is_known():
    assert not is_initialized()
    PartialState()
    assert is_initialized()


def test_batch_sizes_are_found_or_ignored():
    data = {"a": [], "b": (torch.zeros(3, 2),)}
    assert utils.find_batch_size(data) == utils.ignorant_find_batch_size(data) == 3
    assert utils.ignorant_find_batch_size(torch.tensor(1.0)) is None
    with pytest.raises(ValueError, match="without dimensions"):
        utils.find_batch_size(torch.tensor(1.0))


def test_nested_mappings_are_merged_level_by_level():
    destination = {"a": {"x": 1, "y": 2}, "b": 3}
    assert utils.merge_dicts({"a": {"y": 5}, "c": {"z": 1}}, destination) is destination
    assert destination == {"a": {"x": 1, "y": 5}, "b": 3, "c": {"z": 1}}


def test_cached_memory_is_given_back_with_and_without_a_run():
    utils.clear_device_cache()
    PartialState()
    utils.clear_device_cache(garbage_collection=True)
    assert utils.release_memory(object(), object()) == [None, None]


def test_documented_labels_are_members_and_plugins_may_add_to_them():
    assert utils.DistributedType.MULTI_GPU == "MULTI_GPU"
    assert utils.LoggerType.WANDB == "wandb"
    assert utils.LoggerType("Comet_ML") is utils.LoggerType.COMETML
    assert utils.PrecisionType.list() == ["no", "fp8", "fp16", "bf16"]
    assert utils.RNGType.GENERATOR.value == "generator"
    assert "bf16" in utils.PrecisionType
    assert utils.ComputeEnvironment.LOCAL_MACHINE.name == "LOCAL_MACHINE"
    with pytest.raises(ValueError, match="'bf8' is not a PrecisionType; known are: no, fp8, fp16, bf16"):
        utils.PrecisionType("bf8")
    with pytest.raises(AttributeError, match="RNGType has no member 'TORCHES'"):
        _ = utils.RNGType.TORCHES
