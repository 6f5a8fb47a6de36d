"""What a checkpoint may hold: tensors and plain values, which are loaded without running code."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from torchport.errors import CheckpointError

_PLAIN = (
    bool, int, float, complex, str, bytes, bytearray, type(None),
    torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device,
)  # fmt: skip


def plain(value: Any, owner: str) -> Any:
    """Return a state with NumPy's scalars as Python's, and its arrays as tensors.

    Args:
        value: The state: dictionaries, lists, tuples and sets of tensors and plain values. What needs no
            conversion is returned as it is.
        owner: Whose state it is, for the error.

    Raises:
        CheckpointError: if something in it could be saved, but not loaded again.
    """
    return _Conversion(owner).of(value, "")


class _Conversion:
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._done: dict[int, tuple[Any, Any]] = {}  # by identity; the value is held, so that it stays unique
        self._loadable: set[type] = set()

    def of(self, value: Any, place: str) -> Any:
        """Convert a value; `place` is how to get to it from the state."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, (np.generic, np.ndarray)):
            return self._from_numpy(value, place)
        if kind not in (dict, OrderedDict, list, tuple, set):
            return self._checked(value, place)
        if id(value) in self._done:
            return self._done[id(value)][1]
        self._done[id(value)] = (value, value)  # a container inside itself ends here
        converted = self._container(value, place)
        self._done[id(value)] = (value, converted)
        return converted

    def _container(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            items = [(self.of(key, place), self.of(held, f"{place}[{key!r}]")) for key, held in value.items()]
            same = all(a is c and b is d for (a, b), (c, d) in zip(items, value.items(), strict=True))
            return value if same else type(value)(items)
        held = list(value)
        converted = [self.of(one, f"{place}[{index}]") for index, one in enumerate(held)]
        same = all(a is b for a, b in zip(converted, held, strict=True))
        return value if same else type(value)(converted)

    def _from_numpy(self, value: np.generic | np.ndarray[Any, Any], place: str) -> Any:
        if isinstance(value, np.ndarray):
            try:
                return torch.from_numpy(np.array(value, order="C"))
            except (TypeError, ValueError):  # objects, texts, foreign byte orders
                raise self._refusal(value, place) from None
        converted = value.item()
        if isinstance(converted, np.generic):  # longdouble has no counterpart
            raise self._refusal(value, place)
        return self.of(converted, place)

    def _checked(self, value: Any, place: str) -> Any:
        """Find out whether something unusual can be loaded again, by doing it."""
        kind = type(value)
        if isinstance(value, torch.Tensor) and kind in self._loadable:
            return value
        try:
            file = io.BytesIO()
            torch.save(value, file)
            file.seek(0)
            torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            raise self._refusal(value, place) from None
        self._loadable.add(kind)
        return value

    def _refusal(self, value: Any, place: str) -> CheckpointError:
        kind = type(value)
        name = (
            kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        )
        where = f"state{place}" if place else "its state"
        of = f" of dtype {value.dtype}" if isinstance(value, np.ndarray) else ""
        return CheckpointError(
            f"the state of {self.owner} could not be loaded again",
            found=f"{where} is a {name}{of}",
            reason="a checkpoint holds tensors and plain values only: nothing in it is run when it is loaded",
            hint="let state_dict() return numbers, texts, tensors, and lists and dictionaries of them",
        )


def reason_of(error: Exception) -> str:
    """Say in one line why a file of tensors and plain values could not be read."""
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code:
        return f"it holds code, which has not been run: {code[1]}"
    if "Weights only load failed" in text:
        return "it is no file of tensors and plain values that torch.save has written"
    return text.splitlines()[0] if text else type(error).__name__
