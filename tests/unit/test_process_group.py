"""Collectives over a process group of `torch.distributed`: what the group is initialised with."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torchport.errors import ConfigurationError
from torchport.plugin import CollectivesSpec, ProcessGroupCollectives, Topology

SPEC = CollectivesSpec(name="acmeccl", factory="acme:Collectives")
SECOND = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2)
DEVICE = torch.device("meta", 0)
MINUTE = timedelta(minutes=1)


class Alone(ProcessGroupCollectives):
    """Named as in its descriptor."""


class Beside(ProcessGroupCollectives):
    """Beside a group for the host, connected at once."""

    process_group = "accl"
    host_process_group = "gloo"
    connects_at_once = True


@pytest.mark.parametrize(
    ("kind", "name", "bound"), [(Alone, "acmeccl", None), (Beside, "cpu:gloo,meta:accl", DEVICE)]
)
def test_the_group_is_initialised_with_its_place_store_and_timeout(monkeypatch, kind, name, bound):
    given, store = [], dist.HashStore()
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.append((args, kwargs)))
    kind(SPEC).open(SECOND, DEVICE, MINUTE, store)
    assert given == [
        ((name,), {"store": store, "rank": 1, "world_size": 2, "timeout": MINUTE, "device_id": bound})
    ]


def test_what_registers_the_backend_runs_first_and_closing_before_opening_does_no_harm(monkeypatch):
    order = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: order.append("initialised"))
    monkeypatch.setattr(Alone, "register", lambda self: order.append("registered"))
    collectives = Alone(SPEC)
    collectives.close()
    collectives.open(SECOND, DEVICE, MINUTE, dist.HashStore())
    assert order == ["registered", "initialised"]


def test_a_group_of_the_script_for_other_devices_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigurationError, match="'acmeccl' for tensors of meta"):
            Alone(SPEC).open(Topology(), DEVICE, MINUTE, dist.HashStore())
    finally:
        dist.destroy_process_group()
