"""TransformerEngine, against a stub made from its public documentation: no device here runs the library itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchport import Accelerator
from torchport.errors import ConfigurationError
from torchport_fp8 import (
    TERecipeKwargs,
    apply_fp8_autowrap,
    convert_model,
    fp8_autowrap,
    has_transformer_engine_layers,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 32, bias=False), nn.Linear(32, 3))


def kinds(model: nn.Module) -> list[str]:
    return [f"{type(layer).__module__.partition('.')[0]}.{type(layer).__name__}" for layer in model]


def test_layers_are_replaced_over_the_same_parameters_and_back(te):
    model = network()
    before = dict(model.named_parameters())
    assert not has_transformer_engine_layers(model)
    assert convert_model(model) is model
    assert has_transformer_engine_layers(model)
    assert kinds(model) == ["transformer_engine.Linear", "transformer_engine.LayerNorm",
                            "transformer_engine.Linear", "torch.Linear"]  # fmt: skip
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    convert_model(model, to_transformer_engine=False)
    assert kinds(model) == ["torch.Linear", "torch.LayerNorm", "torch.Linear", "torch.Linear"]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(network().state_dict())
    inputs = torch.randn(4, 16)
    assert torch.equal(model(inputs), network()(inputs))


def test_kinds_and_names_of_layers_can_be_left_out(te):
    assert "transformer_engine.Linear" not in kinds(convert_model(network(), _convert_linear=False))
    assert "transformer_engine.LayerNorm" not in kinds(convert_model(network(), _convert_ln=False))
    assert kinds(convert_model(network(), skip_modules=("0",)))[0] == "torch.Linear"


def test_each_setting_reaches_the_recipe(te):
    from torchport_fp8.te import make_recipe
    from transformer_engine.common.recipe import DelayedScaling, Format, MXFP8BlockScaling

    assert make_recipe(TERecipeKwargs()) == DelayedScaling(amax_compute_algo="most_recent")
    settings = TERecipeKwargs(margin=2, fp8_format="e4m3", amax_history_len=16, amax_compute_algo="max")
    assert make_recipe(settings) == DelayedScaling(2, Format.E4M3, 16, "max")
    assert make_recipe(TERecipeKwargs(use_mxfp8_block_scaling=True)) == MXFP8BlockScaling()


@pytest.mark.parametrize(
    ("setting", "value", "kind"),
    [
        ("interval", 4, "DelayedScaling"),
        ("override_linear_precision", (False, False, True), "DelayedScaling"),
        ("margin", 2, "MXFP8BlockScaling"),
    ],
)
def test_a_setting_that_the_installed_release_does_not_have_is_refused(te, setting, value, kind):
    from torchport_fp8.te import make_recipe

    settings = TERecipeKwargs(use_mxfp8_block_scaling=kind.startswith("MX"), **{setting: value})
    with pytest.raises(ConfigurationError, match=setting) as caught:
        make_recipe(settings)
    assert caught.value.reason == f"{kind} of the installed TransformerEngine has no {setting}"


@pytest.mark.parametrize("during_eval", [False, True])
def test_a_run_trains_in_8_bits_and_evaluates_as_asked(te, lab, during_eval):
    lab("fp8")
    settings = TERecipeKwargs(use_autocast_during_eval=during_eval, amax_history_len=16)
    accelerator = Accelerator(backend="lab", mixed_precision="fp8", kwargs_handlers=[settings])
    model = network()
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = weight.detach().clone()
    loss = model(torch.randn(4, 16)).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    assert not torch.equal(weight, before)
    assert [(kind, on, recipe.amax_history_len) for kind, on, recipe in te.CALLS] == [
        ("Linear", True, 16), ("LayerNorm", True, 16), ("Linear", True, 16),
    ]  # fmt: skip
    te.CALLS.clear()
    model.eval()(torch.randn(4, 16))
    assert [on for _, on, _ in te.CALLS] == [during_eval] * 3
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert "forward" not in plain.__dict__
    assert not has_transformer_engine_layers(plain)


def test_the_documented_wrapper_binds_a_model_by_itself(te):
    assert fp8_autowrap is apply_fp8_autowrap
    model = apply_fp8_autowrap(convert_model(network()), TERecipeKwargs())
    model(torch.randn(4, 16))
    assert [on for _, on, _ in te.CALLS] == [True, True, True]


def test_a_release_before_2_8_is_called_by_its_own_names(te, monkeypatch):
    seen = []

    def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
        seen.append((enabled, fp8_recipe.margin))
        return torch.no_grad()

    monkeypatch.delattr(te, "autocast")
    monkeypatch.setattr(te, "fp8_autocast", fp8_autocast, raising=False)
    apply_fp8_autowrap(convert_model(network()), TERecipeKwargs(margin=1))(torch.randn(4, 16))
    assert seen == [(True, 1)]
