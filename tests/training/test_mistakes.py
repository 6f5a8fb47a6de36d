"""What users get wrong: each is told what was found and what to type."""

import dataclasses
import subprocess
import sys
from collections import OrderedDict, defaultdict
from datetime import timedelta

import pytest
import torch
from torch import nn
from torchport import Accelerator, GradientAccumulationPlugin, InitProcessGroupKwargs, PartialState
from torchport.errors import ConfigurationError, UnavailableError
from torchport.plan.decision import Decision
from torchport.plan.discovery import discover
from torchport.plugin import PrecisionSpec
from torchport.runtime import build
from torchport.state import AcceleratorState
from torchport.utils import concatenate, convert_to_fp32, recursively_apply, send_to_device


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TORCHPORT_PRECISON", "TORCHPORT_PRECISION"),
        ("TORCHPORT_BACKENDS", "TORCHPORT_BACKEND"),
        ("TORCHPORT_TIME_OUT", "TORCHPORT_TIMEOUT"),
        ("TORCHPORT_DYNAMO_BACKED", "TORCHPORT_DYNAMO_BACKEND"),
    ],
)
def test_a_misspelt_variable_is_reported(name, meant):
    warning = f"nothing reads the variable {name}: did you mean {meant}?"
    assert discover({name: "x"}).warnings == [warning]


def test_a_misspelt_variable_is_said_once_in_a_job(monkeypatch, capsys):
    monkeypatch.setenv("TORCHPORT_STRATGY", "ddp")
    for _ in range(2):
        PartialState()
        Accelerator()
        AcceleratorState._reset_state()
    assert capsys.readouterr().err.count("did you mean TORCHPORT_STRATEGY?") == 1
    monkeypatch.delenv("TORCHPORT_STRATGY")


def test_variables_of_plugins_and_of_others_are_left_alone(site):
    site.install(
        "torchport-acme",
        """
        import dataclasses
        from torchport.config.schema import setting
        from torchport.plugin import StrategySpec, hookimpl

        @dataclasses.dataclass
        class Settings:
            backends: str = setting("", help="Backends.", env="TORCHPORT_BACKENDS")

        @hookimpl
        def torchport_strategies():
            yield StrategySpec(name="acme", summary="Acme", factory="torchport_acme:None", config="torchport_acme:Settings")
        """,
    )
    environ = {"TORCHPORT_BACKENDS": "a", "TORCHPORT_ACME_BACKEND_HOME": "/opt", "TORCHPORT_PRECISION": "no"}
    assert discover(environ).warnings == []
    assert len(discover({**environ, "TORCHPORT_BACKENDZ": "a"}).warnings) == 1


@pytest.mark.parametrize(
    "value", [0, -1, float("inf"), float("nan"), "soon", True, timedelta(0), timedelta(days=-1)]
)
def test_a_timeout_that_is_none_is_refused(value):
    with pytest.raises(ConfigurationError, match="must be a time that operations wait") as raised:
        InitProcessGroupKwargs(timeout=value)
    assert repr(value) in str(raised.value)
    assert "datetime.timedelta(minutes=30)" in str(raised.value)


@pytest.mark.plugins
def test_settings_of_the_strategy_that_the_script_chose_are_used_by_each_later_accelerator(monkeypatch):
    monkeypatch.setenv("TORCHPORT_BACKEND", "cpu")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("TORCHPORT_ORIGINS", "FSDP_VERSION=--fsdp-version")
    with pytest.raises(ConfigurationError, match="--fsdp-version: a setting of the strategy 'fsdp'"):
        Accelerator()
    PartialState()  # lays out no model: whoever does may choose the strategy
    assert Accelerator(strategy="fsdp").plan["strategy"].config.fsdp_version == 1
    assert Accelerator().plan.strategy == "fsdp"


def test_a_plugin_that_cannot_be_built_names_the_command_that_finds_out_why():
    spec = PrecisionSpec(name="acme", factory="json:PreciSion")
    with pytest.raises(UnavailableError, match="has no attribute 'PreciSion'") as caught:
        build(Decision(slot="precision", choice=("acme",), source="TORCHPORT_PRECISION", specs=(spec,)))
    assert caught.value.hint == "torchport conformance acme --kind precision --level L0"


@pytest.mark.parametrize("text", ["inf", "0", "-5", "ten", "1e400"])
def test_a_timeout_of_the_environment_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("TORCHPORT_TIMEOUT", text)
    with pytest.raises(ConfigurationError, match="TORCHPORT_TIMEOUT must be a time"):
        PartialState()


def test_a_timeout_is_given_in_seconds_or_as_a_timedelta(monkeypatch):
    assert InitProcessGroupKwargs(timeout=90).timeout == timedelta(seconds=90)
    assert InitProcessGroupKwargs(timeout=timedelta(minutes=2)).timeout == timedelta(minutes=2)
    assert PartialState(timeout=45).runtime.timeout == timedelta(seconds=45)
    AcceleratorState._reset_state()
    monkeypatch.setenv("TORCHPORT_TIMEOUT", "12.5")
    assert PartialState().runtime.timeout == timedelta(seconds=12.5)


