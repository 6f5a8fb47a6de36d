"""Inference in a pipeline: each process holds a part of the model, and the batch flows through them in pieces."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from torchport.errors import ConfigurationError
from torchport.ops import exchange
from torchport.ops.pytree import concatenate, send_to_device, slice_tensors
from torchport.state import PartialState

_CONTAINERS = (nn.ModuleList, nn.Sequential)


class _Inputs:
    """How the inputs of a model are held, by the example: tensors change from call to call, and nothing else.

    Args:
        signature: What the model's forward takes.
        args: Example inputs.
        kwargs: Example inputs by name.
    """

    def __init__(self, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.signature = signature
        leaves, self.structure = tree_flatten(self._bound(args, kwargs))
        self.fixed = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensors among inputs, in the order of the example.

        Raises:
            ConfigurationError: if they do not fit the model's forward, are not held as in the example, or anything
                else differs from it.
        """
        leaves, structure = tree_flatten(self._bound(args, kwargs))
        shown = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        if structure != self.structure or shown != self.fixed:
            raise ConfigurationError(
                "a pipelined model takes what it was traced with: tensors in the same places, all else equal",
                found=f"{_shown(shown, structure)}, where the example had {_shown(self.fixed, self.structure)}",
                hint="prepare_pippy(model, example_args=..., example_kwargs=...) with such inputs",
            )
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def held(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return the arguments of forward, with these tensors."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self.fixed]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs

    def _bound(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigurationError(
                "the inputs do not fit the model's forward", found=str(error), hint=f"forward{self.signature}"
            ) from error
        return bound.args, bound.kwargs


_TENSOR: Any = torch.Tensor
"""Stands for a tensor among inputs."""


def _shown(leaves: list[Any], structure: TreeSpec) -> str:
    args, kwargs = tree_unflatten(["a tensor" if leaf is _TENSOR else leaf for leaf in leaves], structure)
    return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())]) or "nothing"


