"""Flags, keys, variables and the checks of a plan."""

from __future__ import annotations

import importlib.util

import pytest
import torchport_fp8
from torchport import utils
from torchport.config import schema
from torchport.config.launch import LaunchConfig
from torchport.config.layers import Resolved
from torchport.config.plugins import apply_settings, plugin_settings
from torchport.errors import ConfigurationError, TorchportError
from torchport.plan.discovery import discover
from torchport.plan.selection import Request, plan
from torchport.plugin import Topology
from torchport_fp8 import (
    AORecipeKwargs,
    FP8Engine,
    FP8RecipeKwargs,
    MSAMPRecipeKwargs,
    TERecipeKwargs,
)

DOCUMENTED = (
    "backend", "use_autocast_during_eval", "margin", "interval", "format", "amax_history_len",
    "amax_compute_algo", "override_linear_precision", "opt_level",
)  # fmt: skip
"""The flags of the reference's command line page, without `--fp8_`."""


def planned(*handlers, precision="fp8", environ=None, **arguments):
    request = Request(
        arguments={"precision": precision, **arguments}, asked_by="Accelerator", handlers=handlers
    )
    return plan(request, environ or {}, discover({}), Topology())


def test_each_documented_flag_has_its_variable():
    flags = {item.flag: item.env for item in schema.settings_of(FP8RecipeKwargs)}
    for name in DOCUMENTED:
        assert flags[f"fp8-{name.replace('_', '-')}"] == f"FP8_{name.upper()}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (  # the reference's template and its guide
            {"backend": "TE", "amax_history_len": 1024, "fp8_format": "E4M3", "interval": 1, "margin": 0,
             "override_linear_precision": [False, False, False], "use_autocast_during_eval": False},
            {"FP8_BACKEND": "TE", "FP8_FORMAT": "E4M3", "FP8_OVERRIDE_LINEAR_PRECISION": "False,False,False"},
        ),
        (
            {"amax_compute_algo": "max", "backend": "te", "override_linear_precision": "(false, false, true)"},
            {"FP8_AMAX_COMPUTE_ALGO": "max", "FP8_BACKEND": "TE", "FP8_OVERRIDE_LINEAR_PRECISION": "False,False,True"},
        ),
        ({"backend": "MS-AMP", "opt_level": "O2"}, {"FP8_BACKEND": "MSAMP", "FP8_OPT_LEVEL": "O2"}),
        ({"backend": "AO", "skip_modules": ["lm_head", "gate"]}, {"FP8_SKIP_MODULES": "lm_head,gate"}),
    ],
)  # fmt: skip
def test_documented_sections_of_files_become_variables_that_are_read_back(content, expected):
    resolved = Resolved(LaunchConfig(), {}, {}, sections={"fp8_config": content})
    environ = apply_settings(resolved, {}, plugin_settings(discover({}))[0]).environ
    assert expected.items() <= environ.items()
    settings = FP8RecipeKwargs(**schema.from_environment(FP8RecipeKwargs, environ))
    assert settings.backend is FP8Engine(content["backend"])


def test_engines_have_the_spellings_that_are_documented():
    for engine, spellings in {
        FP8Engine.AO: ("AO", "ao", "torchao"),
        FP8Engine.TE: ("TE", "te", "transformer-engine"),
        FP8Engine.MSAMP: ("MSAMP", "msamp", "MS-AMP"),
    }.items():
        for spelling in spellings:
            assert FP8RecipeKwargs(backend=spelling).backend is engine
    assert (TERecipeKwargs().backend, AORecipeKwargs().backend, MSAMPRecipeKwargs().backend) == (
        FP8Engine.TE, FP8Engine.AO, FP8Engine.MSAMP,
    )  # fmt: skip
    assert FP8RecipeKwargs(backend="msamp", optimization_level="O1").opt_level == "O1"