@pytest.mark.parametrize("value", [2.5, "4", 0, -1, True])
def test_accumulation_steps_that_are_no_number_of_batches_are_refused(value):
    with pytest.raises(
        ConfigurationError, match="gradient_accumulation_steps must be a whole number of at least 1"
    ):
        Accelerator(gradient_accumulation_steps=value)
    with pytest.raises(ConfigurationError, match=r"num_steps=\.\.\.\) must be a whole number"):
        GradientAccumulationPlugin(num_steps=value)


def test_accumulation_steps_of_the_environment_and_of_the_setter_are_checked_too(monkeypatch):
    monkeypatch.setenv("TORCHPORT_GRADIENT_ACCUMULATION_STEPS", "2.5")
    with pytest.raises(
        ConfigurationError, match="TORCHPORT_GRADIENT_ACCUMULATION_STEPS must be a whole number"
    ):
        Accelerator()
    monkeypatch.setenv("TORCHPORT_GRADIENT_ACCUMULATION_STEPS", "3")
    accelerator = Accelerator()
    assert accelerator.gradient_accumulation_steps == 3
    with pytest.raises(ConfigurationError, match="whole number"):
        accelerator.gradient_accumulation_steps = 1.5
    assert accelerator.gradient_accumulation_steps == 3


def test_preparing_the_same_objects_again_gives_back_what_was_prepared():
    for strategy in ("single", "ddp"):
        AcceleratorState._reset_state()
        accelerator = Accelerator(strategy=strategy)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        first = accelerator.prepare(model, optimizer, scheduler)
        again = accelerator.prepare(scheduler, model, optimizer)
        assert [id(one) for one in again] == [id(one) for one in (first[2], first[0], first[1])]
        assert accelerator.prepare_model(model) is first[0]
        assert accelerator.prepare_optimizer(optimizer) is first[1]
        assert accelerator.prepare_scheduler(scheduler) is first[2]
        assert accelerator.prepare(first[0]) is first[0]
        accelerator.free_memory()
        assert accelerator.prepare(optimizer) is not first[1]


class Output(OrderedDict):
    """A mapping whose values are attributes too, made from keyword arguments alone."""

    def __init__(self, **values) -> None:
        super().__init__(values)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self):
        return _output, (dict(self),)


def _output(values: dict) -> Output:
    return Output(**values)


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    name: str = "kept"


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(2, 2), make

    def forward(self, x):
        return self.make(self.layer(x))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("make", "get"),
    [
        (lambda y: Output(logits=y), lambda out: out.logits),
        (lambda y: Result(y), lambda out: out.logits),
        (lambda y: defaultdict(list, logits=y), lambda out: out["logits"]),
        (lambda y: OrderedDict(logits=y), lambda out: out["logits"]),
        (lambda y: torch.max(y, dim=1), lambda out: out.values),
    ],
    ids=["mapping with attributes", "dataclass", "defaultdict", "OrderedDict", "PyTorch's tuple"],
)
def test_a_model_gives_back_the_types_it_made_in_half_precision(precision, make, get):
    model = Accelerator(mixed_precision=precision).prepare(Returns(make))
    out = model(torch.ones(1, 2))
    assert type(out) is type(make(torch.ones(1, 2)))
    assert get(out).dtype == torch.float32


def test_containers_keep_their_type_and_what_is_attached_to_them():
    counted = recursively_apply(torch.neg, defaultdict(lambda: 7, a=torch.ones(1)))
    assert counted["missing"] == 7
    result = Result(torch.ones(2))
    assert send_to_device(result, "cpu") is result
    doubled = recursively_apply(lambda t: t * 2, result)
    assert (doubled.name, doubled.loss) == ("kept", None)
    assert torch.equal(doubled.logits, torch.full((2,), 2.0))
    assert torch.equal(result.logits, torch.ones(2))
    result = concatenate([Result(torch.ones(2)), Result(torch.zeros(1))], dim=0)
    assert (result.logits.tolist(), result.loss, result.name) == ([1.0, 1.0, 0.0], None, "kept")
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    assert type(send_to_device(packed, "cpu")) is type(packed)
    both = concatenate([Output(a=torch.ones(1)), Output(a=torch.zeros(1))])
    assert type(both) is Output
    assert both.a.tolist() == [1.0, 0.0]
    assert convert_to_fp32(Output(a=torch.ones(1, dtype=torch.float16), b=1)).b == 1


def test_new_plugin_writes_nothing_where_it_cannot_write_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    command = [sys.executable, "-m", "torchport", "new-plugin", "acme", "--kind", "backend", "--output"]
    done = subprocess.run(
        [*command, str(tmp_path / "file" / "acme")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "--output" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    done = subprocess.run(
        [*command, str(tmp_path / "made" / "acme")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "acme" / "pyproject.toml").exists()
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["acme"]
