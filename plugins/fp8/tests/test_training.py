"""Training in FP8 by torchao gives the losses of torchao by hand, in one process and in two."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from jobs import run_job
from torch import nn
from torchport import Accelerator
from torchport_fp8 import AORecipeKwargs, convert_model_to_fp8_ao, filter_linear_layers, has_ao_layers

WORKER = Path(__file__).parent / "workers" / "parity.py"

spec = importlib.util.spec_from_file_location("fp8_parity", WORKER)
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)
CASES = list(parity.CASES)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return [parity.results(tmp_path_factory.mktemp("one"))]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, prefork):
    command = [prefork / "torchport", "launch", "--num-processes", "2"]
    job = run_job(command, WORKER, tmp_path_factory.mktemp("two"), environ={"PYTHONWARNINGS": "default"})
    assert "emulated" not in job.output  # it was asked for
    assert "Failed to load" not in job.output
    return job.ranks


@pytest.mark.parametrize("case", CASES)
def test_one_process_gives_the_losses_of_torchao_by_hand(one_process, case):
    (result,) = one_process
    assert (result["processes"], result["precision"]) == (1, "fp8")
    assert result[case]["torchport"] == pytest.approx(result[case]["hand"], rel=1e-6)
    assert len(set(result[case]["torchport"])) == 16


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_losses_of_torchao_by_hand(two_processes, case):
    assert [result["processes"] for result in two_processes] == [2, 2]
    for result in two_processes:
        assert result[case]["torchport"] == pytest.approx(result[case]["hand"], rel=1e-6)
    assert two_processes[0][case]["torchport"] != two_processes[1][case]["torchport"]


@pytest.mark.multiprocess
def test_fsdp_gathers_weights_in_8_bits_with_the_losses_of_torchao_by_hand(two_processes):
    for result in two_processes:
        runs, hand = result["sharded"], result["sharded"]["hand"]
        assert runs[""]["losses"] == pytest.approx(hand, rel=1e-6)
        assert runs["precomputed"]["losses"] == pytest.approx(hand, rel=1e-6)
        assert (runs[""]["scale"], runs["precomputed"]["scale"]) == (False, True)
        for run in (runs[""], runs["precomputed"]):
            assert run["kind"] == "WeightWithDynamicFloat8CastTensor"
    for run in (two_processes[0]["sharded"][""], two_processes[0]["sharded"]["precomputed"]):
        assert run["kinds"] == ["Tensor"]  # the whole state, which the main process has
        assert run["names"] == list(parity.network().state_dict())
    first, second = (result["sharded"]["hand"] for result in two_processes)
    assert first != second


@pytest.mark.multiprocess
def test_a_checkpoint_continues_as_if_nothing_had_happened(one_process, two_processes):
    for result in (*one_process, *two_processes):
        assert result["resume"]["resumed"] == result["resume"]["uninterrupted"]


def test_the_recipes_differ_from_each_other(one_process):
    series = [tuple(one_process[0][case]["torchport"]) for case in CASES if "accumulate" not in case]
    assert len(set(series)) == len(series)


# --- conversion ----------------------------------------------------------------------------------------------


def test_parameters_stay_the_same_objects_under_the_same_names():
    model = parity.network()
    before = dict(model.named_parameters())
    buffers = list(model.state_dict())
    converted = convert_model_to_fp8_ao(model)
    assert has_ao_layers(converted)
    assert all(parameter is before[name] for name, parameter in converted.named_parameters())
    assert list(converted.state_dict()) == buffers


def test_weights_to_be_gathered_in_8_bits_stay_the_same_objects_also_where_layers_share_one():
    from torchao.float8 import Float8LinearConfig

    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    model[2].weight = model[1].weight
    before, values = list(model.parameters()), model[1].weight.detach().clone()
    convert_model_to_fp8_ao(model, Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=True))
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
    assert model[2].weight is model[1].weight
    assert type(model[1].weight).__name__ == "WeightWithDynamicFloat8CastTensor"
    assert torch.equal(model[1].weight._tensor, values)


def test_a_layer_keeps_its_hooks_mode_and_attributes():
    model, calls = parity.network().eval(), []
    model[2].register_forward_hook(lambda *_: calls.append("hook"))
    model[2].tag = "mine"
    convert_model_to_fp8_ao(model, parity_config())
    model(torch.randn(16, 16))
    assert has_ao_layers(model[2])
    assert (calls, model[2].tag, model[2].training) == (["hook"], "mine", False)


def parity_config():
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig(emulate=True)


def converted(model: nn.Module, **settings) -> set[str]:
    convert_model_to_fp8_ao(model, parity_config(), **settings)
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


def test_the_first_and_the_last_layer_and_odd_sizes_are_left_as_they_are():
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in [(16, 16), (16, 24), (24, 16), (16, 32), (32, 16)]))
    assert converted(copy.deepcopy(model)) == {"3"}
    assert converted(copy.deepcopy(model), skip_first_last=False) == {"0", "3", "4"}


def test_layers_are_left_out_by_patterns_of_their_names():
    def block():
        return nn.ModuleDict({"up": nn.Linear(16, 16), "gate": nn.Linear(16, 16)})

    model = nn.ModuleDict({"a": block(), "b": block(), "lm_head": nn.Linear(16, 16)})
    left_out = ("gate", "lm_*")
    assert converted(model, skip_first_last=False, skip_modules=left_out) == {"a.up", "b.up"}


def test_a_filter_of_the_users_decides_alone():
    assert converted(parity.network(), module_filter_func=lambda module, name: name == "0") == {"0"}


def test_layers_with_a_forward_of_their_own_are_left_as_they_are():
    class Adapted(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) + 1

    assert filter_linear_layers(nn.Linear(16, 16), "x")
    assert not filter_linear_layers(Adapted(16, 16), "x")
    assert not filter_linear_layers(nn.Conv1d(16, 16, 1), "x")
    assert not filter_linear_layers(nn.Linear(16, 16), "x", "x", "y")


def test_converting_twice_converts_once():
    model = convert_model_to_fp8_ao(parity.network(), parity_config())
    layer = model[2]
    assert convert_model_to_fp8_ao(model, parity_config())[2] is layer


def test_unwrapping_gives_ordinary_layers_over_the_same_parameters_back():
    accelerator = Accelerator(precision=AORecipeKwargs(emulate=True))
    model = parity.network()
    layer, weight = model[2], model[2].weight
    prepared = accelerator.prepare(model)
    assert has_ao_layers(accelerator.unwrap_model(prepared))
    assert prepared(torch.randn(4, 16)).dtype is torch.float32
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert type(plain[2]) is type(layer) is nn.Linear
    assert plain[2].weight is weight
    restored = pickle.loads(pickle.dumps(plain))
    assert torch.equal(restored(torch.ones(2, 16)), parity.network()(torch.ones(2, 16)))


def test_evaluation_and_training_compute_with_the_same_layers():
    accelerator = Accelerator(precision=AORecipeKwargs(emulate=True))
    model = accelerator.prepare(parity.network())
    inputs = torch.randn(16, 16)
    with torch.no_grad():
        assert torch.equal(model.train()(inputs), model.eval()(inputs))


def test_a_model_without_a_layer_to_convert_is_announced_once(capsys):
    accelerator = Accelerator(precision=AORecipeKwargs(emulate=True))
    accelerator.prepare(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    assert capsys.readouterr().err.count("converts no layer of Sequential") == 1
