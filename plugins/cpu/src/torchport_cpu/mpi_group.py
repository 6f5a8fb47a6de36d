"""A `torch.distributed` process group over MPI: its operations."""

# Signatures follow PyTorch's C++ interface, of which its Python stubs are an outdated picture.
# mypy: disable-error-code="override,assignment,misc"

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
from torchport.errors import UnsupportedOperationError

from torchport_cpu.mpi_base import MpiGroup, Start, Tensors
from torchport_cpu.mpi_types import (
    Reduction,
    as_bytes,
    as_elements,
    as_parts,
    check_size,
    disjoint,
    writer,
)
from torchport_cpu.mpi_work import MpiWork, Part


class MpiProcessGroup(MpiGroup):
    """A process group over an MPI communicator, which DDP, FSDP and DTensor use like any other.

    The methods are those of `torch.distributed.ProcessGroup`; each returns a `Work`. Tensors are dense, on the
    CPU, of any strides. Elements that are only moved may have any dtype; reductions know the integers, booleans,
    16-bit floats (reduced in float32 and rounded once), 32-bit and 64-bit floats and complex numbers.
    """

    # --- one to all, all to one --------------------------------------------------------------------------

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> MpiWork:
        """Overwrite `tensors` by those of rank `opts.rootRank`."""
        root = getattr(opts, "rootRank", 0)

        def start(tensor: torch.Tensor) -> Start:
            def call() -> Part:
                staged = tensor.detach().contiguous()
                request = self.communicator.Ibcast(as_bytes(self.mpi, staged), root)
                return Part(request, (staged,), None if self.rank() == root else writer(tensor, staged))

            return call

        return self._submit("broadcast", [start(t) for t in tensors], tensors, opts)

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> MpiWork:
        """Reduce `tensors` over all ranks into those of rank `opts.rootRank`, and no others."""
        root = getattr(opts, "rootRank", 0)

        def start(tensor: torch.Tensor) -> Start:
            how = self._reduction(opts, tensor)

            def call() -> Part:
                packed = how.pack(tensor)
                described = as_elements(self.mpi, packed, how.datatype)
                if self.rank() != root:
                    return Part(self.communicator.Ireduce(described, None, how.op, root), (packed,))
                request = self.communicator.Ireduce(self.mpi.IN_PLACE, described, how.op, root)
                return Part(request, (packed,), _then(how, packed, writer(tensor, packed)))

            return call

        return self._submit("reduce", [start(t) for t in tensors], tensors, opts)

    def gather(
        self, output: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """Collect the tensors of all ranks, in order, in the list of rank `opts.rootRank`."""
        root = getattr(opts, "rootRank", 0)
        targets = output[0] if self.rank() == root else []
        source = _single("gather", inputs)

        def call() -> Part:
            staged = source.detach().contiguous()
            sent = as_bytes(self.mpi, staged)
            if self.rank() != root:
                return Part(self.communicator.Igatherv(sent, None, root), (staged,))
            self._check_list("gather", targets)
            flat, unpack = _flat(targets, source.dtype)
            received = as_parts(self.mpi, flat, [t.numel() for t in targets])
            return Part(self.communicator.Igatherv(sent, received, root), (staged, flat), unpack)

        return self._submit("gather", [call], targets, opts, inputs=inputs)

    def scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> MpiWork:
        """Overwrite the tensor of each rank by its own from the list of rank `opts.rootRank`."""
        root = getattr(opts, "rootRank", 0)
        target = _single("scatter", outputs)
        sources = inputs[0] if self.rank() == root else []

        def call() -> Part:
            staged = torch.empty_like(target, memory_format=torch.contiguous_format).detach()
            received = as_bytes(self.mpi, staged)
            if self.rank() != root:
                request = self.communicator.Iscatterv(None, received, root)
                return Part(request, (staged,), writer(target, staged))
            self._check_list("scatter", sources)
            flat = _packed(sources)
            sent = as_parts(self.mpi, flat, [t.numel() for t in sources])
            request = self.communicator.Iscatterv(sent, received, root)
            return Part(request, (flat, staged), writer(target, staged))

        return self._submit("scatter", [call], outputs, opts, inputs=sources)

    # --- reductions to all -------------------------------------------------------------------------------

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> MpiWork:
        """Reduce `tensors` over all ranks, in place."""
        return self._all_reduce("all_reduce", tensors, opts)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> MpiWork:
        """Reduce several tensors over all ranks, in place."""
        return self._all_reduce("all_reduce_coalesced", tensors, opts)

    def _all_reduce(self, name: str, tensors: Tensors, opts: Any) -> MpiWork:
        def start(tensor: torch.Tensor) -> Start:
            how = self._reduction(opts, tensor)

            def call() -> Part:
                packed = how.pack(tensor)
                request = self.communicator.Iallreduce(
                    self.mpi.IN_PLACE, as_elements(self.mpi, packed, how.datatype), how.op
                )
                return Part(request, (packed,), _then(how, packed, writer(tensor, packed)))

            return call

        return self._submit(name, [start(t) for t in tensors], tensors, opts)

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> MpiWork:
        """Reduce lists of tensors, one for each rank, and keep this rank's own; sizes may differ by rank."""
        target, sources = _single("reduce_scatter", outputs), inputs[0]
        self._check_list("reduce_scatter", sources)
        counts = [source.numel() for source in sources]
        check_size("reduce_scatter", "elements of the output", target.numel(), counts[self.rank()])
        start = self._reduce_scatter(target, lambda how: how.pack(_packed(sources)), counts, opts)
        return self._submit("reduce_scatter", [start], outputs, opts, inputs=sources)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> MpiWork:
        """Reduce `input` over all ranks and keep this rank's equal part of its first dimension."""
        return self._reduce_scatter_singles("reduce_scatter_single", [output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """Do `reduce_scatter_single` for several pairs of tensors."""
        return self._reduce_scatter_singles("reduce_scatter_single_coalesced", outputs, inputs, opts)

    def _reduce_scatter_singles(self, name: str, outputs: Tensors, inputs: Tensors, opts: Any) -> MpiWork:
        starts = []
        for target, source in _pairs(name, outputs, inputs):
            check_size(name, "elements of the input", source.numel(), target.numel() * self.size())
            pack = _packer(source)
            starts.append(self._reduce_scatter(target, pack, [target.numel()] * self.size(), opts))
        return self._submit(name, starts, outputs, opts, inputs=inputs)

    def _reduce_scatter(
        self, target: torch.Tensor, pack: Callable[[Reduction], torch.Tensor], counts: list[int], opts: Any
    ) -> Start:
        how = self._reduction(opts, target)

        def call() -> Part:
            fits = target.dtype == how.wire and target.is_contiguous()
            received = target.detach() if fits else torch.empty(target.shape, dtype=how.wire)
            sent = disjoint(pack(how), received)
            request = self.communicator.Ireduce_scatter(
                as_elements(self.mpi, sent, how.datatype),
                as_elements(self.mpi, received, how.datatype),
                counts,
                how.op,
            )
            return Part(request, (sent, received), _then(how, received, writer(target, received)))

        return call

    # --- all to all --------------------------------------------------------------------------------------

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """Collect the tensors of all ranks, in order, on every rank; sizes may differ by rank."""
        start = self._all_gather("all_gather", outputs[0], _single("all_gather", inputs))
        return self._submit("all_gather", [start], outputs[0], opts, inputs=inputs)

    def allgather_coalesced(
        self, output_lists: list[list[torch.Tensor]], input_list: list[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """Collect several tensors: `output_lists[rank][i]` becomes that rank's `input_list[i]`."""
        name = "all_gather_coalesced"
        columns = [[row[index] for row in output_lists] for index in range(len(input_list))]
        starts = [self._all_gather(name, c, t) for c, t in zip(columns, input_list, strict=True)]
        outputs = [tensor for row in output_lists for tensor in row]
        return self._submit(name, starts, outputs, opts, inputs=input_list)

    def _all_gather(self, name: str, targets: Tensors, source: torch.Tensor) -> Start:
        self._check_list(name, targets)
        check_size(name, "elements of the input", source.numel(), targets[self.rank()].numel())

        def call() -> Part:
            staged = source.detach().contiguous()
            flat, unpack = _flat(targets, source.dtype)
            received = as_parts(self.mpi, flat, [t.numel() for t in targets])
            request = self.communicator.Iallgatherv(as_bytes(self.mpi, staged), received)
            return Part(request, (staged, flat), unpack)

        return call

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> MpiWork:
        """Concatenate the tensors of all ranks, of equal size, in `output`."""
        return self._all_gather_singles("all_gather_single", [output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """Do `all_gather_single` for several pairs of tensors."""
        return self._all_gather_singles("all_gather_single_coalesced", outputs, inputs, opts)

    def _all_gather_singles(self, name: str, outputs: Tensors, inputs: Tensors, opts: Any) -> MpiWork:
        def start(target: torch.Tensor, source: torch.Tensor) -> Start:
            check_size(name, "elements of the output", target.numel(), source.numel() * self.size())

            def call() -> Part:
                received = _like(target)
                sent = disjoint(source.detach().contiguous(), received)
                request = self.communicator.Iallgather(
                    as_bytes(self.mpi, sent), [*as_bytes(self.mpi, received)[:1], sent.nbytes, self.mpi.BYTE]
                )
                return Part(request, (sent, received), writer(target, received))

            return call

        pairs = _pairs(name, outputs, inputs)
        return self._submit(name, [start(t, s) for t, s in pairs], outputs, opts, inputs=inputs)

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> MpiWork:
        """Send `inputs[i]` to rank `i`, and receive rank `i`'s tensor in `outputs[i]`."""
        self._check_list("all_to_all", outputs)
        self._check_list("all_to_all", inputs)

        def call() -> Part:
            sent = _packed(inputs)
            flat, unpack = _flat(outputs, outputs[0].dtype)
            request = self.communicator.Ialltoallv(
                as_parts(self.mpi, sent, [t.numel() for t in inputs]),
                as_parts(self.mpi, flat, [t.numel() for t in outputs]),
            )
            return Part(request, (sent, flat), unpack)

        return self._submit("all_to_all", [call], outputs, opts, inputs=inputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> MpiWork:
        """Send parts of the first dimension of `input` to the ranks, and receive theirs in `output`.

        Args:
            output: Receives the parts in order of rank.
            input: Is split in order of rank.
            output_split_sizes: Rows to receive from each rank; empty for equal parts.
            input_split_sizes: Rows to send to each rank; empty for equal parts.
            opts: Options of the operation.
        """
        incoming = self._split_counts("output", output, output_split_sizes)
        outgoing = self._split_counts("input", input, input_split_sizes)

        def call() -> Part:
            received = _like(output)
            sent = disjoint(input.detach().contiguous(), received)
            request = self.communicator.Ialltoallv(
                as_parts(self.mpi, sent, outgoing), as_parts(self.mpi, received, incoming)
            )
            return Part(request, (sent, received), writer(output, received))

        return self._submit("all_to_all_single", [call], [output], opts, inputs=[input])

    def barrier(self, opts: Any = None) -> MpiWork:
        """Wait until every process has come here."""
        return self._submit("barrier", [lambda: Part(self.communicator.Ibarrier())], [], opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Refuse: PyTorch offers it on gloo only.

        Raises:
            UnsupportedOperationError: always.
        """
        raise UnsupportedOperationError(
            "MPI collectives have no monitored_barrier",
            hint="torch.distributed.barrier() fails too when a rank does not come within the timeout",
        )

    # --- point to point ----------------------------------------------------------------------------------

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int = 0) -> MpiWork:
        """Send a tensor to rank `dst`."""
        tensor = _single("send", tensors)

        def call() -> Part:
            staged = tensor.detach().contiguous()
            return Part(self.communicator.Isend(as_bytes(self.mpi, staged), dst, tag), (staged,))

        return self._submit(f"send to {dst}", [call], tensors)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int = 0) -> MpiWork:
        """Receive a tensor from rank `src`."""
        return self._receive(f"recv from {src}", tensors, src, tag)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> MpiWork:
        """Receive a tensor from whichever rank sends one; `Work.source_rank` tells which."""
        return self._receive("recv from any rank", tensors, self.mpi.ANY_SOURCE, tag)

    def _receive(self, name: str, tensors: list[torch.Tensor], source: int, tag: int) -> MpiWork:
        tensor = _single("recv", tensors)

        def call() -> Part:
            staged = _like(tensor)
            request = self.communicator.Irecv(as_bytes(self.mpi, staged), source, tag)
            status = self.mpi.Status()
            return Part(request, (staged,), writer(tensor, staged), status, staged.nbytes)

        return self._submit(name, [call], tensors)

    # Names of torch before 2.13, and of its deprecated aliases.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _single(name: str, tensors: Tensors) -> torch.Tensor:
    check_size(name, "tensors of this rank", len(tensors), 1)
    return tensors[0]


def _pairs(name: str, outputs: Tensors, inputs: Tensors) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    check_size(name, "input tensors", len(inputs), len(outputs))
    return zip(outputs, inputs, strict=True)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory to receive into: the tensor's own if it is contiguous."""
    return tensor.detach() if tensor.is_contiguous() else torch.empty(tensor.shape, dtype=tensor.dtype)


def _packer(source: torch.Tensor) -> Callable[[Reduction], torch.Tensor]:
    return lambda how: how.pack(source)


def _packed(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _flat(targets: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Callable[[], None]]:
    """Return memory for all targets, one after the other, and what copies it into them."""
    ends = list(accumulate(target.numel() for target in targets))
    flat = torch.empty(ends[-1], dtype=dtype)
    destinations = [target.detach() for target in targets]

    def unpack() -> None:
        for end, destination in zip(ends, destinations, strict=True):
            destination.copy_(flat[end - destination.numel() : end].view(destination.shape))

    return flat, unpack


def _then(how: Reduction, packed: torch.Tensor, write: Callable[[], None] | None) -> Callable[[], None]:
    """Return what completes a reduction: divide, then round to the tensor's own dtype."""

    def finish() -> None:
        how.finish(packed)
        if write is not None:
            write()

    return finish
