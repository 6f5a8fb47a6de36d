"""Finding installed plugins: each in isolation, with the reason of every failure."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import pytest
from torchport.errors import PluginError, TorchportError
from torchport.plan.discovery import discover
from torchport.plan.doctor import examine
from torchport.plan.selection import Request, plan
from torchport.plugin import Topology

GOOD = """
    from torchport.plugin import TrackerSpec, hookimpl

    @hookimpl
    def torchport_trackers():
        yield TrackerSpec(name="{name}", factory="torchport_{name}:Tracker", summary="good")
"""


def good(name: str) -> str:
    return GOOD.format(name=name)


def found(site, **environ):
    """Discover only what the test installed, beside the core's own plugins."""
    points = [p for p in entry_points(group="torchport") if p.module in site.modules]
    return discover(environ, entry_points=points)


def failure(site, **environ):
    """Return the one plugin that failed; the good one beside it must be registered."""
    site.install("torchport-fine", good("fine"))
    installed = found(site, **environ)
    assert [plugin.name for plugin in installed.plugins] == ["core", "fine"]
    assert len(installed.failures) == 1
    return installed.failures[0]


def test_a_plugin_is_registered_with_its_distribution_and_version(site):
    site.install("torchport-fine", good("fine"), version="2.3")
    installed = found(site)
    entry = installed.find("tracker", "fine", "the test")
    assert str(entry.plugin) == "torchport-fine 2.3"
    assert entry.spec.summary == "good"
    assert installed.failures == []


def test_the_cores_own_plugins_are_always_there():
    installed = discover({"TORCHPORT_PLUGINS": ""})
    assert [plugin.name for plugin in installed.plugins] == ["core"]
    assert [spec.name for spec in installed.specs("precision")] == ["bf16", "fp16", "no"]
    assert [spec.name for spec in installed.specs("strategy")] == ["ddp", "single"]


# --- faults ----------------------------------------------------------------------------------------------------


def test_an_import_error_is_kept_with_its_traceback(site):
    site.install("torchport-bad", "import a_vendor_that_is_not_there")
    fault = failure(site)
    assert str(fault.plugin) == "torchport-bad 1.0"
    assert fault.reason == (
        "import failed: ModuleNotFoundError: No module named 'a_vendor_that_is_not_there'"
    )
    assert "torchport_bad.py" in fault.traceback


def test_a_plugin_that_exits_at_import_does_not_end_the_program(site):
    site.install("torchport-bad", "raise SystemExit(3)")
    assert failure(site).reason == "import failed: SystemExit: 3"


def test_an_exception_in_a_hook_takes_the_plugin_out_whole(site):
    site.install(
        "torchport-bad",
        good("bad")
        + """
    @hookimpl
    def torchport_launchers():
        raise RuntimeError("the driver said no")
""",
    )
    assert failure(site).reason == "RuntimeError: the driver said no"
    assert "bad" not in found(site).entries["tracker"]


def test_a_misspelt_hook_gets_the_nearest_name(site):
    site.install(
        "torchport-bad",
        """
    from torchport.plugin import hookimpl

    @hookimpl
    def torchport_backend():
        return []
""",
    )
    reason = failure(site).reason
    assert "there is no hook 'torchport_backend'" in reason
    assert "did you mean 'torchport_backends'?" in reason


def test_a_hook_without_its_mark_is_pointed_out(site):
    site.install("torchport-bad", "def torchport_backends():\n    return []\n")
    reason = failure(site).reason
    assert "torchport_backends is not marked as a hook implementation" in reason
    assert "put @hookimpl above its definition" in reason