class PipelinedModel(nn.Module):
    """A model of which this process holds one stage; call it on every process, with the same inputs.

    A batch is cut along its first dimension into rounds of `num_chunks` pieces, each as large as those that the
    model was traced with. What is missing in the last round is filled up with copies of the last sample, and taken
    away from the output again. Gradients are not computed.

    Args:
        schedule: PyTorch's schedule of this process's stage.
        stage: PyTorch's description of the stage that this process runs.
        inputs: How the model's inputs are held.
        output: How the model's output holds its tensors.
        split_points: Names of the modules that begin the second and further stages.
        samples: Samples in one round: those of the pieces together.
        state: The processes of this run.
        gather_output: Whether all processes get the output, or only the last.

    Attributes:
        stage: The part of the model that this process runs.
        split_points: Names of the modules that begin the second and further stages.
    """

    def __init__(
        self,
        schedule: Any,
        stage: Any,
        inputs: _Inputs,
        output: TreeSpec,
        split_points: Sequence[str],
        samples: int,
        state: PartialState,
        gather_output: bool,
    ) -> None:
        super().__init__()
        self.stage = stage.submod
        self.split_points = tuple(split_points)
        self._schedule, self._samples = schedule, samples
        self._inputs, self._output = inputs, output
        # Only the first stage reads inputs, and of these only what any stage needs.
        self._read = [int(node.name.rpartition("_")[2]) for node in stage.node.args] if stage.is_first else []
        self._state, self._gather = state, gather_output

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch through all stages.

        Args:
            *args: As for the model; all tensors have the batch as their first dimension.
            **kwargs: As for the model.

        Returns:
            The model's output on the last process; elsewhere `None`, or with `gather_output` the same output.

        Raises:
            ConfigurationError: if the inputs are not held as in the example, or are of different batch sizes.
        """
        tensors = self._inputs.tensors(args, kwargs)
        batch = _batch_size(tensors, "the inputs of a pipelined model")
        read = [tensors[index] for index in self._read]
        rounds = [self._round(read, start, batch) for start in range(0, batch, self._samples)]
        leaves = None if rounds[0] is None else concatenate(rounds)
        if self._gather:
            leaves = self._from_the_last(leaves)
        return None if leaves is None else tree_unflatten(list(leaves), self._output)

    def _round(self, tensors: list[torch.Tensor], start: int, batch: int) -> Any:
        real = min(self._samples, batch - start)
        filled = _filled([tensor[start : start + real] for tensor in tensors], self._samples)
        output = self._schedule.step(*send_to_device(filled, self._state.device))
        if output is None:
            return None
        leaves = output if isinstance(output, (tuple, list)) else (output,)
        return slice_tensors(tuple(leaves), slice(0, real))

    def _from_the_last(self, leaves: Any) -> Any:
        held = [leaves if leaves is None else send_to_device(leaves, "cpu")]
        exchange.broadcast_object_list(held, from_process=self._state.num_processes - 1)
        return send_to_device(held[0], self._state.device) if leaves is None else leaves


def prepare_pippy(
    model: nn.Module,
    split_points: str | Sequence[str] = "auto",
    no_split_module_classes: Sequence[str] | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    num_chunks: int | None = None,
    gather_output: bool = False,
) -> nn.Module:
    """Spread a model over the processes of this run, as the stages of a pipeline for inference.

    Call it on every process with the same model, which is traced by `torch.export` on the device that it is on
    (keep it on the CPU, and on `eval()`), cut, and of which each process keeps its own stage only. Uses
    `torch.distributed.pipelining` and its GPipe schedule.

    Args:
        model: The model.
        split_points: `"auto"`, which makes the parameters of the largest stage as few as possible, or the names of
            the modules that begin the second and further stages, in order: one fewer than there are processes.
        no_split_module_classes: Names of classes of modules that `"auto"` does not cut.
        example_args: Inputs of the model: a batch of the size of one round of calls, along the first dimension.
        example_kwargs: The same for inputs by name.
        num_chunks: Pieces that a round is cut into, so that stages work at the same time; as many as there are
            processes, if `None`.
        gather_output: Whether the output is sent to all processes; if not, the last one alone has it.

    Returns:
        A `PipelinedModel`; with one process, the model on its device.

    Raises:
        ConfigurationError: if the split points do not fit the model or the number of processes, the example is missing
            or has fewer samples than there are pieces, or the model cannot be traced.
    """
    state = PartialState()
    if state.num_processes == 1:
        return model.to(state.device)
    points = _split_points(model, split_points, no_split_module_classes or (), state.num_processes)
    chunks = state.num_processes if num_chunks is None else num_chunks
    inputs = _Inputs(inspect.signature(model.forward), example_args, example_kwargs or {})
    example = inputs.tensors(example_args, example_kwargs or {})
    batch = _batch_size(example, "example_args and example_kwargs")
    if not 1 <= chunks <= batch:
        raise ConfigurationError(
            "an example batch has at least one sample for each piece of a round",
            found=f"{batch} sample(s) and num_chunks={chunks}",
            hint="prepare_pippy(..., example_args=..., num_chunks=...) with a larger batch or fewer pieces",
        )
    piece = -(-batch // chunks)
    stage, output = _stage(model, points, inputs, [tensor[:piece] for tensor in example], state)
    from torch.distributed.pipelining import ScheduleGPipe

    return PipelinedModel(
        ScheduleGPipe(stage, chunks), stage, inputs, output, points, piece * chunks, state, gather_output
    )


class _Whole(nn.Module):
    """Hands copies of all inputs to a model, and takes its output apart.

    The copies are made in the first stage, which hands them on to the stages that read them: an input of the pipeline
    itself reaches the first stage alone.
    """

    def __init__(self, model: nn.Module, inputs: _Inputs, note: Callable[[TreeSpec], None]) -> None:
        super().__init__()
        self.model, self._inputs = model, inputs
        self._note = note  # a function: torch.export undoes changes of attributes

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Return the leaves of the output; how they were held is noted when this is traced."""
        args, kwargs = self._inputs.held([tensor.clone() for tensor in tensors])
        leaves, structure = tree_flatten(self.model(*args, **kwargs))
        self._note(structure)
        return tuple(leaves)


