"""A backend and a strategy that the core has never heard of, from wheels, beside wheels of the core."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.multiprocess]
ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "fixtures" / "thirdparty"


def train(environment, name: str, *flags: str, **variables: str) -> dict:
    result = environment.folder / f"{name}.json"
    script = str(SOURCES / "train.py")
    environment.run("torchport", "launch", "--num-processes", "2", *flags, script, str(result), **variables)
    return json.loads(result.read_text())


def test_third_parties_train_to_the_losses_of_the_core(environment, build):
    wheels = build(SOURCES / "torchport-quokka", SOURCES / "torchport-wombat")
    environment.pip("install", "--no-index", *map(str, wheels))  # their requirement of the core is met

    origin = environment.run("python", "-c", "import torchport; print(torchport.__file__)").stdout
    assert str(environment.folder) in origin
    listing = json.loads(environment.run("torchport", "plugins", "--json").stdout)
    assert {
        (item["kind"], item["name"], item["version"])
        for item in listing["plugins"]
        if item["distribution"] in ("torchport-quokka", "torchport-wombat")
    } == {
        ("backend", "quokka", "3.1.4"),
        ("collectives", "quokkaccl", "3.1.4"),
        ("strategy", "wombat", "2.7.1"),
    }
    assert listing["failures"] == listing["clashes"] == []

    chosen = {"TORCHPORT_BACKEND": "quokka", "TORCHPORT_STRATEGY": "wombat"}
    ours = train(environment, "ours", "--wombat-bucket-numel", "20", **chosen)
    core = train(environment, "core", TORCHPORT_BACKEND="cpu", TORCHPORT_STRATEGY="ddp")

    def slots(outcome: dict) -> dict:
        return {slot: item["choice"] for slot, item in outcome["plan"]["slots"].items() if item["choice"]}

    assert slots(ours) == {
        "backend": ["quokka"],
        "strategy": ["wombat"],
        "precision": ["no"],
        "collectives": ["quokkaccl"],
    }
    assert slots(core)["collectives"] == ["gloo"]
    assert ours["plan"]["slots"]["strategy"]["settings"] == {"bucket_numel": 20}
    assert (ours["distributed_type"], core["distributed_type"]) == ("WOMBAT", "MULTI_CPU")
    assert ours["processes"] == core["processes"] == 2
    assert ours["replicas_agree"] is core["replicas_agree"] is True
    assert len(core["losses"]) == 32
    assert sum(core["losses"][-8:]) < sum(core["losses"][:8]) / 2
    assert ours["losses"] == pytest.approx(core["losses"], rel=1e-6)


def test_the_core_names_neither():
    named = [
        str(path)
        for path in (ROOT / "core" / "src").rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and any(name in path.read_text(encoding="utf-8").lower() for name in ("quokka", "wombat"))
    ]
    assert named == []
