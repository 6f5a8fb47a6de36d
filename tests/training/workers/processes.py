"""Behaviour that needs several processes. Each `check_...` asserts; the outcome of each is written down."""

import contextlib
import io
from collections import namedtuple

import pytest
import torch
from checks import run_checks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchport import (
    Accelerator,
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    PartialState,
    ProjectConfiguration,
)
from torchport.checkpoint import atomic
from torchport.errors import CheckpointError, ConfigurationError, OperationError
from torchport.ops import exchange
from torchport.state import AcceleratorState
from torchport.utils import (
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    pad_across_processes,
    reduce,
    set_seed,
    synchronize_rng_state,
)

Point = namedtuple("Point", "x y")
_checksum = atomic.checksum


def fresh(**settings) -> Accelerator:
    AcceleratorState._reset_state()
    return Accelerator(**settings)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def check_state_knows_its_place(folder):
    state = PartialState()
    assert state.num_processes == 2
    assert state.is_main_process == (state.process_index == 0) == state.is_local_main_process
    assert state.is_last_process == (state.process_index == 1)
    assert state.distributed_type == DistributedType.MULTI_CPU == "MULTI_CPU"
    assert state.backend == "gloo"
    assert str(state.device) == "cpu"
    assert "Num processes: 2" in repr(state)


def check_gather_concatenates_in_order_of_rank(folder):
    rank = PartialState().process_index
    assert gather(torch.tensor([rank, 10 + rank])).tolist() == [0, 10, 1, 11]
    assert gather(torch.tensor(rank)).tolist() == [0, 1]
    nested = gather({"a": (torch.tensor([[rank]]),), "b": Point(torch.tensor([rank]), torch.tensor([2.0]))})
    assert nested["a"][0].tolist() == [[0], [1]]
    assert nested["b"].x.tolist() == [0, 1]
    assert isinstance(nested["b"], Point)
    with pytest.raises(TypeError):
        gather("text")


def check_gather_object_joins_lists(folder):
    rank = PartialState().process_index
    assert gather_object([rank, "x"]) == [0, "x", 1, "x"]
    assert gather_object({"rank": rank}) == [{"rank": 0}, {"rank": 1}]


def check_broadcast_takes_one_process(folder):
    rank = PartialState().process_index
    mine = torch.tensor([rank])
    assert broadcast(mine, from_process=1).tolist() == [1]
    assert mine.tolist() == [rank]
    assert broadcast_object_list([rank, "a" * rank], from_process=1) == [1, "a"]


def check_reduce_knows_its_operations(folder):
    rank = PartialState().process_index
    value = torch.tensor([1.0 + rank, 4.0 - rank])
    assert reduce(value, "sum").tolist() == [3.0, 7.0]
    assert reduce(value, "mean").tolist() == [1.5, 3.5]
    assert reduce(value, "max").tolist() == [2.0, 4.0]
    assert reduce(value, "sum", scale=2.0).tolist() == [6.0, 14.0]
    assert reduce(torch.tensor([1 + rank]), "mean").tolist() == [1.5]
    assert value.tolist() == [1.0 + rank, 4.0 - rank]
    with pytest.raises(OperationError):
        reduce(value, "median")


def check_pad_across_processes_fills_up(folder):
    rank = PartialState().process_index
    ragged = torch.ones(1 + rank, 2)
    padded = pad_across_processes(ragged, dim=0, pad_index=-1)
    assert padded.tolist() == ([[1, 1], [-1, -1]] if rank == 0 else [[1, 1], [1, 1]])
    first = pad_across_processes(ragged, dim=0, pad_first=True)
    assert first.tolist() == ([[0, 0], [1, 1]] if rank == 0 else [[1, 1], [1, 1]])
    assert pad_across_processes(torch.ones(3), dim=1).shape == (3,)


def check_debug_mode_names_the_shapes(folder):
    rank = PartialState().process_index
    exchange._group.debug = True
    try:
        with pytest.raises(OperationError, match=r"rank 0: \(2,\) float32\s+rank 1: \(3,\) float32"):
            gather(torch.zeros(2 + rank))
    finally:
        exchange._group.debug = False


