"""Walk nested structures: lists, tuples, named tuples and mappings of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


def is_tensor(value: Any) -> bool:
    """Whether `value` is a tensor."""
    return isinstance(value, torch.Tensor)


def all_tensors(data: Any) -> bool:
    """Whether a structure holds tensors and nothing else, and at least one."""
    if isinstance(data, Mapping):
        return bool(data) and all(all_tensors(item) for item in data.values())
    if isinstance(data, (list, tuple)):
        return bool(data) and all(all_tensors(item) for item in data)
    return is_tensor(data)


def honor_type(like: Any, items: Any) -> Any:
    """Build a list, tuple or named tuple of the type of `like` from `items`."""
    if isinstance(like, tuple) and hasattr(like, "_fields"):
        return type(like)(*items)
    return type(like)(items)


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
        data: A tensor, or lists, tuples, named tuples and mappings of such.
        *args: Passed on.
        test_type: Says which values are leaves.
        error_on_other_type: Whether other values are an error; else they are kept.
        **kwargs: Passed on.

    Raises:
        TypeError: if `error_on_other_type` and a value is neither a leaf nor a container.
    """
    if test_type(data):
        return func(data, *args, **kwargs)
    if isinstance(data, (list, tuple)):
        return honor_type(
            data,
            (
                recursively_apply(
                    func, item, *args, test_type=test_type, error_on_other_type=error_on_other_type, **kwargs
                )
                for item in data
            ),
        )
    if isinstance(data, Mapping):
        applied = {
            key: recursively_apply(
                func, item, *args, test_type=test_type, error_on_other_type=error_on_other_type, **kwargs
            )
            for key, item in data.items()
        }
        return type(data)(applied)  # type: ignore[call-arg]
    if error_on_other_type:
        raise TypeError(
            f"{getattr(func, '__name__', func)} takes tensors and lists, tuples and mappings of tensors;"
            f" found a {type(data).__name__}"
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
    if isinstance(tensor, (list, tuple)):
        return honor_type(tensor, (send_to_device(item, device, non_blocking, skipped) for item in tensor))
    if isinstance(tensor, Mapping):
        if hasattr(tensor, "to"):
            return tensor.to(device)
        return type(tensor)(  # type: ignore[call-arg]
            {
                key: item if key in skipped else send_to_device(item, device, non_blocking, skipped)
                for key, item in tensor.items()
            }
        )
    if hasattr(tensor, "to"):
        try:
            return tensor.to(device, non_blocking=non_blocking)
        except TypeError:  # its `to` takes no `non_blocking`
            return tensor.to(device)
    return tensor


def find_batch_size(data: Any) -> int | None:
    """Return the size of the first dimension of the first tensor, or `None` if there is none."""
    if isinstance(data, torch.Tensor):
        if data.ndim == 0:
            raise ValueError("a tensor without dimensions has no batch size")
        return data.shape[0]
    items = data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else ()
    for item in items:
        size = find_batch_size(item)
        if size is not None:
            return size
    return None


def slice_tensors(data: Any, tensor_slice: slice) -> Any:
    """Slice every tensor along its first dimension."""
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
        return type(first)({key: concatenate([item[key] for item in data], dim) for key in first})  # type: ignore[call-arg]
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            f"concatenate takes tensors, lists, tuples and mappings of them; found a {type(first).__name__}"
        )
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
