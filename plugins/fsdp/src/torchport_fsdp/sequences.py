"""Sequences spread over processes: each has a part of every sequence, and attention sees all of it.

Inside `spread_sequences`, `torch.nn.functional.scaled_dot_product_attention` exchanges keys and values (context
parallelism) or heads (sequence parallelism, Ulysses, arXiv:2309.14509) between the processes that share a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right
from torchport.errors import ConfigurationError, OperationError
from torchport.plugin import ParallelismConfig

from torchport_fsdp.exchanges import all_gather, all_to_all
from torchport_fsdp.ring import ring_attention


class AttentionOptions(NamedTuple):
    """The arguments of `scaled_dot_product_attention` after its three tensors."""

    attn_mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None


class SpreadAttention:
    """Attention over sequences of which each process of a group has a part.

    Attributes:
        calls: How often it was called.
        repeated: Whether it may be called again in a backward, since what it computed has not been kept.
        plain: PyTorch's own attention.

    Args:
        group: The processes.
        balanced: Whether each process has two pieces of a sequence, one from its beginning and one from its end, so
            that under a causal mask all have equally much to do; else one piece, in order.
    """

    def __init__(self, group: ProcessGroup, *, balanced: bool) -> None:
        self.group, self.balanced = group, balanced
        self.size, self.rank = group.size(), group.rank()
        self.calls = 0
        self.repeated = False
        self.plain: Any = getattr(F.scaled_dot_product_attention, "plain", F.scaled_dot_product_attention)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Take the place of `scaled_dot_product_attention`, with its arguments."""
        self.calls += 1
        self.repeated |= _not_kept()
        if not enable_gqa and query.size(-3) != key.size(-3):
            raise OperationError(
                f"attention of {query.size(-3)} heads over {key.size(-3)} key heads", hint="enable_gqa=True"
            )
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        if is_causal and query.size(-2) != key.size(-2):
            raise OperationError(
                "causal attention over sequences of two lengths, where sequences are spread over processes",
                found=f"{query.size(-2)} queries and {key.size(-2)} keys on this process",
            )
        with _installed(self.plain):
            return self.attend(query, key, value, AttentionOptions(attn_mask, dropout_p, is_causal, scale))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Exchange what is needed, and compute this process's part."""
        raise NotImplementedError

    def pieces(self, rank: int) -> tuple[int, ...]:
        """Return which pieces of a sequence a process has, of as many as `pieces` gives for all."""
        return (rank, 2 * self.size - 1 - rank) if self.balanced else (rank,)

    def part(self, buffer: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this process's part of a tensor, in memory of its own."""
        cut = buffer.chunk(self.size * len(self.pieces(0)), dim)
        return torch.cat([cut[index] for index in self.pieces(self.rank)], dim).contiguous()


def _not_kept() -> bool:
    """Whether intermediate results are not kept for a backward, as under activation checkpointing."""
    return (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


class RepeatedAttention:
    """PyTorch's own attention, but that of a block in a backward which computes anew what the block computed.

    It stays after a block in which activations were not kept, since the backward may run outside.
    """

    def __init__(self, attention: SpreadAttention) -> None:
        self.attention, self.plain = attention, attention.plain
        self.__name__ = attention.plain.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend as in the block if a backward is running, and as PyTorch does if not."""
        backward = torch._C._current_graph_task_id() != -1
        return _result((self.attention if backward else self.plain)(*args, **kwargs))


class GatheredAttention(SpreadAttention):
    """Every process gathers all keys and values."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Gather keys and values, put them in order, and attend to those that each piece of queries may see."""
        _refuse_mask(options.attn_mask)
        keys, values = self._in_order(key), self._in_order(value)
        grouped = query.size(-3) != key.size(-3)
        given = {"dropout_p": options.dropout_p, "scale": options.scale, "enable_gqa": grouped}
        if not options.is_causal:
            return _result(self.plain(query, keys, values, **given))
        parts, mine = [], self.pieces(self.rank)
        for index, queries in zip(mine, query.chunk(len(mine), -2), strict=True):
            length = queries.size(-2)
            seen = length * (index + 1)
            mask = causal_lower_right(length, seen)
            parts.append(
                self.plain(queries, keys[..., :seen, :], values[..., :seen, :], attn_mask=mask, **given)
            )
        return torch.cat(parts, -2)

    def _in_order(self, tensor: torch.Tensor) -> torch.Tensor:
        each = len(self.pieces(0))
        gathered = all_gather(tensor, self.group).chunk(self.size)
        cut = [piece for part in gathered for piece in part.squeeze(0).chunk(each, -2)]
        places = itertools.chain.from_iterable(self.pieces(rank) for rank in range(self.size))
        ordered = [piece for _, piece in sorted(zip(places, cut, strict=True), key=lambda pair: pair[0])]
        return torch.cat(ordered, -2)


class RingAttention(SpreadAttention):
    """Keys and values are handed on from process to process."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Attend to one part of keys and values after the other."""
        _refuse_mask(options.attn_mask)
        if options.dropout_p > 0:
            raise OperationError(
                f"dropout_p={options.dropout_p} in attention, with cp_comm_strategy='alltoall'",
                hint="cp_comm_strategy='allgather', or no dropout in attention",
            )
        positions = None
        if options.is_causal:
            length = query.size(-2) // len(self.pieces(0))
            within = torch.arange(length, device=query.device)
            positions = [
                torch.cat([within + index * length for index in self.pieces(rank)])
                for rank in range(self.size)
            ]
        factor = query.size(-1) ** -0.5 if options.scale is None else options.scale
        return ring_attention(query, key, value, self.group, scale=factor, positions=positions)


class HeadAttention(SpreadAttention):
    """Every process attends to whole sequences with its part of the heads (Ulysses)."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Change parts of sequences for parts of heads, attend, and change back."""
        heads, key_heads = query.size(-3), key.size(-3)
        if heads % self.size:
            raise OperationError(
                f"{heads} heads of attention cannot be divided over sp_size={self.size}",
                hint="an sp_size that divides them, or cp_size instead",
            )
        if key_heads % self.size:  # each process needs those of its own heads
            key, value = (x.repeat_interleave(heads // key_heads, -3) for x in (key, value))
        whole = [self._to_heads(x) for x in (query, key, value)]
        length, mask = whole[0].size(-2), options.attn_mask
        if mask is not None:
            if mask.size(-1) != whole[1].size(-2) or mask.size(-2) not in (1, length):
                raise OperationError(
                    f"a mask of attention of the shape {tuple(mask.shape)}, where sequences are spread",
                    found=f"whole sequences of {length}",
                    reason="every process attends to whole sequences",
                    hint="a mask for whole sequences, or is_causal=True without one",
                )
            if mask.ndim > 2 and mask.size(-3) == heads:
                options = options._replace(attn_mask=mask.chunk(self.size, -3)[self.rank])
        attended = self.plain(*whole, **options._asdict(), enable_gqa=whole[0].size(-3) != whole[1].size(-3))
        return self._to_sequence(attended)

    def _to_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Change `(..., heads, part, width)` for `(..., heads / processes, length, width)`."""
        parts = torch.stack(tensor.chunk(self.size, -3))
        return torch.cat(all_to_all(parts, self.group).unbind(), -2)

    def _to_sequence(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = torch.stack(tensor.chunk(self.size, -2))
        return torch.cat(all_to_all(parts, self.group).unbind(), -3)


def _refuse_mask(mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise OperationError(
            "attention with a mask, where sequences are spread by context parallelism",
            reason="keys and values come in another order than the mask's",
            hint="is_causal=True, or no mask; sp_size instead of cp_size takes masks for whole sequences",
        )


def _result(value: Any) -> torch.Tensor:
    result: torch.Tensor = value
    return result


@contextmanager
def _installed(attention: Any) -> Iterator[None]:
    """Let PyTorch's attention be another one in the block."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def recomputing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a forward and of its repetition in a backward, which must attend alike."""
    now = F.scaled_dot_product_attention
    return nullcontext(), _installed(now) if isinstance(now, SpreadAttention) else nullcontext()


@contextmanager
def spread_sequences(
    parallelism: ParallelismConfig,
    mesh: DeviceMesh,
    buffers: Sequence[torch.Tensor],
    dims: Sequence[int],
    no_restore: Collection[torch.Tensor],
) -> Iterator[None]:
    """Let this process have its part of sequences in the block, with attention that sees all of them.

    Args:
        parallelism: The sizes of the mesh.
        mesh: The whole mesh, with a dimension `cp` or `sp`.
        buffers: Tensors with a dimension along sequences, of which this process keeps its part in the block.
        dims: That dimension of each.
        no_restore: Those of them that stay parts afterwards.

    Raises:
        ConfigurationError: if a sequence cannot be divided.
        OperationError: if no attention of the model came here.
    """
    if isinstance(F.scaled_dot_product_attention, SpreadAttention):
        raise OperationError("maybe_context_parallel inside of maybe_context_parallel", hint="enter it once")
    lengths = [buffer.size(dim) for buffer, dim in zip(buffers, dims, strict=True)]
    attention = _attention(parallelism, mesh, lengths)
    kept = {id(buffer) for buffer in no_restore}
    wholes = []
    for buffer, dim in zip(buffers, dims, strict=True):
        part = attention.part(buffer.detach(), dim)
        if id(buffer) not in kept:
            wholes.append((buffer, buffer.data))
        buffer.data = part
    try:
        with _installed(attention):
            yield
    finally:
        for buffer, whole in wholes:
            buffer.data = whole
            torch.autograd.graph.increment_version(buffer)  # a later backward that needs the part is an error
        F.scaled_dot_product_attention = (
            RepeatedAttention(attention) if attention.repeated else attention.plain
        )
    if not attention.calls:
        raise OperationError(
            "the model ran where sequences are spread over processes, and each attended to its own part only",
            found="no call of torch.nn.functional.scaled_dot_product_attention",
            reason="attention that is computed in another way cannot be seen",
            hint="a model that uses it (attn_implementation='sdpa')",
        )


def _attention(parallelism: ParallelismConfig, mesh: DeviceMesh, lengths: list[int]) -> SpreadAttention:
    name = "cp" if parallelism.cp_enabled else "sp"
    size, group = parallelism.sizes[name], mesh.get_group(name)
    uneven = [length for length in lengths if length % size]
    if uneven:
        raise ConfigurationError(
            f"a sequence of {uneven[0]} cannot be divided over {name}_size={size}",
            hint=f"pad sequences to a multiple of {size * 2 if name == 'cp' else size}",
        )
    if name == "sp":
        if not parallelism.sp_seq_length_is_variable and set(lengths) - {parallelism.sp_seq_length}:
            raise ConfigurationError(
                f"sequences of {lengths} with sp_seq_length={parallelism.sp_seq_length}",
                hint="pad them, or sp_seq_length_is_variable=True",
            )
        return HeadAttention(group, balanced=False)
    balanced = bool(lengths) and all(length % (2 * size) == 0 for length in lengths)
    kind = RingAttention if parallelism.cp_comm_strategy == "alltoall" else GatheredAttention
    return kind(group, balanced=balanced)