def check_split_between_processes_shares_out(folder):
    state = PartialState()
    rank = state.process_index
    with state.split_between_processes(["a", "b", "c"]) as share:
        assert share == (["a", "b"] if rank == 0 else ["c"])
    with state.split_between_processes(["a", "b", "c"], apply_padding=True) as share:
        assert share == (["a", "b"] if rank == 0 else ["c", "c"])
    with state.split_between_processes(torch.arange(3), apply_padding=True) as share:
        assert share.tolist() == ([0, 1] if rank == 0 else [2, 2])
    with state.split_between_processes({"x": [1, 2], "y": (3, 4)}) as share:
        assert share == ({"x": [1], "y": (3,)} if rank == 0 else {"x": [2], "y": (4,)})
    with pytest.raises(OperationError), state.split_between_processes({"x": [1], "y": [1, 2]}):
        pass


def check_decorators_choose_processes(folder):
    accelerator = fresh()
    rank = accelerator.process_index

    @accelerator.on_main_process
    def on_main():
        return "ran"

    @accelerator.on_last_process
    def on_last():
        return "ran"

    @accelerator.on_process(process_index=1)
    def on_one():
        return "ran"

    @accelerator.on_local_process(local_process_idx=0)
    def on_local_zero():
        return "ran"

    assert (on_main(), on_last(), on_one(), on_local_zero()) == (
        ("ran", None, None, "ran") if rank == 0 else (None, "ran", "ran", None)
    )
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        accelerator.print("once")
    assert output.getvalue() == ("once\n" if rank == 0 else "")


def check_main_process_goes_first(folder):
    state = PartialState()
    marker = folder / "made-by-main"
    with state.main_process_first():
        if state.is_main_process:
            marker.write_text("")
        assert marker.exists()
    with state.local_main_process_first():
        assert marker.exists()


def check_triggers_reach_everyone(folder):
    accelerator = fresh()
    assert accelerator.check_trigger() is False
    if accelerator.process_index == 1:
        accelerator.set_trigger()
    assert accelerator.check_trigger() is True
    assert accelerator.check_trigger() is False


def check_rng_state_comes_from_the_main_process(folder):
    rank = PartialState().process_index
    set_seed(5, device_specific=True)
    assert torch.initial_seed() == 5 + rank
    synchronize_rng_state("torch")
    assert len(set(gather_object([torch.rand(1).item()]))) == 1


def check_shuffled_loaders_share_one_order(folder):
    accelerator = fresh()
    torch.manual_seed(accelerator.process_index)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(10)), batch_size=2, shuffle=True))
    orders = []
    for _ in range(2):
        seen = [x for (batch,) in loader for x in accelerator.gather_for_metrics(batch).tolist()]
        assert sorted(seen) == list(range(10))
        orders.append(seen)
    assert orders[0] != orders[1]


def check_gather_for_metrics_gives_each_sample_once(folder):
    accelerator = fresh()
    for length, size in ((7, 2), (8, 2), (1, 4), (5, 1), (9, 4)):
        loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(length)), batch_size=size))
        seen = [x for (batch,) in loader for x in accelerator.gather_for_metrics(batch).tolist()]
        assert seen == list(range(length)), (length, size, seen)
        objects = [
            x
            for (batch,) in loader
            for x in accelerator.gather_for_metrics(batch.tolist(), use_gather_object=True)
        ]
        assert objects == list(range(length)), (length, size, objects)


def check_split_batches_keeps_the_batch_size(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(10)), batch_size=4))
    mine = [batch.tolist() for (batch,) in loader]
    assert mine == ([[0, 1], [4, 5], [8, 9]] if accelerator.process_index == 0 else [[2, 3], [6, 7], [0, 1]])
    assert loader.total_batch_size == 4


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(7))


def check_iterable_sets_take_turns(folder):
    accelerator = fresh()
    loader = accelerator.prepare(DataLoader(Numbers(), batch_size=2))
    seen = [x for batch in loader for x in accelerator.gather_for_metrics(batch).tolist()]
    assert seen == list(range(7))


def check_uneven_inputs_join(folder):
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(even_batches=True))
    model, loader = accelerator.prepare(network(), DataLoader(TensorDataset(torch.randn(3, 3)), batch_size=1))
    steps = 0
    with accelerator.join_uneven_inputs([model], even_batches=False):
        for (inputs,) in loader:
            model(inputs).sum().backward()
            steps += 1
    assert steps == (2 if accelerator.process_index == 0 else 1)
    assert loader.batch_sampler.even_batches is True


