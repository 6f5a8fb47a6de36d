"""`torch.compile` through the accelerator: whole models, and regions that repeat."""

import copy
import os
import pickle

import pytest
import torch
from torch import nn
from torchport import Accelerator
from torchport.errors import ConfigurationError
from torchport.state import AcceleratorState
from torchport.utils import (
    DynamoBackend,
    TorchDynamoPlugin,
    compile_regions,
    extract_model_from_parallel,
    has_compiled_regions,
    is_compiled_module,
)

BLOCKS = 4
VARIABLES = ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Counting:
    """A compiler that runs graphs as they are and counts them, with the number of their parameters and inputs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(f"TORCHPORT_DYNAMO_{name}", raising=False)
    AcceleratorState._reset_state()
    torch._dynamo.reset()
    yield
    AcceleratorState._reset_state()
    torch._dynamo.reset()


def inputs() -> torch.Tensor:
    return torch.arange(15.0).reshape(5, 3) / 10


@pytest.fixture
def expected() -> torch.Tensor:
    return Network()(inputs())


def test_a_model_is_compiled_in_one_graph_when_asked_for(expected):
    count = Counting()
    model = Network()
    prepared = Accelerator(dynamo_plugin=TorchDynamoPlugin(backend=count, fullgraph=True)).prepare(model)
    assert count.graphs == []
    assert torch.equal(prepared(inputs()), expected)
    prepared(inputs())
    assert len(count.graphs) == 1
    assert is_compiled_module(prepared)
    assert not has_compiled_regions(prepared)
    assert isinstance(prepared, Network)


def test_regions_compile_one_block_for_all(expected):
    count = Counting()
    plugin = TorchDynamoPlugin(backend=count, use_regional_compilation=True)
    model = Network()
    prepared = Accelerator(dynamo_plugin=plugin).prepare(model)
    assert torch.equal(prepared(inputs()), expected)
    assert len(count.graphs) == 3  # the embedding, one block, the head
    assert has_compiled_regions(prepared)
    assert not is_compiled_module(prepared)
    assert [is_compiled_module(layer) for layer in prepared.layers] == [True] * BLOCKS
    assert list(prepared.state_dict()) == list(Network().state_dict())


def test_compile_regions_leaves_its_model_alone_and_shares_its_parameters(expected):
    count = Counting()
    model = Network()
    regions = compile_regions(model, backend=count)
    assert not is_compiled_module(model)
    assert not has_compiled_regions(model)
    assert torch.equal(model(inputs()), expected)
    assert count.graphs == []
    assert torch.equal(regions(inputs()), expected)
    assert len(count.graphs) == 3
    assert [id(p) for p in regions.parameters()] == [id(p) for p in model.parameters()]
    assert type(regions) is Network
    with torch.no_grad():
        model.head.bias += 1
    assert torch.equal(regions(inputs()), model(inputs()))
    assert not torch.equal(regions(inputs()), expected)


def test_a_model_without_repeating_blocks_is_compiled_as_a_whole():
    count = Counting()
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    regions = compile_regions(model, backend=count, fullgraph=True)
    assert is_compiled_module(regions)
    assert not is_compiled_module(model)
    assert torch.equal(regions(inputs()), model(inputs()))
    assert len(count.graphs) == 1


def test_pytorch_own_blocks_are_compiled_once_for_all():
    count = Counting()
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, BLOCKS, enable_nested_tensor=False)
    regions = compile_regions(model, backend=count, fullgraph=True)
    batch = torch.randn(2, 5, 8, requires_grad=True)  # as the following blocks' inputs do
    torch.testing.assert_close(regions(batch), model(batch))
    assert len(count.graphs) == 1
    for width in range(2, 14):  # more shapes of whole models than PyTorch keeps for one piece of code
        whole = Counting()
        small = compile_regions(nn.Sequential(nn.Linear(1, width)), backend=whole)
        small(torch.ones(1, 1))
        assert len(whole.graphs) == 1


def test_gradients_and_weights_are_those_of_the_model_that_is_not_compiled():
    results = []
    for plugin in (
        None,
        *(TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=r) for r in (0, 1)),
    ):
        AcceleratorState._reset_state()
        accelerator = Accelerator(dynamo_plugin=plugin, gradient_accumulation_steps=2)
        model = Network()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs()).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        results.append(accelerator.get_state_dict(model))
    for state in results[1:]:
        assert list(state) == list(results[0])
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-6, atol=1e-7)


def test_inductor_compiles_under_bf16(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # in this process, without a pool
    monkeypatch.setattr(torch._inductor.config, "cpp_cache_precompile_headers", False)  # for a single kernel
    model = Network()
    plain = Accelerator(mixed_precision="bf16").prepare(Network())(inputs())
    AcceleratorState._reset_state()
    compiled = Accelerator(mixed_precision="bf16", dynamo_backend="INDUCTOR").prepare(model)(inputs())
    assert compiled.dtype == torch.float32
    torch.testing.assert_close(compiled, plain, rtol=0.02, atol=0.02)  # bfloat16 has 8 significant bits


@pytest.mark.parametrize("regions", [False, True])
def test_a_checkpoint_does_not_know_of_compiling(tmp_path, regions):
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=regions)
    accelerator = Accelerator(dynamo_plugin=plugin)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(inputs()).sum())
    optimizer.step()
    accelerator.save_state(tmp_path / "checkpoint")
    AcceleratorState._reset_state()
    accelerator = Accelerator()
    other = Network()
    other, other_optimizer = accelerator.prepare(other, torch.optim.AdamW(other.parameters()))
    accelerator.load_state(tmp_path / "checkpoint")
    assert torch.equal(other(inputs()), model(inputs()))
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(
        other_optimizer.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )


def test_a_model_that_the_script_compiled_keeps_its_names_and_its_compiler(expected):
    count = Counting()
    model = Network()
    prepared = Accelerator().prepare(torch.compile(model, backend=count))
    assert prepared is model
    assert list(prepared.state_dict()) == list(Network().state_dict())
    assert torch.equal(prepared(inputs()), expected)
    assert len(count.graphs) == 1


def test_unwrapping_keeps_or_drops_the_compiler():
    for regions in (False, True):
        AcceleratorState._reset_state()
        plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=regions)
        accelerator = Accelerator(dynamo_plugin=plugin, mixed_precision="bf16")
        model = Network()
        prepared = accelerator.prepare(model)
        for unwrap in (accelerator.unwrap_model, extract_model_from_parallel):
            assert unwrap(prepared) is model
            plain = unwrap(prepared, keep_torch_compile=False)
            assert not is_compiled_module(plain)
            assert not has_compiled_regions(plain)
            assert type(plain) is Network
            assert [id(p) for p in plain.parameters()] == [id(p) for p in model.parameters()]
            assert torch.equal(plain(inputs()), model(inputs()))
        bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False, keep_torch_compile=False)
        assert list(pickle.loads(pickle.dumps(bare)).state_dict()) == list(model.state_dict())
        assert "forward" not in vars(bare)


def test_what_was_compiled_after_it_was_prepared_is_unwrapped_too():
    accelerator = Accelerator()
    model = Network()
    compiled = torch.compile(accelerator.prepare(model), backend="eager")
    assert accelerator.unwrap_model(compiled) is compiled
    assert accelerator.unwrap_model(compiled, keep_torch_compile=False) is model
    assert extract_model_from_parallel(compiled, keep_torch_compile=False) is model


def test_wrappers_inside_the_model_are_taken_off_where_asked_for():
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(nn.DataParallel(inner))
    assert extract_model_from_parallel(outer) is outer
    assert type(outer[0]) is nn.DataParallel
    assert extract_model_from_parallel(outer, recursive=True)[0] is inner


def test_copies_of_a_compiled_model_are_not_compiled():
    model = compile_regions(Network(), backend="eager")
    assert not has_compiled_regions(copy.deepcopy(model))


@pytest.mark.parametrize("prefix", ["TORCHPORT", "ACCELERATE"])
def test_the_environment_says_how_models_are_compiled(monkeypatch, prefix, expected):
    monkeypatch.setenv(f"{prefix}_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setenv(f"{prefix}_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    monkeypatch.setenv(f"{prefix}_DYNAMO_USE_DYNAMIC", "1")
    accelerator = Accelerator()
    prepared = accelerator.prepare(Network())
    assert has_compiled_regions(prepared)
    assert torch.allclose(prepared(inputs()), expected)
    AcceleratorState._reset_state()
    assert not is_compiled_module(Accelerator(dynamo_backend="no").prepare(nn.Linear(1, 1)))
    AcceleratorState._reset_state()
    monkeypatch.setenv(f"{prefix}_DYNAMO_BACKEND", "NO")
    assert not is_compiled_module(Accelerator().prepare(nn.Linear(1, 1)))


def test_the_documented_labels_name_compilers():
    assert DynamoBackend.INDUCTOR == "INDUCTOR"
    assert DynamoBackend("inductor") is DynamoBackend.INDUCTOR
    assert TorchDynamoPlugin(backend=DynamoBackend.AOT_EAGER).backend == "aot_eager"
    plugin = TorchDynamoPlugin(backend="eager", mode="default", fullgraph=True, dynamic=False)
    assert plugin.to_kwargs() == {"backend": "eager", "mode": "default", "fullgraph": True, "dynamic": False}
    assert plugin.to_dict().keys() == {
        "backend", "mode", "fullgraph", "dynamic", "options", "disable", "use_regional_compilation",
    }  # fmt: skip
    assert "TORCHPORT_DYNAMO_BACKEND" not in os.environ


def test_disable_compiles_nothing(expected):
    count = Counting()
    prepared = Accelerator(dynamo_plugin=TorchDynamoPlugin(backend=count, disable=True)).prepare(Network())
    assert torch.equal(prepared(inputs()), expected)
    assert count.graphs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dynamo_backend": "inductr"}, "torch.compile has no backend 'inductr'"),
        ({"dynamo_backend": "inductr"}, "did you mean 'inductor'"),
        ({"dynamo_backend": "eager", "dynamo_plugin": TorchDynamoPlugin()}, "both given"),
        ({"dynamo_plugin": TorchDynamoPlugin(mode="default", options={"a": 1})}, "give one of the two"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Accelerator(**arguments)