def _stage(
    model: nn.Module, points: Sequence[str], inputs: _Inputs, example: list[torch.Tensor], state: PartialState
) -> tuple[Any, TreeSpec]:
    """Return this process's stage, and the structure of the model's output."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    home = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    structures: list[TreeSpec] = []
    whole = _Whole(model, inputs, structures.append)
    cuts = {f"model.{name}": SplitPoint.BEGINNING for name in points}
    marked = [(vars(module), dict(vars(module))) for module in map(model.get_submodule, points)]
    try:
        with warnings.catch_warnings():  # about how PyTorch itself copies what it has traced
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)
            pipe = pipeline(whole, tuple(send_to_device(example, home)), split_spec=cuts)
    except Exception as error:
        raise ConfigurationError(
            f"the model {type(model).__name__} cannot be made a pipeline: torch.export does not trace it",
            reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            hint="its forward must not depend on the values of tensors; see torch.distributed.pipelining",
        ) from error
    finally:  # PyTorch marks where it cuts by other `forward`s, and would cut there for ever
        for attributes, before in marked:
            attributes.clear()
            attributes.update(before)
    if pipe.num_stages != state.num_processes:
        raise ConfigurationError(
            f"{state.num_processes} processes need as many stages",
            found=f"{pipe.num_stages}, cut at {', '.join(points)}",
            hint="choose split points that the model's forward reaches in this order",
        )
    return pipe.build_stage(state.process_index, state.device), structures[-1]


def _split_points(
    model: nn.Module, asked: str | Sequence[str], whole: Sequence[str], stages: int
) -> list[str]:
    if isinstance(asked, str):
        if asked != "auto":
            raise ConfigurationError(
                "split_points are 'auto' or a list of names of modules",
                found=repr(asked),
                hint=f"[{asked!r}]",
            )
        return _balanced(model, set(whole), stages)
    names = dict(model.named_modules())
    if unknown := [name for name in asked if name not in names]:
        raise ConfigurationError(
            f"the model {type(model).__name__} has no module named {', '.join(unknown)}",
            hint="names are those of model.named_modules()",
        )
    if len(asked) != stages - 1:
        raise ConfigurationError(
            f"{stages} processes need {stages - 1} split point(s)",
            found=f"{len(asked)}: {', '.join(asked)}",
            hint=f"launch {len(asked) + 1} processes, or use split_points='auto'",
        )
    return list(asked)


def _balanced(model: nn.Module, whole: set[str], stages: int) -> list[str]:
    """Cut the model's modules, in their order, so that the largest stage is as small as it can be."""
    share = sum(parameter.nbytes for parameter in model.parameters()) // stages
    blocks = list(_blocks(model, "", whole, share))
    if len(blocks) < stages:
        raise ConfigurationError(
            f"the model {type(model).__name__} cannot be cut for {stages} processes",
            found=f"{len(blocks)} part(s): {', '.join(name for name, _ in blocks)}",
            hint="launch fewer processes, or take classes out of no_split_module_classes",
        )
    sizes = [size for _, size in blocks]
    # best[n][m]: the largest stage, and where the last begins, for the first n blocks in m stages
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * stages]
    for end in range(1, len(sizes) + 1):
        row: list[tuple[float, int]] = [(float("inf"), 0)]
        for number in range(1, stages + 1):
            row.append(
                min(
                    (max(best[start][number - 1][0], sum(sizes[start:end])), start)
                    for start in range(number - 1, end)
                    if number > 1 or start == 0
                )
                if end >= number
                else (float("inf"), 0)
            )
        best.append(row)
    points: list[str] = []
    end = len(sizes)
    for number in range(stages, 1, -1):
        end = best[end][number][1]
        points.insert(0, blocks[end][0])
    return points


def _blocks(module: nn.Module, prefix: str, whole: set[str], share: int) -> Iterator[tuple[str, int]]:
    """Name the parts between which a model may be cut, with the bytes of their parameters.

    Containers are gone into, and what is larger than a stage's fair share.
    """
    for name, child in module.named_children():
        size = sum(parameter.nbytes for parameter in child.parameters())
        divisible = isinstance(child, _CONTAINERS) or (size > share and any(True for _ in child.children()))
        if divisible and type(child).__name__ not in whole:
            yield from _blocks(child, f"{prefix}{name}.", whole, share)
        else:
            yield f"{prefix}{name}", size


def _batch_size(tensors: list[torch.Tensor], what: str) -> int:
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ConfigurationError(
            f"{what} are tensors with the batch as their first dimension",
            found=f"batch sizes {sorted(sizes)}" if sizes else "no tensor",
            hint="prepare_pippy(model, example_args=(inputs,))",
        )
    return int(sizes.pop())


def _filled(tensors: list[torch.Tensor], samples: int) -> list[torch.Tensor]:
    """Repeat the last sample until there are as many as asked for."""
    return [
        torch.cat([tensor, tensor[-1:].expand(samples - tensor.shape[0], *tensor.shape[1:])])
        if tensor.shape[0] < samples
        else tensor
        for tensor in tensors
    ]