def check_uneven_inputs_join_in_windows_too(folder):
    def train(steps, **counted):
        accelerator = fresh(
            gradient_accumulation_steps=steps, dataloader_config=DataLoaderConfiguration(even_batches=False)
        )
        weight = nn.Linear(1, 1, bias=False)
        rows = DataLoader(torch.arange(1.0, 6.0).unsqueeze(1), batch_size=1)  # 1, 3, 5 and 2, 4
        model, loader = accelerator.prepare(weight, rows)
        ends, gradients = [], []
        with accelerator.join_uneven_inputs([model]):
            for inputs in loader:
                with accelerator.accumulate(model, **counted):
                    accelerator.backward(model(inputs).mean())
                    ends.append(accelerator.sync_gradients)
                    if accelerator.sync_gradients:
                        gradients.append(weight.weight.grad.item())
                        model.zero_grad()
        assert accelerator.gradient_state.weightless is accelerator.gradient_state.may_leave is False
        return ends, gradients

    # the first window has 1, 2, 3, 4 and the second 5 alone, over two processes
    assert train(2) == ([False, True, True], [(1 + 2 + 3 + 4) / 4, 5 / 2])
    assert train(2, num_items=torch.tensor(1)) == ([False, True, True], [(1 + 2 + 3 + 4) / 4, 5 / 1])
    with pytest.raises(ConfigurationError, match=r"accumulate\(\) with num_items takes all processes"):
        train(1, num_items=1)


def _gradients(accelerator, model, inputs):
    model.zero_grad()
    accelerator.backward(model(inputs).square().mean())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check_no_sync_keeps_gradients_local(folder):
    accelerator = fresh()
    model = accelerator.prepare(network())
    inputs = torch.full((2, 3), 1.0 + accelerator.process_index)
    with accelerator.no_sync(model):
        local = _gradients(accelerator, model, inputs)
    assert gather(local[:1]).unique().numel() == 2
    averaged = _gradients(accelerator, model, inputs)
    torch.testing.assert_close(averaged, reduce(local, "mean"))
    with accelerator.no_sync(model):
        loss = model(inputs).square().mean()
    model.zero_grad()
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(loss)
    synced = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(synced, averaged)


def check_ddp_takes_its_settings(folder):
    accelerator = fresh(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, bucket_cap_mb=1)]
    )
    model = accelerator.prepare(network())
    assert isinstance(model, DistributedDataParallel)
    assert model.find_unused_parameters is True
    assert model.bucket_bytes_cap == 1024 * 1024
    assert accelerator.unwrap_model(model) is model.module
    assert accelerator.prepare(model) is model


def check_communication_hooks_compress(folder):
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(PartialState().process_index))
    exact = _gradients(accelerator := fresh(), accelerator.prepare(network()), inputs)
    kinds = DDPCommunicationHookType
    for hook, wrapper, options, tolerance in (
        (kinds.NO, kinds.NO, {}, 0.0),
        (kinds.FP16, kinds.NO, {}, 2e-3),
        (kinds.BF16, kinds.NO, {}, 2e-2),
        (kinds.POWER_SGD, kinds.NO, {"matrix_approximation_rank": 2, "start_powerSGD_iter": 2}, 1e-6),
        (kinds.POWER_SGD, kinds.FP16, {"matrix_approximation_rank": 2, "start_powerSGD_iter": 2}, 2e-3),
        (kinds.BATCHED_POWER_SGD, kinds.NO, {"start_powerSGD_iter": 2}, 1e-6),
    ):
        settings = DistributedDataParallelKwargs(
            comm_hook=hook, comm_wrapper=wrapper, comm_state_option=options
        )
        accelerator = fresh(kwargs_handlers=[settings])
        compressed = _gradients(accelerator, accelerator.prepare(network()), inputs)
        error = ((compressed - exact).abs().max() / exact.abs().max()).item()
        assert error <= tolerance, (hook, wrapper, error)
        if hook in (kinds.FP16, kinds.BF16):
            assert error > 0, "nothing was compressed"


def _train(accelerator, model, optimizer, loader, epochs):
    losses = []
    for _ in range(epochs):
        for (inputs,) in loader:
            loss = model(inputs).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def _prepared(accelerator):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(torch.randn(16, 3, generator=generator)), batch_size=2, shuffle=True)
    return accelerator.prepare(model, optimizer, loader)


