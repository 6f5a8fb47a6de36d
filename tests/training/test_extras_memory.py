"""A smaller batch after memory has run out."""

import gc
import weakref

import pytest
import torch
from torchport import Accelerator, find_executable_batch_size
from torchport.errors import BatchSizeError
from torchport.state import AcceleratorState
from torchport.training.memory import is_out_of_memory
from torchport.utils import release_memory


def allocate_too_much():
    """Ask the host's allocator for 8 EiB less a little."""
    return torch.empty(2**60 - 1, dtype=torch.float64)


def real_error():
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 20.00 MiB"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("ACME out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        real_error(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_allocators_are_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), KeyError()])
def test_other_errors_are_not_taken_for_them(error):
    assert not is_out_of_memory(error)


def test_the_batch_size_is_halved_until_it_fits():
    tried = []

    @find_executable_batch_size(starting_batch_size=100)
    def train(batch_size, factor, *, name="n"):
        tried.append(batch_size)
        if batch_size > 13:
            allocate_too_much()
        return batch_size * factor, name

    assert train(2, name="m") == (24, "m")
    assert tried == [100, 50, 25, 12]
    assert train(1) == (12, "n")  # every call begins anew
    assert tried == [100, 50, 25, 12] * 2
    assert train.__name__ == "train"


def test_without_arguments_it_begins_at_128():
    @find_executable_batch_size
    def train(batch_size):
        return batch_size

    assert train() == 128


@pytest.mark.parametrize("takes_argument", [True, False])
def test_a_function_of_ones_own_reduces_the_batch_size(takes_argument):
    tried, sizes = [], iter([30, 20])

    def train(batch_size):
        tried.append(batch_size)
        if batch_size > 20:
            raise MemoryError

    smaller = (lambda size: size - 10) if takes_argument else lambda: next(sizes)
    find_executable_batch_size(train, starting_batch_size=40, reduce_batch_size_fn=smaller)()
    assert tried == [40, 30, 20]


def test_a_reduction_that_does_not_reduce_is_an_error_and_not_a_loop():
    def train(batch_size):
        raise MemoryError

    with pytest.raises(BatchSizeError, match="must return less than 8"):
        find_executable_batch_size(train, 8, lambda size: size)()


def test_no_batch_size_at_all_is_an_error_with_the_last_reason():
    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size):
        raise torch.OutOfMemoryError(f"no room for {batch_size}")

    with pytest.raises(
        BatchSizeError, match=r"(?s)no batch size for train fits.*batch size 1: no room for 1"
    ):
        train()


def test_another_error_is_raised_at_once():
    tried = []

    @find_executable_batch_size
    def train(batch_size):
        tried.append(batch_size)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train()
    assert tried == [128]


def test_a_call_that_gives_the_batch_size_is_refused_with_what_to_change():
    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size, model):
        raise AssertionError("not reached")

    message = (
        r"train\(16, 'model'\) does not fit train\(batch_size, model\).*leave the batch size out of the call"
    )
    with pytest.raises(TypeError, match=message):
        train(16, "model")
    with pytest.raises(TypeError, match="missing a required argument: 'model'"):
        train()
    with pytest.raises(TypeError, match="leave the batch size out"):
        find_executable_batch_size(lambda: None)()


def test_what_a_failed_attempt_has_made_is_gone_before_the_next():
    made = []

    class Large:
        pass

    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size):
        assert all(reference() is None for reference in made)
        large = Large()
        large.itself = large  # a cycle, as models with hooks have
        made.append(weakref.ref(large))
        if batch_size > 1:
            allocate_too_much()

    gc.disable()
    try:
        train()
    finally:
        gc.enable()
    assert len(made) == 2


def test_memory_is_given_back_through_the_backend_of_the_run(monkeypatch):
    AcceleratorState._reset_state()
    backend, calls = Accelerator().backend, []
    monkeypatch.setattr(backend, "empty_cache", lambda: calls.append("empty_cache"))
    one, two = release_memory(torch.ones(1), torch.ones(1))
    assert (one, two, calls) == (None, None, ["empty_cache"])
    AcceleratorState._reset_state()
    assert release_memory() == []
