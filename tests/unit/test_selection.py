"""The table of decisions: who asks for what, what is installed, and what comes of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from torchport.errors import (
    AmbiguousError,
    ConfigurationError,
    DeniedError,
    DuplicateNameError,
    IncompatibleError,
    PluginError,
    TorchportError,
    UnavailableError,
    UnknownPluginError,
)
from torchport.plan.registry import Entry, Installed, Plugin, PluginFailure
from torchport.plan.selection import (
    SLOTS,
    Request,
    check_names,
    choose_backend,
    choose_launcher,
    plan,
    slot_variable,
)
from torchport.plugin import (
    BackendSpec,
    Capabilities,
    CollectivesSpec,
    LauncherSpec,
    PrecisionSpec,
    Probe,
    QuantizerSpec,
    Requirements,
    StrategySpec,
    Topology,
    TrackerSpec,
    setting,
)

CORE = Plugin("core", "torchport-core", "0.1.0")
HOST = Plugin("host", "torchport-host", "0.1.0")
CHIP = Plugin("chip", "torchport-chip", "1.2.0")
TWO = Topology(world_size=2, local_world_size=2)


@dataclass(frozen=True)
class ShardConfig:
    __torchport_prefix__ = "shard"

    level: int = setting(1, help="How much is sharded.")


@dataclass(frozen=True)
class OtherConfig:
    level: int = 1


def backend(name: str, **fields) -> BackendSpec:
    defaults = {"device_type": name, "factory": "nowhere:Backend", "probe": "nowhere:probe"}
    return BackendSpec(name=name, **{**defaults, "distributed_type": f"MULTI_{name.upper()}", **fields})


def host_specs() -> list:
    return [
        backend("host", priority=0, collectives="hostccl"),
        CollectivesSpec(name="hostccl", factory="nowhere:C", device_types=("host",)),
        CollectivesSpec(name="anyccl", factory="nowhere:C"),
    ]


def core_specs() -> list:
    return [
        PrecisionSpec(name="no", aliases=("fp32",), factory="nowhere:P", default=True),
        PrecisionSpec(name="bf16", factory="nowhere:P", needs=Requirements(autocast=frozenset({"bfloat16"}))),
        PrecisionSpec(name="fp8", factory="nowhere:P", needs=Requirements(features=frozenset({"fp8"}))),
        StrategySpec(name="single", factory="nowhere:S", priority=10, max_processes=1),
        StrategySpec(
            name="replicate",
            factory="nowhere:S",
            priority=10,
            min_processes=2,
            needs=Requirements(distributed=True),
        ),
        StrategySpec(
            name="shard",
            factory="nowhere:S",
            config=f"{__name__}:ShardConfig",
            distributed_type="SHARDED",
            needs=Requirements(distributed=True),
        ),
        LauncherSpec(name="local", factory="nowhere:L", priority=100),
        LauncherSpec(
            name="agent", factory="nowhere:L", priority=50, features=frozenset({"machines", "restarts"})
        ),
        LauncherSpec(name="cluster", factory="nowhere:L", features=frozenset({"machines"})),
        TrackerSpec(name="lines", factory="nowhere:T"),
        TrackerSpec(name="board", factory="nowhere:T"),
        QuantizerSpec(name="int8", factory="nowhere:Q"),
        QuantizerSpec(name="int4", factory="nowhere:Q", needs=Requirements(features=frozenset({"int4"}))),
    ]


def chip_specs() -> list:
    return [
        backend("chip", priority=100, collectives="chipccl"),
        CollectivesSpec(name="chipccl", factory="nowhere:C", device_types=("chip",)),
    ]


def installed(chip: Probe | None = None, capabilities: Capabilities | None = None, **probes) -> Installed:
    """The host's processor, the core's plugins and, if it is given a probe, a chip; all without hardware."""
    made = Installed()
    made.add(Entry(spec, CORE) for spec in core_specs())
    made.add(Entry(spec, HOST) for spec in host_specs())
    if chip is not None:
        made.add(Entry(spec, CHIP) for spec in chip_specs())
    answers = {("backend", "chip"): chip or Probe(available=True)}
    answers |= {tuple(key.split("_", 1)): probe for key, probe in probes.items()}
    for kind in made.entries:
        for spec in made.specs(kind):
            made._probes[kind, spec.name] = answers.get((kind, spec.name), Probe(available=True))
    for spec in made.specs("backend"):
        made._capabilities[spec.name] = capabilities or Capabilities(autocast=frozenset({"bfloat16"}))
    return made


PRESENT = Probe(available=True, count=4)
ABSENT = Probe(available=False, reason="no chip on the bus: is the driver loaded?")


def test_a_factory_that_cannot_be_imported_is_refused_with_the_command_that_finds_out_why():
    made = Installed()
    with pytest.raises(UnavailableError) as caught:
        made.capabilities(backend("chip", factory="json:BackEnd"))
    assert caught.value.found == "factory json:BackEnd"
    assert caught.value.hint == "torchport conformance chip --kind backend --level L0"


# --- automatic -----------------------------------------------------------------------------------------------


def test_one_process_on_a_bare_machine_gets_the_host_and_no_process_group():
    made = plan(Request(), {}, installed(), Topology())
    assert {slot: made[slot].name for slot in SLOTS} == {
        "backend": "host",
        "strategy": "single",
        "precision": "no",
        "collectives": "-",
        "launcher": "-",
        "trackers": "-",
        "quantizer": "-",
    }
    assert made.distributed is False
    assert made.distributed_type == "NO"
    assert made["backend"].source == "automatic: the highest priority that is available"


def test_two_processes_get_replicas_and_the_backends_own_collectives():
    made = plan(Request(), {}, installed(PRESENT), TWO)
    assert (made.backend, made.strategy, made.collectives) == ("chip", "replicate", "chipccl")
    assert made.distributed is True
    assert made.distributed_type == "MULTI_CHIP"
    assert made["collectives"].source == "automatic: the default of backend 'chip'"


def test_the_available_backend_of_the_highest_priority_wins_and_the_loser_is_explained():
    made = plan(Request(), {}, installed(PRESENT), Topology())
    assert made.backend == "chip"
    assert [(r.name, r.reason) for r in made["backend"].rejected] == [("host", "lower priority (0 < 100)")]


def test_several_processes_are_refused_with_the_reason_of_a_backend_that_has_one_process_only():
    there = installed()
    reason = "it has one device, and no collectives carry its tensors"
    there.add([Entry(backend("lone", single_process=reason), CHIP)])
    there._probes["backend", "lone"] = PRESENT
    asked = Request(arguments={"backend": "lone"})
    assert plan(asked, {}, there, Topology()).backend == "lone"
    with pytest.raises(IncompatibleError) as refused:
        plan(asked, {}, there, TWO)
    assert (
        str(refused.value.problem) == "a job of 2 processes on the backend 'lone' (argument backend='lone')"
    )
    assert refused.value.reason == reason
    assert "TORCHPORT_BACKEND" in refused.value.hint


def test_an_unavailable_backend_is_passed_over_with_its_probes_reason():
    made = plan(Request(), {}, installed(ABSENT), Topology())
    assert made.backend == "host"
    assert [(r.name, r.reason) for r in made["backend"].rejected] == [("chip", ABSENT.reason)]


def test_equal_priorities_are_an_error_that_names_the_variable_to_set():
    there = installed(PRESENT)
    there.add([Entry(backend("rival"), Plugin("rival", "torchport-rival", "1"))])
    there._probes["backend", "rival"] = PRESENT
    with pytest.raises(AmbiguousError) as caught:
        plan(Request(), {}, there, Topology())
    assert "'chip' and 'rival' are equally good (priority 100)" in str(caught.value)
    assert "export TORCHPORT_BACKEND=chip" in str(caught.value)


def test_without_any_available_backend_the_error_holds_every_reason():
    there = installed(ABSENT, backend_host=Probe(available=False, reason="no processor"))
    with pytest.raises(UnavailableError) as caught:
        plan(Request(), {}, there, Topology())
    assert f"chip: {ABSENT.reason}; host: no processor" in str(caught.value)


def test_an_automatic_choice_says_which_broken_plugin_it_passed_over():
    there = installed()
    there.failures.append(PluginFailure(Plugin("nova", "torchport-nova", "2.0"), "import failed: boom"))
    made = plan(Request(), {}, there, Topology())
    assert made["backend"].rejected[0].name == "plugin nova"
    assert made["backend"].rejected[0].reason == "could not be registered: import failed: boom"
    assert made.warnings == (
        "backend 'host' was chosen while plugin 'nova' (torchport-nova 2.0) could not be registered:"
        " import failed: boom (see torchport doctor)",
    )
    asked = plan(Request(arguments={"backend": "host"}), {}, there, Topology())
    assert asked.warnings == ()


def test_a_strategy_of_priority_zero_is_never_automatic():
    reasons = {r.name: r.reason for r in plan(Request(), {}, installed(), TWO)["strategy"].rejected}
    assert reasons == {"shard": "taken only when asked for", "single": "not for 2 processes"}


def test_a_strategy_that_the_backend_cannot_run_is_not_taken_automatically():
    with pytest.raises(UnavailableError) as caught:
        plan(Request(), {}, installed(capabilities=Capabilities(distributed=False)), TWO)
    assert "replicate: backend 'host' has no process groups" in str(caught.value)


# --- precedence ----------------------------------------------------------------------------------------------

CHOICES = {
    "backend": ("chip", "host"),
    "strategy": ("shard", "replicate"),
    "precision": ("bf16", "no"),
    "collectives": ("anyccl", "chipccl"),
    "launcher": ("agent", "local"),
    "trackers": ("lines", "board"),
    "quantizer": ("int8", "int4"),
}
SOURCES = ("argument", "environment", "file")


def ask(slot: str, source: str, value: str) -> dict:
    return {
        "argument": {"arguments": {slot: value}},
        "environment": {"environment": {slot_variable(slot): value}},
        "file": {"configured": {slot: value}},
    }[source]


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize(("winner", "loser"), list(itertools.combinations(SOURCES, 2)))
def test_argument_beats_environment_beats_file(slot, winner, loser):
    wins, loses = CHOICES[slot]
    asked = ask(slot, winner, wins) | ask(slot, loser, loses)
    if slot != "backend":
        asked["arguments"] = {"backend": "chip", **asked.get("arguments", {})}
    environment = asked.pop("environment", {})
    able = Capabilities(autocast=frozenset({"bfloat16"}), features=frozenset({"int4"}))
    there = installed(PRESENT, capabilities=able)
    made = plan(Request(**asked, config_file="job.yaml"), environment, there, TWO)
    assert made[slot].choice == (wins,)
    assert (
        made[slot].source
        == {
            "argument": f"argument {slot}={wins!r}",
            "environment": slot_variable(slot),
            "file": f"job.yaml: {slot}",
        }[winner]
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("slot", SLOTS)
def test_whatever_is_asked_for_beats_automatic_choice(slot, source):
    asked = ask(slot, source, CHOICES[slot][0])
    if slot == "backend":
        asked = ask(slot, source, "host")  # automatic choice would take the chip
    expected = "host" if slot == "backend" else CHOICES[slot][0]
    environment = asked.pop("environment", {})
    made = plan(Request(**asked), environment, installed(PRESENT), TWO)
    assert made[slot].choice == (expected,)
    assert made[slot].automatic is False


def test_an_empty_variable_asks_for_nothing():
    made = plan(Request(), {"TORCHPORT_BACKEND": ""}, installed(PRESENT), Topology())
    assert made["backend"].automatic is True


def test_an_argument_that_overrides_a_differing_variable_says_so_with_both_sources():
    request = Request(arguments={"precision": "no"}, asked_by="Accelerator")
    made = plan(request, {"TORCHPORT_PRECISION": "bf16"}, installed(), Topology())
    assert made.overrides == ("Accelerator precision='no' overrides TORCHPORT_PRECISION=bf16",)


def test_an_override_names_the_flag_that_the_launcher_made_the_variable_from():
    environment = {"TORCHPORT_PRECISION": "bf16", "TORCHPORT_ORIGINS": "TORCHPORT_PRECISION=flag --precision"}
    made = plan(Request(arguments={"precision": "no"}), environment, installed(), Topology())
    assert made.overrides == (
        "argument precision='no' overrides flag --precision (TORCHPORT_PRECISION)=bf16",
    )


@pytest.mark.parametrize(
    ("slot", "argument", "variable"),
    [
        ("precision", "fp32", "no"),
        ("precision", "no", "FP32"),
        ("strategy", ShardConfig(), "shard"),
        ("trackers", ["board", "lines"], "lines,board"),
    ],
)
def test_an_argument_that_says_the_same_as_the_variable_overrides_nothing(slot, argument, variable):
    request = Request(arguments={slot: argument})
    made = plan(request, {slot_variable(slot): variable}, installed(), TWO)
    assert made.overrides == ()


# --- asked for, and not to be had ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_asked_for_and_unavailable_is_an_error_with_the_probes_reason_and_never_a_fallback(source):
    asked = ask("backend", source, "chip")
    environment = asked.pop("environment", {})
    with pytest.raises(UnavailableError) as caught:
        plan(Request(**asked), environment, installed(ABSENT), Topology())
    assert caught.value.reason == ABSENT.reason
    assert "the backend 'chip'" in caught.value.problem


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_refuses_what_its_probe_says_is_unavailable(slot):
    name = CHOICES[slot][0]
    kind = "tracker" if slot == "trackers" else slot
    broken = {f"{kind}_{name}": Probe(available=False, reason="the licence has run out")}
    chip = broken.pop("backend_chip", PRESENT)
    with pytest.raises(UnavailableError) as caught:
        plan(Request(arguments={slot: name}), {}, installed(chip, **broken), TWO)
    assert caught.value.reason == "the licence has run out"


def test_an_unknown_name_gets_the_nearest_name_and_the_package_to_install():
    with pytest.raises(UnknownPluginError) as caught:
        plan(Request(), {"TORCHPORT_BACKEND": "chop"}, installed(PRESENT), Topology())
    assert caught.value.problem == (
        "TORCHPORT_BACKEND asks for the backend 'chop', but no installed plugin offers it"
    )
    assert caught.value.found == "chip, host"
    assert caught.value.hint == "did you mean 'chip'? Otherwise: pip install torchport-chop"


def test_an_unknown_name_like_no_other_gets_the_package_to_install():
    with pytest.raises(UnknownPluginError) as caught:
        plan(Request(arguments={"strategy": "zigzag_v2"}), {}, installed(), Topology())
    assert caught.value.hint == "pip install torchport-zigzag-v2"


def test_a_denied_plugin_is_an_error_that_names_the_list():
    there = installed()
    there.denied["chip"] = "it is listed in TORCHPORT_DISABLE_PLUGINS"
    with pytest.raises(DeniedError) as caught:
        plan(Request(arguments={"backend": "chip"}), {}, there, Topology())
    assert caught.value.reason == "it is listed in TORCHPORT_DISABLE_PLUGINS"


def test_a_plugin_that_failed_is_an_error_with_its_reason_and_version():
    there = installed()
    there.failures.append(PluginFailure(Plugin("chip", "torchport-chip", "1.2.0"), "import failed: boom"))
    with pytest.raises(PluginError) as caught:
        plan(Request(arguments={"backend": "chip"}), {}, there, Topology())
    assert caught.value.found == "torchport-chip 1.2.0"
    assert caught.value.reason == "import failed: boom"


def test_an_unknown_name_mentions_plugins_that_failed_or_are_switched_off():
    there = installed()
    there.failures.append(PluginFailure(Plugin("nova", "torchport-nova", "1"), "boom"))
    there.denied["chip"] = "denied"
    with pytest.raises(UnknownPluginError) as caught:
        plan(Request(arguments={"collectives": "novaccl"}), {}, there, TWO)
    assert caught.value.reason == ("could not be registered: nova (see torchport doctor); switched off: chip")


def test_a_name_that_two_distributions_offer_is_an_error_that_names_both():
    there = installed(PRESENT)
    there.add([Entry(backend("chip"), Plugin("chip2", "torchport-chip2", "9"))])
    with pytest.raises(DuplicateNameError) as caught:
        plan(Request(arguments={"backend": "chip"}), {}, there, Topology())
    assert caught.value.found == "torchport-chip 1.2.0 and torchport-chip2 9"
    assert "TORCHPORT_DISABLE_PLUGINS=chip2" in caught.value.hint


def test_neither_of_two_clashing_plugins_is_chosen_automatically():
    there = installed(PRESENT)
    there.add([Entry(backend("chip"), Plugin("chip2", "torchport-chip2", "9"))])
    made = plan(Request(), {}, there, Topology())
    assert made.backend == "host"
    assert made["backend"].rejected[0].reason == "offered by torchport-chip 1.2.0 and by torchport-chip2 9"


def test_an_alias_clashes_with_a_name_whatever_the_order_of_installation():
    specs = [Entry(backend("alpha", aliases=("beta",)), CHIP), Entry(backend("beta"), HOST)]
    for order in (specs, specs[::-1]):
        there = Installed()
        for entry in order:
            there.add([entry])
        assert there.specs("backend") == ()
        for name in ("alpha", "beta"):
            with pytest.raises(DuplicateNameError):
                there.find("backend", name, "the test")


def test_the_cores_own_names_cannot_be_taken_over():
    there = installed()
    there.add([Entry(StrategySpec(name="single", factory="evil:S", priority=999), CHIP)])
    made = plan(Request(), {}, there, Topology())
    assert made["strategy"].spec.factory == "nowhere:S"
    assert there.clashes["strategy", "single"] == (CORE, CHIP)


# --- what does not work together -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slot", "name", "reason"),
    [
        ("strategy", "shard", "the backend has no process groups"),
        ("precision", "bf16", "the backend has no autocast to bfloat16"),
        ("precision", "fp8", "the backend has no fp8"),
        ("quantizer", "int4", "the backend has no int4"),
    ],
)
def test_what_the_device_cannot_do_is_refused_before_any_work(slot, name, reason):
    there = installed(capabilities=Capabilities(distributed=False))
    with pytest.raises(IncompatibleError) as caught:
        plan(Request(arguments={slot: name}), {}, there, Topology())
    assert caught.value.reason == reason
    assert f"argument {slot}={name!r} asks for the {slot} {name!r} on the backend 'host'" in str(caught.value)


def test_collectives_for_another_device_are_refused():
    with pytest.raises(IncompatibleError) as caught:
        plan(
            Request(arguments={"collectives": "chipccl"}),
            {"TORCHPORT_BACKEND": "host"},
            installed(PRESENT),
            TWO,
        )
    assert caught.value.reason == "they carry tensors of chip, not of host"
    assert caught.value.hint == "TORCHPORT_COLLECTIVES=hostccl"


def test_a_backend_without_collectives_cannot_run_several_processes():
    there = Installed()
    there.add(Entry(spec, CORE) for spec in core_specs())
    there.add([Entry(backend("lone"), CHIP)])
    there._probes["backend", "lone"] = PRESENT
    there._capabilities["lone"] = Capabilities()
    with pytest.raises(IncompatibleError, match="the backend names no collectives"):
        plan(Request(), {}, there, TWO)


def test_a_strategy_for_one_process_is_refused_in_a_job_of_two():
    with pytest.raises(IncompatibleError) as caught:
        plan(Request(arguments={"strategy": "single"}), {}, installed(), TWO)
    assert "in a job of 2 processes" in str(caught.value)
    assert caught.value.reason == "it runs on at most 1: every process would train a model of its own"


def test_collectives_that_one_process_does_not_need_are_left_closed_and_said_so():
    made = plan(Request(), {"TORCHPORT_COLLECTIVES": "anyccl"}, installed(), Topology())
    assert made.collectives == "-"
    assert made["collectives"].source == "not needed by one process; TORCHPORT_COLLECTIVES has no effect"


def test_a_strategy_that_always_wants_a_process_group_gets_one_for_one_process():
    made = plan(Request(arguments={"strategy": "shard"}), {}, installed(), Topology())
    assert made.distributed is True
    assert made.collectives == "hostccl"
    assert made.distributed_type == "SHARDED"


# --- settings ------------------------------------------------------------------------------------------------


def test_an_instance_of_a_plugins_settings_fills_the_slot():
    config = ShardConfig(level=3)
    made = plan(Request(arguments={"strategy": config}), {}, installed(), TWO)
    assert made.strategy == "shard"
    assert made["strategy"].config is config


def test_an_object_that_is_nobodys_settings_is_refused():
    with pytest.raises(
        ConfigurationError, match="OtherConfig is neither the name nor the settings of a strategy"
    ):
        plan(Request(arguments={"strategy": OtherConfig()}), {}, installed(), TWO)


def test_settings_come_from_variables_before_the_file_before_defaults():
    def level(environment=None, **fields):
        request = Request(arguments={"strategy": "shard"}, **fields)
        return plan(request, environment or {}, installed(), TWO)["strategy"].config.level

    section = {"shard_config": {"shard_level": 2}}
    assert level() == 1
    assert level(settings=section) == 2
    assert level({"SHARD_LEVEL": "3"}, settings=section) == 3
    assert level({"SHARD_LEVEL": "3"}, settings=section, handlers=(ShardConfig(level=4),)) == 4


def origin(variable: str, origin: str, value: str = "3") -> dict[str, str]:
    """What the launcher exports for a flag or a key of the file."""
    return {variable: value, "TORCHPORT_ORIGINS": f"{variable}={origin}"}


@pytest.mark.parametrize("said", ["--shard-level", "job.yaml: shard_config: shard_level"])
def test_a_setting_of_a_strategy_that_was_not_chosen_is_refused_where_nobody_asked_for_one(said):
    with pytest.raises(ConfigurationError) as caught:
        plan(Request(), origin("SHARD_LEVEL", said), installed(), TWO)
    error = caught.value
    assert error.problem == f"{said}: a setting of the strategy 'shard', which was not chosen"
    assert error.found == "strategy 'replicate' (automatic: fits 2 processes)"
    assert error.hint == "--strategy shard, or leave it out"


def test_a_setting_of_another_strategy_than_the_one_asked_for_is_a_warning():
    environment = origin("SHARD_LEVEL", "job.yaml: shard_config: shard_level")
    made = plan(Request(arguments={"strategy": "replicate"}), environment, installed(), TWO)
    assert made.warnings == (
        "job.yaml: shard_config: shard_level is not used: a setting of the strategy 'shard';"
        " the strategy is 'replicate', asked for by argument strategy='replicate'",
    )


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ({"strategy": "shard"}, origin("SHARD_LEVEL", "--shard-level")),
        ({}, {"SHARD_LEVEL": "3"}),  # set for all jobs of the machine
        ({}, origin("TORCHPORT_PRECISION", "--precision", "no")),
        ({}, origin("PARALLELISM_CONFIG_TP_SIZE", "--parallelism-config-tp-size", "1")),
    ],
)
def test_settings_of_the_chosen_strategy_and_plain_variables_are_neither_refused_nor_mentioned(
    arguments, environment
):
    assert plan(Request(arguments=arguments), environment, installed(), TWO).warnings == ()


def test_whoever_lays_out_no_model_leaves_the_settings_of_strategies_to_the_one_who_does():
    made = plan(Request(lays_out=False), origin("SHARD_LEVEL", "--shard-level"), installed(), TWO)
    assert made.warnings == ()


def test_a_configuration_file_that_no_launcher_has_read_is_mentioned():
    environment = {"TORCHPORT_CONFIG_FILE": "job.yaml"}
    assert plan(Request(), environment, installed(), TWO).warnings == (
        "TORCHPORT_CONFIG_FILE=job.yaml is not read here: start the script with `torchport launch`,"
        " or unset TORCHPORT_CONFIG_FILE",
    )


def test_an_unknown_key_of_a_section_is_an_error_with_the_nearest_one():
    request = Request(
        arguments={"strategy": "shard"}, settings={"shard_config": {"shard_levle": 2}}, config_file="job.yaml"
    )
    with pytest.raises(ConfigurationError) as caught:
        plan(request, {}, installed(), TWO)
    assert "job.yaml: shard_config: unknown key 'shard_levle'" in str(caught.value)
    assert "did you mean 'shard_level'?" in str(caught.value)


# --- trackers and launchers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["lines,board", " lines , board ,", ["lines", "board"]])
def test_several_trackers_fill_one_slot(value):
    made = plan(Request(arguments={"trackers": value}), {}, installed(), Topology())
    assert made["trackers"].choice == ("lines", "board")


def test_one_unknown_tracker_among_several_is_an_error():
    with pytest.raises(UnknownPluginError, match="the tracker 'boards'"):
        plan(Request(arguments={"trackers": "lines,boards"}), {}, installed(), Topology())


@pytest.mark.parametrize(
    ("features", "expected"), [((), "local"), (("restarts",), "agent"), (("machines", "restarts"), "agent")]
)
def test_the_simplest_launcher_that_can_do_what_is_asked_is_taken(features, expected):
    decision = choose_launcher(Request(), {}, installed(), frozenset(features))
    assert decision.choice == (expected,)
    reasons = {r.name: r.reason for r in decision.rejected}
    assert reasons["cluster"] == "taken only when asked for"


def test_a_launcher_that_lacks_a_feature_is_refused_with_those_that_have_it():
    with pytest.raises(IncompatibleError) as caught:
        choose_launcher(Request(), {"TORCHPORT_LAUNCHER": "local"}, installed(), frozenset({"machines"}))
    assert caught.value.reason == "it cannot do: machines"
    assert caught.value.hint == "one of: agent, cluster"


def test_no_launcher_with_a_feature_is_an_error_that_says_what_each_lacks():
    with pytest.raises(UnavailableError) as caught:
        choose_launcher(Request(), {}, installed(), frozenset({"teleport"}))
    assert "agent: cannot do: teleport" in str(caught.value)


# --- the whole -----------------------------------------------------------------------------------------------


def test_a_plugin_can_veto_a_plan():
    there, seen = installed(), []

    def observe(made):
        seen.append(made.backend)
        raise TorchportError("no training on Sundays")

    there.observers.append(observe)
    with pytest.raises(TorchportError, match="no training on Sundays"):
        plan(Request(), {}, there, Topology())
    assert seen == ["host"]


def test_plans_with_equal_choices_and_settings_have_equal_fingerprints():
    def fingerprint(level, rank=0):
        topology = Topology(rank=rank, local_rank=rank, world_size=2, local_world_size=2)
        request = Request(arguments={"strategy": ShardConfig(level=level)})
        return plan(request, {}, installed(), topology).fingerprint()

    assert fingerprint(1) == fingerprint(1, rank=1)
    one, two = fingerprint(1), fingerprint(2)
    assert {slot for slot in one if one[slot] != two[slot]} == {"strategy"}
    assert one["processes"] == "2"


def test_a_plan_is_plain_json_with_the_source_of_each_choice():
    request = Request(arguments={"strategy": ShardConfig(level=2)})
    told = json.loads(json.dumps(plan(request, {}, installed(ABSENT), TWO).to_dict()))
    assert list(told["slots"]) == list(SLOTS)
    assert told["slots"]["strategy"]["settings"] == {"level": 2}
    assert told["slots"]["backend"]["rejected"] == [{"name": "chip", "reason": ABSENT.reason}]
    assert told["topology"]["world_size"] == 2


def test_names_can_be_checked_without_probing_anything():
    there = installed()
    there._probes.clear()
    there._capabilities.clear()
    check_names(Request(arguments={"backend": "host", "trackers": "lines,board"}), {}, there)
    with pytest.raises(UnknownPluginError):
        check_names(Request(), {"TORCHPORT_TRACKERS": "lines,nothing"}, there)
    assert there._probes == {}


def test_the_backend_can_be_chosen_alone():
    assert choose_backend(Request(), {}, installed(PRESENT)).choice == ("chip",)


def test_planning_imports_no_torch():
    code = """
import sys
sys.path.insert(0, {folder!r})
import test_selection as t
assert t.plan(t.Request(), {{}}, t.installed(t.PRESENT), t.TWO).strategy == "replicate"
print("torch" in sys.modules)
"""
    folder = __file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code.format(folder=folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "False"