def check_training_goes_on_exactly_after_load_state(folder):
    set_seed(1)
    accelerator = fresh()
    objects = _prepared(accelerator)
    _train(accelerator, *objects, 1)
    accelerator.save_state(folder / "state")
    expected = _train(accelerator, *objects, 2)

    accelerator = fresh()
    objects = _prepared(accelerator)
    accelerator.load_state(folder / "state")
    assert _train(accelerator, *objects, 2) == expected
    names = sorted(path.name for path in (folder / "state").iterdir())
    assert names == [
        "manifest.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "random_states_1.pkl",
        "sampler.bin",
    ]  # fmt: skip


def check_a_failing_rank_leaves_the_older_checkpoint(folder):
    accelerator = fresh()
    _prepared(accelerator)

    class Breaks:
        def state_dict(self):
            raise RuntimeError("no state today")

        def load_state_dict(self, state): ...

    target = folder / "kept"
    accelerator.save_state(target)
    before = (target / "manifest.json").read_text()
    if accelerator.process_index == 0:
        accelerator._contents.custom.append(Breaks())
    with pytest.raises(CheckpointError, match="rank 0 could not write: RuntimeError: no state today"):
        accelerator.save_state(target)
    accelerator.wait_for_everyone()
    assert (target / "manifest.json").read_text() == before
    assert not list(folder.glob(".kept*"))


def check_automatic_naming_keeps_the_newest(folder):
    project = ProjectConfiguration(
        project_dir=str(folder / "project"), automatic_checkpoint_naming=True, total_limit=2
    )
    accelerator = fresh(project_config=project)
    _prepared(accelerator)
    for _ in range(4):
        accelerator.save_state()
    accelerator.wait_for_everyone()
    kept = sorted(path.name for path in (folder / "project" / "checkpoints").iterdir())
    assert kept == ["checkpoint_2", "checkpoint_3"]
    accelerator.load_state()
    assert project.iteration == 4


def check_a_save_hook_that_fails_on_one_rank_fails_on_all(folder):
    accelerator = fresh()
    _prepared(accelerator)

    def hook(models, weights, output_dir):
        if accelerator.process_index == 0:
            raise RuntimeError("hook failed")

    accelerator.register_save_state_pre_hook(hook)
    with pytest.raises(CheckpointError, match="rank 0 could not write: RuntimeError: hook failed"):
        accelerator.save_state(folder / "hooked")
    accelerator.wait_for_everyone()
    assert not list(folder.glob("*hooked*"))


def check_a_checkpoint_that_the_main_process_cannot_write_keeps_nobody_waiting(folder):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}  # no tensor: safetensors cannot hold it

        def set_extra_state(self, state): ...

    accelerator = fresh()
    strategy = accelerator._contents.strategy
    state_dict = strategy.model_state_dict

    def collective(model):  # as a strategy does that gathers shards
        accelerator.wait_for_everyone()
        return state_dict(model)

    strategy.model_state_dict = collective
    accelerator.prepare(Extra(1, 1), nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="values that are not tensors: _extra_state"):
        accelerator.save_state(folder / "extra")
    accelerator.wait_for_everyone()
    assert not list(folder.glob("*extra*"))


