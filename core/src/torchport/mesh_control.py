"""Where a process stands in the mesh of a run: the members of `Accelerator` that are about it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from torchport.errors import ConfigurationError
from torchport.plan.decision import Plan
from torchport.plugin.context import RunContext
from torchport.plugin.parallelism import ParallelismConfig
from torchport.plugin.specs import Topology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from torchport.checkpoint.state import Contents


class MeshControl:
    """Places in the mesh; needs `plan`, `topology`, `_contents` and `_context` from the class that mixes it in."""

    _contents: Contents
    _context: RunContext

    @property
    def plan(self) -> Plan:
        """The frozen choices of the run, and why each was made."""
        raise NotImplementedError

    @property
    def topology(self) -> Topology:
        """The place of this process in the job."""
        raise NotImplementedError

    @property
    def parallelism_config(self) -> ParallelismConfig | None:
        """How the processes are divided over a mesh; `None` where nobody asked for more than data parallelism."""
        return self.plan.parallelism

    @property
    def torch_device_mesh(self) -> DeviceMesh | None:
        """The mesh, with a named dimension for each kind of parallelism that is used; `None` without one.

        The first use makes process groups: use it on every process.
        """
        return self._contents.strategy.device_mesh(self._context)

    @property
    def batch_readers(self) -> int:
        """Number of processes that work on the same batch."""
        _, count = self._contents.strategy.data_share(self.topology)
        mesh = self.parallelism_config
        return 1 if mesh is None else self.topology.world_size // count

    @property
    def data_parallel_rank(self) -> int:
        """Which of the different batches of a step this process works on."""
        return self._contents.strategy.data_share(self.topology)[0]

    @property
    def data_parallel_shard_rank(self) -> int:
        """Index of this process in the dimension `dp_shard`."""
        return self._place("dp_shard")

    @property
    def data_parallel_replicate_rank(self) -> int:
        """Index of this process in the dimension `dp_replicate`."""
        return self._place("dp_replicate")

    @property
    def tensor_parallel_rank(self) -> int:
        """Index of this process in the dimension `tp`."""
        return self._place("tp")

    @property
    def context_parallel_rank(self) -> int:
        """Index of this process in the dimension `cp`."""
        return self._place("cp")

    @property
    def sequence_parallel_rank(self) -> int:
        """Index of this process in the dimension `sp`."""
        return self._place("sp")

    def _place(self, dimension: str) -> int:
        mesh = self.parallelism_config
        return 0 if mesh is None else mesh.place(self.topology.rank)[dimension]

    def maybe_context_parallel(
        self,
        buffers: Sequence[torch.Tensor] | None = None,
        buffer_seq_dims: Sequence[int] | None = None,
        no_restore_buffers: Collection[torch.Tensor] | None = None,
    ) -> AbstractContextManager[Any]:
        """Return a context in which this process has its part of sequences, and attention sees all of them.

        Where the plan does not spread sequences (`cp_size` and `sp_size` are 1), it does nothing. Make it anew for
        each step, around the forward at least.

        Args:
            buffers: Tensors with a dimension along sequences: inputs, labels, positions. Inside, each holds this
                process's part.
            buffer_seq_dims: That dimension of each.
            no_restore_buffers: Those that need not be whole again afterwards.

        Raises:
            ConfigurationError: if there are not as many dimensions as buffers, or a sequence cannot be divided.
        """
        mesh = self.parallelism_config
        if mesh is None or not (mesh.cp_enabled or mesh.sp_enabled):
            return nullcontext()
        buffers, dims = list(buffers or ()), list(buffer_seq_dims or ())
        if len(buffers) != len(dims):
            raise ConfigurationError(
                f"maybe_context_parallel: {len(buffers)} buffers and {len(dims)} buffer_seq_dims",
                hint="one dimension for each buffer",
            )
        kept = [] if no_restore_buffers is None else list(no_restore_buffers)
        return self._contents.strategy.context_parallel(self._context, buffers, dims, kept)