def test_without_an_engine_the_installed_one_is_taken_unless_the_settings_are_of_another():
    assert FP8RecipeKwargs().backend is FP8Engine.AO
    assert FP8RecipeKwargs(margin=1).backend is FP8Engine.TE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "AO", "margin": 1}, "margin is a setting of the engine TE"),
        ({"backend": "TE", "opt_level": "O1"}, "opt_level is a setting of the engine MSAMP"),
        ({"margin": 1, "recipe": "rowwise"}, "is a setting of the engine"),
        ({"backend": "XY"}, "backend must be one of AO, TE, MSAMP"),
        ({"recipe": "columnwise"}, "recipe must be one of tensorwise, rowwise, rowwise_with_gw_hp"),
        ({"fp8_format": "E3M4"}, "fp8_format must be one of HYBRID, E4M3"),
        ({"recipe": "rowwise", "enable_fsdp_float8_all_gather": True}, "with the recipe 'rowwise'"),
        ({"precompute_float8_dynamic_scale_for_fsdp": True}, "without enable_fsdp_float8_all_gather"),
        ({"config": object(), "pad_inner_dim": True}, "config and pad_inner_dim are both given"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        FP8RecipeKwargs(**settings)


def test_torchao_is_configured_as_the_settings_say():
    from torchao.float8 import Float8LinearConfig
    from torchport_fp8.ao import linear_config

    assert linear_config(AORecipeKwargs(), False) == Float8LinearConfig()
    given = AORecipeKwargs(pad_inner_dim=True, enable_fsdp_float8_all_gather=True)
    expected = Float8LinearConfig(emulate=True, pad_inner_dim=True, enable_fsdp_float8_all_gather=True)
    assert linear_config(given, True) == expected
    own = Float8LinearConfig(enable_fsdp_float8_all_gather=True, round_scales_to_power_of_2=True)
    assert linear_config(AORecipeKwargs(config=own), False) == own
    rowwise = linear_config(AORecipeKwargs(recipe="rowwise"), False)
    assert rowwise == Float8LinearConfig.from_recipe_name("rowwise")


def test_a_device_without_fp8_emulates_it_and_the_plan_says_so(lab):
    (sentence,) = planned().warnings
    assert sentence.startswith("precision 'fp8' is emulated, as the backend 'cpu' has no FP8")
    assert planned(AORecipeKwargs(emulate=True)).warnings == ()
    lab("fp8")
    assert planned(backend="lab").warnings == ()


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (MSAMPRecipeKwargs(), "MS-AMP is no longer maintained"),
        (TERecipeKwargs(), "pip install --no-build-isolation 'torchport-fp8[te]'"),
        (AORecipeKwargs(emulate=False), "the backend 'cpu' has no FP8"),
        (AORecipeKwargs(enable_fsdp_float8_all_gather=True), "only FSDP2 gathers weights in 8 bits"),
    ],
)
def test_what_cannot_be_done_here_is_refused_before_anything_is_built(handler, expected):
    with pytest.raises(TorchportError) as caught:
        planned(handler)
    assert "asks for the precision 'fp8'" in str(caught.value)
    assert expected in str(caught.value)


def test_transformer_engine_needs_a_device_with_the_format(te, lab):
    lab("fp8")
    assert planned(TERecipeKwargs(), backend="lab").precision == "fp8"
    for handler, backend, lacking in [
        (TERecipeKwargs(), "cpu", "FP8, and the backend 'cpu' has none"),
        (TERecipeKwargs(use_mxfp8_block_scaling=True), "lab", "MXFP8, and the backend 'lab' has none"),
    ]:
        with pytest.raises(TorchportError, match=lacking):
            planned(handler, backend=backend)


def test_without_any_engine_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TorchportError, match="neither torchao nor TransformerEngine") as caught:
        planned()
    assert "pip install 'torchport-fp8[torchao]'" in caught.value.hint


def test_the_environment_chooses_the_recipe():
    made = planned(precision=None, environ={"TORCHPORT_PRECISION": "fp8", "FP8_RECIPE": "rowwise"})
    assert made["precision"].config.recipe == "rowwise"


def test_every_public_name_can_be_imported():
    assert [name for name in torchport_fp8.__all__ if not hasattr(torchport_fp8, name)] == []


def test_the_documented_names_are_those_of_the_utilities():
    for name in torchport_fp8.__all__:
        if name not in ("FP8Engine", "fp8_autowrap"):
            assert getattr(utils, name) is getattr(torchport_fp8, name)