def test_a_hook_with_an_argument_that_does_not_exist_is_refused(site):
    site.install(
        "torchport-bad",
        """
    from torchport.plugin import hookimpl

    @hookimpl
    def torchport_backends(device):
        return []
""",
    )
    assert "'device'" in failure(site).reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('yield TrackerSpec(name="Bad Name", factory="m:F")', "'Bad Name' is not a plugin name"),
        ('yield TrackerSpec(name="bad", factory="no colon")', "factory must be of the form 'module:Name'"),
        ('yield TrackerSpec(name="bad", factory="m:F", runtime="x>=1")', "runtime must be a tuple"),
        ('yield TrackerSpec(name="bad", factory="m:F", api=99)', "was written for hook API 99"),
        ('yield "bad"', "torchport_trackers must give TrackerSpec objects"),
        ("return 7", "torchport_trackers must return an iterable"),
        (
            'yield from [TrackerSpec(name="bad", factory="m:F")] * 2',
            "the plugin offers the tracker 'bad' twice",
        ),
    ],
)
def test_an_invalid_descriptor_is_refused_with_what_is_wrong(site, body, reason):
    site.install(
        "torchport-bad",
        f"""
    from torchport.plugin import TrackerSpec, hookimpl

    @hookimpl
    def torchport_trackers():
        {body}
""",
    )
    assert reason in failure(site).reason


def test_a_plugin_for_another_core_is_not_even_imported(site):
    site.install("torchport-bad", "raise AssertionError('imported')", requires=("torchport_core>=7",))
    reason = failure(site).reason
    assert reason.startswith("it needs torchport_core>=7, found torchport_core 0.1.0")
    assert "torchport_bad" not in sys.modules


def test_a_distribution_whose_name_starts_like_the_cores_is_not_mistaken_for_it(site):
    site.install("torchport-fine", good("fine"), requires=("torchport-core-extras>=7",))
    assert found(site).failures == []


def test_broken_metadata_is_a_failure_of_that_plugin_alone(site):
    site.install("torchport-bad", good("bad"), requires=("torchport-core >>> 1",))
    assert "its metadata is not valid" in failure(site).reason


# --- the vendor's runtime ----------------------------------------------------------------------------------------


def test_an_unmet_runtime_is_the_reason_of_the_probe_and_nothing_is_imported_for_it(site):
    site.install(
        "torchport-chip",
        """
    from torchport.plugin import BackendSpec, hookimpl

    @hookimpl
    def torchport_backends():
        yield BackendSpec(
            name="chip", device_type="chip", factory="never_imported:B", probe="never_imported:p",
            runtime=("chip-runtime>=2.4", "pluggy>=999"),
        )
""",
    )
    installed = found(site)
    probe = installed.probe(installed.specs("backend")[0])
    assert probe.available is False
    assert probe.reason.startswith(
        "needs chip-runtime>=2.4, which is not installed: pip install 'chip-runtime>=2.4'; needs pluggy>=999, found"
    )
    assert installed.faulty_probes == set()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise OSError('no bus')", "its probe torchport_chip:probe raised OSError: no bus"),
        ("return True", "its probe torchport_chip:probe returned True instead of a Probe"),
        ("return Probe(available=False)", "its probe torchport_chip:probe gave no reason"),
        ("raise SystemExit(1)", "its probe torchport_chip:probe raised SystemExit: 1"),
    ],
)
def test_a_probe_that_breaks_its_promise_is_unavailable_and_reported(site, body, reason):
    site.install(
        "torchport-chip",
        f"""
    from torchport.plugin import BackendSpec, Probe, hookimpl

    @hookimpl
    def torchport_backends():
        yield BackendSpec(
            name="chip", device_type="chip", factory="torchport_chip:B", probe="torchport_chip:probe"
        )

    def probe():
        {body}
""",
    )
    installed = found(site)
    assert installed.probe(installed.specs("backend")[0]).reason == reason
    warnings = [f.message for f in examine(installed).findings if f.level == "warning"]
    assert warnings == [reason]


# --- lists -------------------------------------------------------------------------------------------------------


def test_a_denied_plugin_is_not_imported(site):
    site.install("torchport-bad", "raise AssertionError('imported')")
    installed = found(site, TORCHPORT_DISABLE_PLUGINS="bad")
    assert installed.failures == []
    assert installed.denied == {"bad": "it is listed in TORCHPORT_DISABLE_PLUGINS"}


def test_an_allow_list_keeps_all_others_out(site):
    site.install("torchport-one", good("one"))
    site.install("torchport-two", good("two"))
    installed = found(site, TORCHPORT_PLUGINS="one")
    assert [plugin.name for plugin in installed.plugins] == ["core", "one"]
    assert installed.denied == {"two": "it is not listed in TORCHPORT_PLUGINS"}


