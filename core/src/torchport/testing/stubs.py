"""Stubs of vendors' modules, for testing a backend on a machine without its device.

A stub is written from the vendor's public documentation, and says from which pages. It keeps the state of a device
(current index, memory figures, random numbers, streams) on the host and records every call, so that a test can tell
which of the vendor's functions a backend called with what. It proves that a backend keeps to the documentation, and
nothing about the device.

```python
from torchport.testing.stubs import Call, StubDevice, StubModule, installed

device = StubDevice("acme", documentation=("https://acme.example/torch.acme.html",), count=2)
core = StubModule("acme_runtime.core", documentation=("https://acme.example/core.html",), mark_step=None)

with installed(device, core, distributions={"acme-torch": "2.4.0"}):
    backend.device(1)
assert device.calls == [Call("set_device", (1,))]
```
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

from torchport.errors import ConfigurationError
from torchport.testing import installing

GIBIBYTE = 2**30


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function of a stub.

    Attributes:
        name: Name of the function, or of a method after its class (`"Stream.wait_stream"`).
        args: Its positional arguments, without the object of a method.
        kwargs: Its keyword arguments.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class StubModule(types.ModuleType):
    """A module of a vendor, described by its documentation.

    Args:
        name: Dotted name by which it is imported.
        documentation: The pages from which it was made.
        **members: What the module holds. A function is called, and its calls are recorded; `None` stands for a
            function that returns nothing; any other value is held as it is.

    Attributes:
        documentation: The pages from which it was made.
        members: What the documentation says that the module holds, by name.
        absent: Names that the module must not hold while it is installed, in place of one that is there already.
        calls: Every call of its functions, in order.

    Raises:
        ConfigurationError: if no page is given.
    """

    def __init__(self, name: str, *, documentation: tuple[str, ...], **members: Any) -> None:
        super().__init__(name)
        if not documentation:
            raise ConfigurationError(f"the stub of {name} says nowhere what it was made from")
        self.documentation = documentation
        self.calls: list[Call] = []
        self.members: dict[str, Any] = {}
        self.absent: frozenset[str] = frozenset()
        for member, value in members.items():
            self._hold(member, value)

    def add(self, name: str, value: Any = None) -> None:
        """Add a member: a function to record (`None`: one that returns nothing), or any other value."""
        self._hold(name, value)

    def _hold(self, name: str, value: Any) -> None:
        plain = isinstance(value, type) or not (value is None or callable(value))
        member = value if plain else self._recorded(name, value)
        self.members[name] = member
        setattr(self, name, member)

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        """Return the positional arguments of each call of one function, in order."""
        return [call.args for call in self.calls if call.name == name]

    def _recorded(self, name: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(Call(name, args, kwargs))
            return None if function is None else function(*args, **kwargs)

        record.__name__ = record.__qualname__ = name
        return record


class StubDevice(StubModule):
    """A vendor's device module (`torch.<device_type>`): the functions that PyTorch asks of one, over the host.

    Calls are recorded, except for those that only ask (`is_available`, `device_count`, `is_initialized`,
    `current_device`). Memory is a figure: `occupy` changes it.

    Args:
        device_type: Type of its `torch.device`.
        documentation: The pages from which it was made.
        count: Number of devices.
        memory: Bytes of memory of each.
        without: Functions that this vendor, or this release, does not have.
        **members: Further members, or others in place of the usual ones; see `StubModule`.

    Attributes:
        device_type: Type of its `torch.device`.
        count: Number of devices.
        memory: Bytes of memory of each.
        initialized: Whether a function has been called that initialises the runtime: anything beyond asking for
            the number of devices. A probe must leave it `False`.
        current: Index of the current device.
    """

    def __init__(
        self,
        device_type: str,
        *,
        documentation: tuple[str, ...],
        count: int = 1,
        memory: int = 16 * GIBIBYTE,
        without: Iterable[str] = (),
        **members: Any,
    ) -> None:
        self.device_type, self.count, self.memory = device_type, count, memory
        self.initialized, self.current = False, 0
        self._allocated: dict[int, int] = {}
        self._peak: dict[int, int] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._streams: dict[int, Any] = {}
        super().__init__(f"torch.{device_type}", documentation=documentation)
        for name, function in self._questions().items():
            self.members[name] = function
            setattr(self, name, function)
        for name, function in self._functions().items():
            self._hold(name, function)
        for name, value in self._classes().items():
            self._hold(name, value)
        for name, value in members.items():
            self._hold(name, value)
        self.absent = frozenset(without)
        for name in self.absent:
            self.members.pop(name, None)
            vars(self).pop(name, None)

    # --- what tests do with it ---------------------------------------------------------------------------

    def occupy(self, size: int, device: Any = None) -> None:
        """Change the memory that tensors occupy by `size` bytes; a negative number frees."""
        index = self.index(device)
        self._allocated[index] = self._allocated.get(index, 0) + size
        self._peak[index] = max(self._peak.get(index, 0), self._allocated[index])

    def index(self, device: Any = None) -> int:
        """Return the index that a device argument means: an index, a text, a `torch.device`; `None`: the current."""
        if isinstance(device, str):
            _, _, number = device.partition(":")
            return int(number) if number else self.current
        if isinstance(device, torch.device):
            return self.current if device.index is None else device.index
        return self.current if device is None else int(device)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Put tensors that this thread makes on, or moves to, the device on the host instead, in a `with` block.

        `pin_memory` returns a copy there, and `record_stream` nothing; both are recorded.
        """
        with installing.attribute(torch.Tensor, "record_stream", self._record_stream), _OnHost(self):
            yield

    @property
    def _record_stream(self) -> Callable[..., None]:
        def record_stream(tensor: torch.Tensor, stream: Any) -> None:
            self.calls.append(Call("Tensor.record_stream", (stream,)))

        return record_stream

    # --- the documented functions ------------------------------------------------------------------------

    def _questions(self) -> dict[str, Callable[..., Any]]:
        return {
            "is_available": lambda: self.count > 0,
            "device_count": lambda: self.count,
            "is_initialized": lambda: self.initialized,
            "current_device": lambda: self.current,
            "_is_in_bad_fork": lambda: False,
        }

    def _functions(self) -> dict[str, Callable[..., Any]]:
        return {
            "init": lambda: None,
            "set_device": self._set_device,
            "synchronize": lambda device=None: None,
            "get_device_name": lambda device=None: f"stub of {self.device_type}",
            "get_device_properties": self._properties,
            "get_device_capability": lambda device=None: (0, 0),
            "mem_get_info": self._mem_get_info,
            "memory_allocated": lambda device=None: self._allocated.get(self.index(device), 0),
            "max_memory_allocated": lambda device=None: self._peak.get(self.index(device), 0),
            "memory_reserved": lambda device=None: self._allocated.get(self.index(device), 0),
            "reset_peak_memory_stats": self._reset_peak,
            "empty_cache": lambda: None,
            "get_rng_state": lambda device=None: self._generator(device).get_state(),
            "set_rng_state": lambda state, device=None: self._generator(device).set_state(state),
            "manual_seed": lambda seed: self._generator(None).manual_seed(seed),
            "manual_seed_all": self._manual_seed_all,
            "initial_seed": lambda: self._generator(None).initial_seed(),
            "is_bf16_supported": lambda *args, **kwargs: True,
            "current_stream": self._current_stream,
            "default_stream": lambda device=None: self._stream_class(device, _default=True),
            "set_stream": lambda stream: self._streams.__setitem__(stream.device.index, stream),
            "stream": self._use_stream,
        }

    def _recorded(self, name: str, function: Callable[..., Any] | None) -> Callable[..., Any]:
        record = super()._recorded(name, function)

        def touch(*args: Any, **kwargs: Any) -> Any:
            self.initialized = True
            return record(*args, **kwargs)

        touch.__name__ = touch.__qualname__ = name
        return touch

    def _set_device(self, device: Any) -> None:
        index = self.index(device)
        if not 0 <= index < self.count:
            raise RuntimeError(f"invalid device ordinal {index}: there are {self.count}")
        self.current = index

    def _properties(self, device: Any = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=f"stub of {self.device_type}", total_memory=self.memory)

    def _mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.memory - self._allocated.get(self.index(device), 0), self.memory

    def _reset_peak(self, device: Any = None) -> None:
        self._peak[self.index(device)] = self._allocated.get(self.index(device), 0)

    def _generator(self, device: Any) -> torch.Generator:
        return self._generators.setdefault(self.index(device), torch.Generator())

    def _manual_seed_all(self, seed: int) -> None:
        for index in range(self.count):
            self._generator(index).manual_seed(seed)

    # --- streams and events ------------------------------------------------------------------------------

    def _classes(self) -> dict[str, type]:
        self._event_class = type("Event", (_Event,), {"stub": self})
        self._stream_class = type("Stream", (_Stream,), {"stub": self})
        return {"Stream": self._stream_class, "Event": self._event_class}

    def _current_stream(self, device: Any = None) -> Any:
        index = self.index(device)
        if index not in self._streams:
            self._streams[index] = self._stream_class(index, _default=True)
        return self._streams[index]

    @contextlib.contextmanager
    def _use_stream(self, stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        before = self._current_stream(stream.device)
        self._streams[stream.device.index] = stream
        try:
            yield
        finally:
            self._streams[stream.device.index] = before


class _Stream:
    """Its work is done at once; what is called is recorded."""

    stub: ClassVar[StubDevice]

    def __init__(self, device: Any = None, priority: int = 0, _default: bool = False) -> None:
        self.stub.initialized = True
        self.device = _device(self.stub.device_type, self.stub.index(device))
        if not _default:
            self._record("Stream", device)

    def _record(self, name: str, *args: Any) -> None:
        self.stub.calls.append(Call(name, tuple(argument for argument in args if argument is not None)))

    def wait_stream(self, stream: Any) -> None:
        self._record("Stream.wait_stream", stream)

    def wait_event(self, event: Any) -> None:
        self._record("Stream.wait_event", event)

    def record_event(self, event: Any = None) -> Any:
        event = event or self.stub._event_class()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._record("Stream.synchronize")

    def query(self) -> bool:
        return True


class _Event:
    """It is over as soon as it is recorded; time does not pass."""

    stub: ClassVar[StubDevice]

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.stub.initialized = True

    def _record(self, name: str, *args: Any) -> None:
        self.stub.calls.append(Call(name, tuple(argument for argument in args if argument is not None)))

    def record(self, stream: Any = None) -> None:
        self._record("Event.record", stream)

    def wait(self, stream: Any = None) -> None:
        self._record("Event.wait", stream)

    def synchronize(self) -> None:
        self._record("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _device(device_type: str, index: int) -> Any:
    """Return the device, or what looks like it where PyTorch does not know the type in this process."""
    try:
        return torch.device(device_type, index)
    except RuntimeError:
        return types.SimpleNamespace(type=device_type, index=index)


class _OnHost(TorchFunctionMode):
    """Replaces a device by the host's processor in every call of PyTorch's functions."""

    def __init__(self, stub: StubDevice) -> None:
        super().__init__()
        self._stub = stub
        self._text = re.compile(rf"{stub.device_type}(:\d+)?")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            self._stub.calls.append(Call("Tensor.pin_memory"))
            return args[0].clone()
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        host = {key: self._on_host(value) for key, value in (kwargs or {}).items()}
        return func(*map(self._on_host, args), **host)

    def _on_host(self, value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == self._stub.device_type:
            return torch.device("cpu")
        return "cpu" if isinstance(value, str) and self._text.fullmatch(value) else value


@contextlib.contextmanager
def installed(*modules: StubModule, distributions: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let stubs be imported in a `with` block, as if the vendor's packages were installed.

    Where a module of that name is loaded already (`torch.<device_type>` of a device that PyTorch knows), its
    members are replaced in place and restored after the block. Elsewhere the stub itself is put in `sys.modules` and
    into its parents, which are made where they are missing.

    A device type that PyTorch does not know in this process can be reached as `torch.privateuseone` too: give the
    descriptor of the test `device_type="privateuseone"`, or rename it in a process of its own
    (`torch.utils.rename_privateuse1_backend`, once for each process).

    Args:
        *modules: The stubs.
        distributions: Versions by name that installed metadata shall show, for what a descriptor's `runtime` asks.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            name = module.__name__
            there = name in sys.modules
            stack.enter_context(
                installing.in_place(name, module.members, module.absent)
                if there
                else installing.beside(module)
            )
            if isinstance(module, StubDevice) and not installing.known(module.device_type):
                stack.enter_context(installing.attribute(torch, "privateuseone", module))
        if distributions:
            stack.enter_context(installing.metadata(distributions))
        installing.forget_modules()
        try:
            yield
        finally:
            installing.forget_modules()
