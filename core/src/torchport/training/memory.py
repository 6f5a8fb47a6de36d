"""Give memory back, and find a batch size that fits into it."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

from torchport.errors import BatchSizeError
from torchport.runtime import Runtime

_MESSAGES = ("out of memory", "defaultcpuallocator", "can't allocate memory", "cannot allocate memory")
"""What allocators write into a plain `RuntimeError` or `OSError`, lower-case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device, or of the host, was not enough."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, (RuntimeError, OSError)):
        return False
    text = str(error).lower()
    return any(message in text for message in _MESSAGES)


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Return cached, unused memory to the device.

    Args:
        garbage_collection: Whether to collect garbage before it.
    """
    if garbage_collection:
        gc.collect()
    if Runtime.current is not None:
        Runtime.current.backend.empty_cache()
        return
    empty_cache = getattr(torch.get_device_module(), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Collect garbage, and return cached memory to the device.

    With `a, b = release_memory(a, b)` the caller drops its own references too.

    Args:
        *objects: The references to drop.

    Returns:
        As many times `None`.
    """
    count = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * count


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[..., int] | None = None,
) -> Any:
    """Decorate a function to be called again with a smaller batch size when memory runs out.

    The function takes the batch size as its first argument, and is called without it. What occupies memory
    (models, optimizers, loaders) must be made inside it, after `accelerator.free_memory()`, so that the next
    attempt finds the memory free. Each call begins with `starting_batch_size`.

    Every process decides for itself: with several, a batch size must fit on all of them or on none.

    Args:
        function: The function.
        starting_batch_size: The batch size of the first attempt.
        reduce_batch_size_fn: Returns the next batch size, given the one that did not fit (or given nothing, if it
            takes no argument). By default, half of it.

    Returns:
        The decorated function; without `function`, a decorator.

    Raises:
        BatchSizeError: when called, if no batch size is left to try.
        TypeError: when called with arguments that do not fit the function.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    smaller = _reduction(reduce_batch_size_fn)
    name = getattr(function, "__name__", "the function")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(function, name, args, kwargs)
        batch_size, last = starting_batch_size, ""
        release_memory()
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                last = f"with batch size {batch_size}: {str(error).strip() or type(error).__name__}"
            release_memory()  # out here, where the error no longer holds the frames and their tensors
            following = smaller(batch_size)
            if following >= batch_size:
                raise BatchSizeError(
                    f"reduce_batch_size_fn must return less than {batch_size}", found=repr(following)
                )
            batch_size = following
        raise BatchSizeError(
            f"no batch size for {name} fits into memory",
            found=f"tried from {starting_batch_size} down to zero; the last attempt failed {last}"
            if last
            else f"starting_batch_size={starting_batch_size}",
            hint="a smaller model, gradient checkpointing or half precision",
        )

    return run


def _reduction(function: Callable[..., int] | None) -> Callable[[int], int]:
    if function is None:
        return lambda batch_size: batch_size // 2
    if inspect.signature(function).parameters:
        return function
    return lambda batch_size: function()


def _check_arguments(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a call that gives the batch size itself, or that fits the function otherwise not."""
    signature = inspect.signature(function)
    try:
        signature.bind(0, *args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(repr(a)[:40] for a in args), *(f"{k}={v!r:.40}" for k, v in kwargs.items())])
        raise TypeError(
            f"{name}({given}) does not fit {name}{signature}, whose first argument is given by"
            f" find_executable_batch_size: {error}; leave the batch size out of the call"
        ) from None