def check_foreign_files_are_refused_on_every_rank(folder):
    accelerator = fresh()
    _prepared(accelerator)
    target = folder / "foreign"
    target.mkdir(exist_ok=True)
    (target / "notes.txt").write_text("precious")
    accelerator.wait_for_everyone()
    with pytest.raises(CheckpointError, match=r"files that are not of a checkpoint: notes\.txt\n"):
        accelerator.save_state(target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def check_ranks_that_name_different_folders_are_told_so(folder):
    accelerator = fresh()
    _prepared(accelerator)
    rank = accelerator.process_index
    with pytest.raises(CheckpointError, match=r"rank 0: .*at-0, rank 1: .*at-1"):
        accelerator.save_state(folder / f"at-{rank}")
    assert not list(folder.glob("*at-*"))


def check_damage_that_one_rank_finds_is_raised_on_all(folder):
    accelerator = fresh()
    model, _optimizer, _loader = _prepared(accelerator)
    source = folder / "damaged"
    accelerator.save_state(source)
    accelerator.wait_for_everyone()
    before = model.module.weight.detach().clone()
    with torch.no_grad():
        model.module.weight.add_(1)
    if accelerator.is_main_process:
        for name in ("model.safetensors", "random_states_1.pkl"):
            data = bytearray((source / name).read_bytes())
            data[-1] ^= 1
            (source / name).write_bytes(data)
    accelerator.wait_for_everyone()
    checked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "checksum", lambda path: checked.append(path.name) or _checksum(path))
        with pytest.raises(CheckpointError) as caught:
            accelerator.load_state(source)
    assert "model.safetensors" in caught.value.found
    assert "random_states_1.pkl" in caught.value.found
    assert len(set(gather_object([str(caught.value)]))) == 1
    assert sorted(gather_object(checked)) == [
        "model.safetensors", "optimizer.bin", "random_states_0.pkl", "random_states_1.pkl", "sampler.bin",
    ]  # fmt: skip
    assert torch.equal(model.module.weight, before + 1)


def check_a_rank_that_cannot_load_its_part_is_waited_for_by_nobody(folder):
    class Breaks:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            if PartialState().process_index == 1:
                raise ValueError("not today")

    accelerator = fresh()
    _prepared(accelerator)
    accelerator.register_for_checkpointing(Breaks())
    accelerator.save_state(folder / "half")
    with pytest.raises(CheckpointError, match="ValueError: not today"):
        accelerator.load_state(folder / "half")
    accelerator.wait_for_everyone()


def check_nothing_that_takes_all_processes_works_after_the_end_of_the_run(folder):
    accelerator = fresh()
    rank, mine = accelerator.process_index, torch.ones(2)
    accelerator.prepare(network())
    accelerator.end_training()
    accelerator.end_training()  # once more does nothing
    refused = {
        "gather": lambda: accelerator.gather(mine),
        "gather_for_metrics": lambda: accelerator.gather_for_metrics(["a"]),
        "gather_object": lambda: gather_object(["a"]),
        "reduce": lambda: accelerator.reduce(mine),
        "broadcast": lambda: broadcast(mine),
        "broadcast_object_list": lambda: broadcast_object_list(["a"]),
        "pad_across_processes": lambda: accelerator.pad_across_processes(mine),
        "wait_for_everyone": accelerator.wait_for_everyone,
        "save_state": lambda: accelerator.save_state(folder / f"alone{rank}"),
        "load_state": lambda: accelerator.load_state(folder / "half"),
    }
    for name, call in refused.items():
        with pytest.raises(OperationError) as caught:
            call()
        assert caught.value.problem == f"{name}() needs all processes, and this run has ended"
        assert "end_training()" in caught.value.reason
    assert not (folder / f"alone{rank}").exists()

    again = Accelerator(precision="bf16")  # another run, of another configuration
    with pytest.raises(OperationError, match="needs all processes"):
        accelerator.save_state(folder / f"alone{rank}")  # the run of these objects is over
    accelerator.end_training()  # and ending it again leaves the new one alone
    assert again.gather(torch.tensor([rank])).tolist() == [0, 1]
    AcceleratorState._reset_state()
    with pytest.raises(OperationError, match="wait_for_everyone"):
        again.wait_for_everyone()


def check_what_is_not_prepared_is_not_trained(folder):
    accelerator, model, other = fresh(), network(), network()
    with pytest.raises(ConfigurationError, match="2 processes would train 2 models"):
        accelerator.backward(model(torch.ones(1, 3)).sum())
    with pytest.raises(
        ConfigurationError, match=r"a list with a Linear\n  try:    accelerator.prepare\(\*objects\)"
    ):
        accelerator.prepare([model])
    parameters = [*model.parameters(), *other.parameters()]
    optimizer = accelerator.prepare(torch.optim.SGD(parameters, lr=0.1))
    model = accelerator.prepare(model)
    accelerator.backward(model(torch.ones(1, 3)).sum())
    before = [parameter.clone() for parameter in parameters]
    with pytest.raises(ConfigurationError, match=r"2 of its 4 parameters, the first of shape \(2, 3\)"):
        optimizer.step()
    assert all(map(torch.equal, parameters, before))
    accelerator.prepare(other)
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])


if __name__ == "__main__":
    run_checks(dict(globals()))