def test_the_deny_list_is_stronger_than_the_allow_list(site):
    site.install("torchport-one", good("one"))
    installed = found(site, TORCHPORT_PLUGINS="one", TORCHPORT_DISABLE_PLUGINS="torchport_one")
    assert installed.denied == {"one": "it is listed in TORCHPORT_DISABLE_PLUGINS"}


@pytest.mark.parametrize("variable", ["TORCHPORT_PLUGINS", "TORCHPORT_DISABLE_PLUGINS"])
def test_a_listed_plugin_that_is_not_installed_is_warned_about(site, variable):
    site.install("torchport-one", good("one"))
    installed = found(site, **{variable: "one,ghost"})
    assert installed.warnings == [
        f"{variable} names 'ghost', but no such plugin is installed (installed: one)"
    ]


# --- names offered twice, and observers ------------------------------------------------------------------------


def test_a_duplicate_name_names_both_distributions(site):
    site.install("torchport-one", good("one"))
    site.install("torchport-two", good("one"), version="2.0")
    installed = found(site)
    assert [str(p) for p in installed.clashes["tracker", "one"]] == ["torchport-one 1.0", "torchport-two 2.0"]
    findings = [f.message for f in examine(installed).findings if f.level == "error"]
    assert "offered by torchport-one 1.0 and by torchport-two 2.0; none of them is used" in findings


OBSERVER = """
    from torchport.errors import TorchportError
    from torchport.plugin import Finding, hookimpl

    seen = []

    @hookimpl
    def torchport_plan_resolved(plan):
        seen.append(plan.backend)
        {action}

    @hookimpl
    def torchport_findings():
        yield Finding(level="info", subject="{name}", message="seen by {name}")
"""
HOST = """
    from torchport.plugin import BackendSpec, hookimpl, Probe

    @hookimpl
    def torchport_backends():
        yield BackendSpec(name="host", device_type="h", factory="m:F", probe="torchport_host:probe", priority=0)

    def probe():
        return Probe(available=True)
"""


def observed(site, action: str):
    site.install("torchport-a", OBSERVER.format(name="a", action=action))
    site.install("torchport-b", OBSERVER.format(name="b", action="pass"))
    site.install("torchport-host", HOST)
    return found(site)


def test_each_observer_is_shown_the_plan_once(site):
    installed = observed(site, "pass")
    plan(Request(), {}, installed, Topology())
    assert sys.modules["torchport_a"].seen == ["host"]
    assert sys.modules["torchport_b"].seen == ["host"]


def test_each_plugins_findings_are_reported_once(site):
    messages = [finding.message for finding in examine(observed(site, "pass")).findings]
    assert messages == ["seen by a", "seen by b"]


def test_what_observers_return_is_told_to_the_operator_once(site):
    installed = observed(site, 'yield "mind the gap"')
    assert plan(Request(), {}, installed, Topology()).warnings[-1] == "mind the gap"
    assert plan(Request(), {}, installed, Topology()).warnings.count("mind the gap") == 1


def test_an_observer_that_returns_no_texts_is_named(site):
    with pytest.raises(PluginError, match=r"failed when it was shown the plan") as caught:
        plan(Request(), {}, observed(site, "return [3]"), Topology())
    assert "must return texts, not 3" in caught.value.reason


def test_a_veto_reaches_the_user_as_it_is(site):
    installed = observed(site, 'raise TorchportError("not on this cluster")')
    with pytest.raises(TorchportError, match="not on this cluster"):
        plan(Request(), {}, installed, Topology())


def test_an_observer_that_fails_is_named(site):
    installed = observed(site, "raise KeyError('oops')")
    with pytest.raises(PluginError) as caught:
        plan(Request(), {}, installed, Topology())
    assert "plugin 'a' (torchport-a 1.0) failed when it was shown the plan" in str(caught.value)
    assert "TORCHPORT_DISABLE_PLUGINS=a" in caught.value.hint


def test_findings_that_raise_become_a_finding(site):
    site.install(
        "torchport-bad",
        """
    from torchport.plugin import hookimpl

    @hookimpl
    def torchport_findings():
        raise ValueError("confused")
""",
    )
    site.install("torchport-host", HOST)
    findings = examine(found(site)).findings
    assert [(f.level, f.subject, f.message) for f in findings] == [
        ("error", "bad", "its findings raised ValueError: confused")
    ]
