"""Walk nested structures of tensors: lists, tuples, named tuples, mappings and dataclasses, each kept as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


def is_tensor(value: Any) -> bool:
    """Whether `value` is a tensor."""
    return isinstance(value, torch.Tensor)


def all_tensors(data: Any) -> bool:
    """Whether a structure holds tensors and nothing else, and at least one."""
    if is_tensor(data):
        return True
    items = list(_items(data))
    return bool(items) and all(all_tensors(item) for item in items)


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """Build a list, tuple or named tuple of the type of `obj` from items."""
    if isinstance(obj, tuple):
        items = tuple(generator)
        return type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
    return type(obj)(generator)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping))


def _items(data: Any) -> Iterable[Any]:
    """Return what a container holds; nothing for what is none."""
    if isinstance(data, Mapping):
        return data.values()
    if isinstance(data, (list, tuple)):
        return data
    if _is_dataclass(data):
        return [getattr(data, field.name) for field in dataclasses.fields(data)]
    return ()


def like_mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Build a mapping of the type of another from items: also what its values are reached by, and its default."""
    if type(like) is dict:
        return items
    if isinstance(like, defaultdict):
        return type(like)(like.default_factory, items)
    if not isinstance(like, MutableMapping):
        return type(like)(items)  # type: ignore[call-arg]
    new = copy.copy(like)  # with attributes, and whatever else its constructor takes
    for key, value in items.items():
        new[key] = value
    return new


def _like_dataclass(like: Any, apply: Callable[[Any], Any]) -> Any:
    """Apply a function to each field of a dataclass; if none changes, return the same object."""
    before = {field.name: getattr(like, field.name) for field in dataclasses.fields(like)}
    after = {name: None if value is None else apply(value) for name, value in before.items()}
    if all(after[name] is before[name] for name in before):
        return like
    new = copy.copy(like)
    for name, value in after.items():
        object.__setattr__(new, name, value)  # frozen ones too
    return new


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Apply a function to every leaf of a nested structure.

    Args:
        func: Called as `func(leaf, *args, **kwargs)`.
        data: A tensor, or lists, tuples, named tuples, mappings and dataclasses of such.
        *args: Passed on.
        test_type: Says which values are leaves.
        error_on_other_type: Whether other values are an error; else they are kept.
        **kwargs: Passed on.

    Raises:
        TypeError: if `error_on_other_type` and a value is neither a leaf nor a container.
    """
    if test_type(data):
        return func(data, *args, **kwargs)

    def inside(item: Any) -> Any:
        return recursively_apply(
            func, item, *args, test_type=test_type, error_on_other_type=error_on_other_type, **kwargs
        )

    if isinstance(data, (list, tuple)):
        return honor_type(data, (inside(item) for item in data))
    if isinstance(data, Mapping):
        return like_mapping(data, {key: inside(item) for key, item in data.items()})
    if _is_dataclass(data):
        return _like_dataclass(data, inside)
    if error_on_other_type:
        raise TypeError(
            f"{getattr(func, '__name__', func)} takes tensors, and lists, tuples, mappings and dataclasses of"
            f" them; found a {type(data).__name__}"
        )
    return data


def send_to_device(
    tensor: Any,
    device: torch.device | str,
    non_blocking: bool = False,
    skip_keys: str | list[str] | None = None,
) -> Any:
    """Move a nested structure to a device.

    Args:
        tensor: The structure; anything in it with a `to` method is moved.
        device: Where to.
        non_blocking: Whether copies from pinned memory may be asynchronous.
        skip_keys: Keys of mappings whose values stay where they are.
    """
    skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys or []
    if isinstance(tensor, torch.Tensor):
        return tensor.to(device, non_blocking=non_blocking)
    if hasattr(tensor, "to"):
        try:
            return tensor.to(device, non_blocking=non_blocking)
        except TypeError:  # its `to` takes no `non_blocking`
            return tensor.to(device)

    def inside(item: Any) -> Any:
        return send_to_device(item, device, non_blocking, skipped)

    if isinstance(tensor, (list, tuple)):
        return honor_type(tensor, (inside(item) for item in tensor))
    if isinstance(tensor, Mapping):
        moved = {key: item if key in skipped else inside(item) for key, item in tensor.items()}
        return like_mapping(tensor, moved)
    return _like_dataclass(tensor, inside) if _is_dataclass(tensor) else tensor


def find_batch_size(data: Any) -> int | None:
    """Return the size of the first dimension of the first tensor, or `None` if there is none."""
    if isinstance(data, torch.Tensor):
        if data.ndim == 0:
            raise ValueError("a tensor without dimensions has no batch size")
        return data.shape[0]
    for item in _items(data):
        size = find_batch_size(item)
        if size is not None:
            return size
    return None


def ignorant_find_batch_size(data: Any) -> int | None:
    """Return what `find_batch_size` does, and `None` where that raises."""
    try:
        return find_batch_size(data)
    except (ValueError, TypeError):
        return None


def merge_dicts(source: Mapping[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    """Write the values of a nested mapping over those of another, level by level.

    Args:
        source: The values that win.
        destination: The mapping to change.

    Returns:
        `destination`.
    """
    for key, value in source.items():
        below = destination.get(key)
        if isinstance(value, Mapping):
            destination[key] = merge_dicts(value, below if isinstance(below, dict) else {})
        else:
            destination[key] = value
    return destination


def slice_tensors(
    data: Any, tensor_slice: slice, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """Slice every tensor along its first dimension.

    Args:
        data: The structure.
        tensor_slice: The slice.
        process_index: Accepted for compatibility: the slice says all.
        num_processes: As `process_index`.
    """
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def concatenate(data: list[Any] | tuple[Any, ...], dim: int = 0) -> Any:
    """Concatenate the tensors of several structures of the same form.

    Args:
        data: The structures.
        dim: The dimension to concatenate along.
    """
    first = data[0]
    if isinstance(first, (list, tuple)):
        return honor_type(first, (concatenate([item[i] for item in data], dim) for i in range(len(first))))
    if isinstance(first, Mapping):
        return like_mapping(first, {key: concatenate([item[key] for item in data], dim) for key in first})
    if _is_dataclass(first):
        columns = zip(*(_items(item) for item in data), strict=True)
        values = (column for column in columns if column[0] is not None)
        joined = iter([concatenate(v, dim) if all_tensors(v[0]) else v[0] for v in values])
        return _like_dataclass(first, lambda _: next(joined))
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"concatenate takes tensors, and containers of them; found a {type(first).__name__}")
    return torch.cat(list(data), dim=dim)


def listify(data: Any) -> Any:
    """Turn every tensor into nested lists of numbers."""

    def to_list(tensor: torch.Tensor) -> Any:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype in _HALF else tensor).tolist()

    return recursively_apply(to_list, data)


def convert_to_fp32(tensor: Any) -> Any:
    """Convert every float16 and bfloat16 tensor to float32."""
    if type(tensor) is torch.Tensor:  # by far the most frequent result of a model
        return tensor.float() if tensor.dtype in _HALF else tensor
    return recursively_apply(
        torch.Tensor.float, tensor, test_type=lambda value: is_tensor(value) and value.dtype in _HALF
    )


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward so that its float16 and bfloat16 results are given back in float32."""
    import functools

    @functools.wraps(model_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(model_forward(*args, **kwargs))

    return forward


def describe(data: Any) -> Any:
    """Return the shape and dtype of every tensor, as text, in the structure of `data`."""
    return recursively_apply(lambda t: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}", data)
