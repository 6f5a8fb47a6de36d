"""What the plan's objects know of the run they take part in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchport.plugin.parallelism import ParallelismConfig
from torchport.plugin.specs import Topology

if TYPE_CHECKING:
    from torchport.plugin.backend import Backend
    from torchport.plugin.collectives import Collectives
    from torchport.plugin.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The objects built from the plan, as strategies and precisions see them.

    Attributes:
        device: The device of this process.
        topology: The place of this process in the job.
        backend: The backend object.
        collectives: The open process group; `None` where the plan needs none.
        precision: The precision object.
        accumulation_steps: Micro-batches per optimizer step.
        handlers: Keyword-argument handlers given to `Accelerator(kwargs_handlers=...)`.
        parallelism: How the processes are divided over a mesh; `None` where all are data parallel.
    """

    device: torch.device
    topology: Topology
    backend: Backend
    collectives: Collectives | None
    precision: Precision
    accumulation_steps: int = 1
    handlers: tuple[Any, ...] = ()
    parallelism: ParallelismConfig | None = None
