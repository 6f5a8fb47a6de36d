"""Collectives over gloo, each wrong in one way."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchport_cpu.gloo import GlooCollectives

_all_reduce = dist.all_reduce


class SteadyCollectives(GlooCollectives):
    """Right."""

    process_group = "gloo"


class SumIsMax(SteadyCollectives):
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return super().all_reduce(tensor, "max" if op == "sum" else op)


class ProductIsSum(SteadyCollectives):
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return super().all_reduce(tensor, "sum" if op == "product" else op)


class ReducesCopy(SteadyCollectives):
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return super().all_reduce(tensor.clone(), op)


class LosesDtype(SteadyCollectives):
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_gather(tensor.float())


class GatherReorders(SteadyCollectives):
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(super().all_gather(tensor).chunk(self.world_size)[::-1])


class GatherIgnoresStrides(SteadyCollectives):
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().all_gather(tensor.as_strided((tensor.numel(),), (1,)).view(tensor.shape))


class ReducesTheBeginning(SteadyCollectives):
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        if tensor.numel() <= 2**16:
            return super().all_reduce(tensor, op)
        super().all_reduce(tensor.view(-1)[: 2**16], op)
        return tensor


class WrongShare(SteadyCollectives):
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        self.all_reduce(tensor)
        return tensor.chunk(self.world_size)[0].clone()


class BroadcastsFromZero(SteadyCollectives):
    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        return super().broadcast(tensor, 0)


class ScatterShifts(SteadyCollectives):
    def scatter(
        self, tensor: torch.Tensor, parts: list[torch.Tensor] | None = None, source: int = 0
    ) -> torch.Tensor:
        return super().scatter(tensor, parts and [*parts[1:], parts[0]], source)


class OpenBarrier(SteadyCollectives):
    def barrier(self) -> None:
        pass


class SharedReferences(SteadyCollectives):
    def all_gather_object(self, value: Any) -> list[Any]:
        values = super().all_gather_object(value)
        values[dist.get_rank()] = value
        return values


class ObjectsReordered(SteadyCollectives):
    def all_gather_object(self, value: Any) -> list[Any]:
        return sorted(super().all_gather_object(value), key=lambda v: -len(pickle.dumps(v)))


class ObjectsFromZero(SteadyCollectives):
    def broadcast_object_list(self, values: list[Any], source: int = 0) -> list[Any]:
        return super().broadcast_object_list(values, 0)


class AverageIsSum(SteadyCollectives):
    """Registers a process group that takes AVG for SUM."""

    def open(self, *args: Any) -> None:
        super().open(*args)

        def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, *more: Any, **options: Any) -> Any:
            return _all_reduce(tensor, dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op, *more, **options)

        dist.all_reduce = all_reduce

    def close(self) -> None:
        dist.all_reduce = _all_reduce
        super().close()


class TakesAnything(SteadyCollectives):
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return super().all_reduce(tensor, op if op in ("sum", "max", "min", "product") else "sum")


class MiscountedRanks(SteadyCollectives):
    @property
    def world_size(self) -> int:
        return 1


class TimeoutIgnored(SteadyCollectives):
    def open(self, topology: Any, device: torch.device, timeout: timedelta, store: Any) -> None:
        super().open(topology, device, timedelta(hours=1), store)
