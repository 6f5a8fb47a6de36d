"""The façade in one process."""

import copy
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchport import (
    Accelerator,
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    PartialState,
    ProfileKwargs,
    set_seed,
)
from torchport.errors import (
    ConfigurationError,
    IncompatibleError,
    OperationError,
    TorchportError,
    UnknownPluginError,
)
from torchport.runtime import Runtime
from torchport.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def loader(samples: int, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(samples, 3)), batch_size=batch_size)


class Stream(IterableDataset):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self):
        return iter(torch.ones(self.samples, 3))


def test_prepare_gives_objects_back_in_their_order_and_others_untouched():
    accelerator = Accelerator()
    model, optimizer = network(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    other = object()
    a, b, c, d, e = accelerator.prepare(scheduler, other, loader(4), optimizer, model)
    assert a.scheduler is scheduler
    assert b is other
    assert c.dataset is not None
    assert d.optimizer is optimizer
    assert e is model
    assert accelerator.prepare(model) is model
    assert a.optimizers == (d,)


def test_several_models_and_optimizers_train_side_by_side():
    accelerator = Accelerator()
    one, two = network(), nn.Linear(3, 2)
    first, second = torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.SGD(two.parameters(), lr=0.1)
    one, two, first, second = accelerator.prepare(one, two, first, second)
    before = [p.clone() for m in (one, two) for p in m.parameters()]
    accelerator.backward((one(torch.ones(1, 3)) + two(torch.ones(1, 3))).sum())
    first.step()
    after = [p.clone() for m in (one, two) for p in m.parameters()]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    second.step()
    assert not torch.equal(before[2], next(iter(two.parameters())))


@pytest.mark.parametrize(("samples", "windows"), [(14, [3, 3, 1]), (12, [3, 3]), (4, [2]), (2, [1])])
@pytest.mark.parametrize("sized", [True, False])
def test_every_window_averages_the_micro_batches_it_has(samples, windows, sized):
    accelerator = Accelerator(gradient_accumulation_steps=3)
    data = loader(samples) if sized else DataLoader(Stream(samples), batch_size=2)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    reference = network()
    reference(torch.ones(2, 3)).sum().backward()
    seen, size = [], 0
    for batch in data:
        inputs = batch[0] if sized else batch
        size += 1
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).sum())
            if accelerator.sync_gradients:
                torch.testing.assert_close(model.weight.grad, reference.weight.grad)
                seen.append(size)
                size = 0
            optimizer.step()
            optimizer.zero_grad()
    assert seen == windows


def test_windows_run_over_the_end_of_a_loader_if_asked_to():
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=plugin)
    model, data = accelerator.prepare(network(), loader(6))
    synced = []
    for _ in range(2):
        for (inputs,) in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs).sum())
            synced.append(accelerator.sync_gradients)
    assert synced == [False, True, False, True, False, True]


def test_an_inner_loader_does_not_end_the_window_of_the_outer_one():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, outer, inner = accelerator.prepare(network(), loader(8), loader(2))
    synced = []
    for (inputs,) in outer:
        for _ in inner:
            assert accelerator.gradient_state.end_of_dataloader
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).sum())
        synced.append(accelerator.sync_gradients)
    assert synced == [False, True, False, True]
    assert not accelerator.gradient_state.in_dataloader


def test_an_error_inside_a_window_starts_the_next_one_anew():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = accelerator.prepare(network())
    with pytest.raises(KeyError), accelerator.accumulate(model):
        raise KeyError
    with accelerator.accumulate(model):
        assert not accelerator.sync_gradients
    with accelerator.accumulate(model):
        assert accelerator.sync_gradients


def test_item_counts_for_some_micro_batches_only_are_refused():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = accelerator.prepare(network())
    with accelerator.accumulate(model, num_items=2):
        accelerator.backward(model(torch.ones(2, 3)).mean())
    with pytest.raises(ConfigurationError, match="num_items for some micro-batches"):
        accelerator.accumulate(model)


def test_the_scheduler_follows_its_optimizer():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, loader(10))
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for (inputs,) in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs).sum())
                optimizer.step()
                scheduler.step()
                rates.append(scheduler.get_last_lr()[0])
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.125]


def test_a_scheduler_can_step_on_its_own():
    accelerator = Accelerator(gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = accelerator.prepare(
        model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    )
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 3)).sum())
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.5]


def test_an_overflow_skips_the_step_and_the_scheduler():
    accelerator = Accelerator(precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=1024.0)])
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = accelerator.prepare(
        model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    )
    before = model.weight.clone()
    accelerator.backward(model(torch.full((1, 3), 1e30)).float().sum() * 1e30)
    optimizer.step()
    scheduler.step()
    assert accelerator.optimizer_step_was_skipped
    assert torch.equal(model.weight, before)
    assert scheduler.get_last_lr() == [1.0]
    assert accelerator.scaler.get_scale() == 512.0
    optimizer.zero_grad()
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    assert not accelerator.optimizer_step_was_skipped
    assert not torch.equal(model.weight, before)


def test_two_optimizers_divide_by_one_loss_scale():
    accelerator = Accelerator(
        precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=16.0, growth_interval=1)]
    )
    one, two = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (one, two)]
    one, two, first, second = accelerator.prepare(one, two, *optimizers)
    for _ in range(3):
        accelerator.backward(one(torch.ones(1, 3)).sum() + two(torch.ones(1, 3)).sum())
        accelerator.clip_grad_norm_(one.parameters(), 100.0)
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
    torch.testing.assert_close(one.weight, two.weight)
    assert accelerator.scaler.get_scale() == 16.0 * 2**3


def test_half_precision_runs_forward_in_it_and_gives_float32_back():
    accelerator = Accelerator(mixed_precision="bf16")
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs):
            output = self.layer(inputs)
            seen.append(output.dtype)
            return {"logits": output}

    model = accelerator.prepare(Spy())
    assert model(torch.ones(1, 3))["logits"].dtype == torch.float32
    assert seen == [torch.bfloat16]
    with accelerator.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with accelerator.autocast(AutocastKwargs(enabled=False)):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert plain(torch.ones(1, 3))["logits"].dtype == torch.float32
    assert seen[-1] == torch.float32


@pytest.mark.parametrize("forget", [Accelerator.free_memory, Accelerator.end_training, lambda _: None])
def test_a_model_computes_in_the_precision_of_the_run_that_prepared_it_last(forget):
    seen = []

    class Spy(nn.Linear):
        def forward(self, inputs):
            output = super().forward(inputs)
            seen.append(output.dtype)
            return output

    model, inputs = Spy(3, 2), torch.ones(1, 3)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)):
        AcceleratorState._reset_state()
        accelerator = Accelerator(precision=precision)
        accelerator.prepare(model)(inputs)
        accelerator.prepare_model(model, evaluation_mode=True)(inputs)
        assert seen == [dtype, dtype]
        bound = model.__dict__.get("forward")
        own = getattr(bound, "_torchport_forward", Spy.forward)
        assert own is Spy.forward  # bound once, whatever it was bound to before
        forget(accelerator)
        seen.clear()


def test_a_model_has_its_own_forward_back_when_the_run_forgets_it():
    accelerator = Accelerator(precision="bf16")
    model = accelerator.prepare(network())
    assert "forward" in model.__dict__
    accelerator.free_memory()
    assert "forward" not in model.__dict__

    accelerator.prepare(model)
    AcceleratorState._reset_state()
    other = Accelerator(precision="bf16")
    other.prepare(model)
    accelerator.free_memory()  # another run has the model now
    assert "forward" in model.__dict__


def test_full_precision_leaves_the_model_alone():
    accelerator = Accelerator()
    model = network()
    prepared = accelerator.prepare(model)
    assert prepared is model
    assert "forward" not in model.__dict__
    assert accelerator.backward.__self__ is accelerator._window


def test_clipping_returns_the_norm_before():
    accelerator = Accelerator()
    model = accelerator.prepare(network())
    accelerator.backward(model(torch.ones(1, 3)).sum() * 10)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.item() == pytest.approx(10 * 8**0.5)
    accelerator.clip_grad_value_(model.parameters(), 0.01)
    assert model.weight.grad.abs().max().item() == pytest.approx(0.01)


def test_one_strategy_over_several_processes_runs_in_one_when_asked():
    accelerator = Accelerator(strategy="ddp")
    model = accelerator.prepare(network())
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    accelerator.backward(model(torch.ones(1, 3)).sum())
    assert accelerator.distributed_type == DistributedType.NO


def test_settings_of_a_strategy_choose_it():
    accelerator = Accelerator(strategy=DistributedDataParallelKwargs(static_graph=True))
    assert accelerator.plan.strategy == "ddp"
    assert accelerator.prepare(network()).static_graph is True


def test_handlers_that_nothing_reads_are_refused():
    class Unknown(AutocastKwargs):
        pass

    Unknown.__module__ = "elsewhere"
    with pytest.raises(ConfigurationError, match="Unknown, which no installed plugin reads"):
        Accelerator(kwargs_handlers=[Unknown()])
    with pytest.raises(ConfigurationError, match="two AutocastKwargs"):
        Accelerator(kwargs_handlers=[AutocastKwargs(), AutocastKwargs()])


def test_settings_for_many_processes_do_no_harm_in_one():
    assert Accelerator(kwargs_handlers=[DistributedDataParallelKwargs()]).plan.strategy == "single"


def test_documented_spellings_fill_slots_and_unknown_ones_are_refused():
    assert Accelerator(cpu=True, mixed_precision="bf16").plan.precision == "bf16"
    AcceleratorState._reset_state()
    with pytest.raises(TypeError, match="did you mean 'mixed_precision'"):
        Accelerator(mixed_precison="bf16")
    with pytest.raises(TypeError, match="both fill the slot 'precision'"):
        Accelerator(precision="no", mixed_precision="bf16")
    with pytest.raises(UnknownPluginError, match="pip install torchport-acme"):
        Accelerator(backend="acme")


def test_a_second_accelerator_shares_the_run_and_cannot_contradict_it(monkeypatch):
    first = Accelerator(precision="bf16")
    assert Accelerator(precision="bf16").device == first.device
    assert AcceleratorState().mixed_precision == "bf16"
    assert Accelerator().mixed_precision == "bf16"
    for contradict in (AcceleratorState, Accelerator):
        with pytest.raises(ConfigurationError, match="another precision than the run that is open"):
            contradict(mixed_precision="fp16")


@pytest.mark.parametrize("opens", [lambda: None, PartialState])
def test_an_accelerator_that_could_not_be_made_leaves_nothing_behind(tmp_path, opens):
    before = opens()
    with pytest.raises(ConfigurationError, match="needs a folder"):
        Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, resume="auto")
    assert (Runtime.current is not None) is (before is not None)
    accelerator = Accelerator(project_dir=tmp_path, resume="auto")
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)
    with pytest.raises(ConfigurationError, match="needs a folder"):
        Accelerator(gradient_accumulation_steps=2, resume="auto")
    assert accelerator.gradient_state.num_steps == 1  # that of the run which goes on
    assert Runtime.current is accelerator._runtime


def test_a_run_can_end_while_a_loader_is_being_iterated():
    iterator = iter(Accelerator().prepare(loader(4)))
    next(iterator)
    AcceleratorState._reset_state()
    iterator.close()
    assert GradientState().dataloader_references == [None]


def test_a_partial_state_leaves_precision_and_strategy_open():
    assert PartialState().plan.precision == "no"
    assert Accelerator(precision="bf16", strategy="ddp").plan.strategy == "ddp"
    assert PartialState().plan.precision == "bf16"


def test_a_run_can_be_ended_and_made_anew():
    assert Accelerator(precision="bf16", gradient_accumulation_steps=4).gradient_accumulation_steps == 4
    state = PartialState()
    AcceleratorState._reset_state()
    with pytest.raises(TorchportError, match="has ended"):
        _ = state.device
    again = Accelerator()
    assert again.mixed_precision == "no"
    assert again.gradient_accumulation_steps == 1
    assert GradientState().num_steps == 1


def test_free_memory_forgets_what_was_prepared():
    accelerator = Accelerator()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    model, optimizer = accelerator.free_memory(model, optimizer)
    assert (model, optimizer) == (None, None)
    assert not accelerator.optimizer_step_was_skipped
    model = accelerator.prepare(network())
    accelerator.backward(model(torch.ones(1, 3)).sum())
    assert model.weight.grad is not None


def test_accumulation_steps_come_from_argument_then_variable(monkeypatch):
    monkeypatch.setenv("TORCHPORT_GRADIENT_ACCUMULATION_STEPS", "5")
    assert Accelerator().gradient_accumulation_steps == 5
    AcceleratorState._reset_state()
    assert Accelerator(gradient_accumulation_steps=2).gradient_accumulation_steps == 2
    AcceleratorState._reset_state()
    monkeypatch.delenv("TORCHPORT_GRADIENT_ACCUMULATION_STEPS")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert Accelerator().gradient_accumulation_steps == 3
    AcceleratorState._reset_state()
    with pytest.raises(ConfigurationError, match="at least 1"):
        Accelerator(gradient_accumulation_steps=0)
    with pytest.raises(ConfigurationError, match="give one of the two"):
        Accelerator(
            gradient_accumulation_steps=2,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3),
        )


def test_the_process_group_meets_where_the_launcher_says():
    with pytest.raises(ConfigurationError, match="launcher says where processes meet"):
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(init_method="tcp://10.0.0.1:1")])


def test_the_backend_of_the_process_group_chooses_the_collectives():
    handler = InitProcessGroupKwargs(backend="ucc")
    with pytest.raises(UnknownPluginError, match="collectives 'ucc'"):
        Accelerator(strategy="ddp", kwargs_handlers=[handler])


def test_single_refuses_a_job_of_two_processes(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29511")
    with pytest.raises(IncompatibleError, match="at most 1"):
        Accelerator(strategy="single")


def test_profile_writes_a_trace_per_rank(tmp_path):
    handler = ProfileKwargs(activities=["cpu"], output_trace_dir=str(tmp_path), record_shapes=True)
    accelerator = Accelerator(kwargs_handlers=[handler])
    model = accelerator.prepare(network())
    with accelerator.profile() as profiler:
        model(torch.ones(1, 3))
    assert any("linear" in event.key for event in profiler.key_averages())
    assert (tmp_path / "profile_0.json").stat().st_size > 0
    with (
        pytest.raises(ConfigurationError, match="not a schedule"),
        accelerator.profile(ProfileKwargs(schedule_option={"wait": 1})),
    ):
        pass


def test_a_run_begins_with_the_accumulation_of_its_own_accelerator_not_of_the_run_before():
    before = Accelerator(gradient_accumulation_steps=4)
    model = before.prepare(network())
    with before.accumulate(model):  # the first of four micro-batches: the window stays open
        before.backward(model(torch.ones(1, 3)).sum())
    assert not before.sync_gradients
    before.end_training()
    accelerator = Accelerator()
    assert accelerator.gradient_accumulation_steps == 1
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    weight = model.weight.detach().clone()
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    assert torch.equal(model.weight, weight - model.weight.grad)
    assert not torch.equal(model.weight, weight)


def test_a_profile_whose_schedule_skips_every_step_warns_instead_of_failing_after_the_training(tmp_path):
    folder = tmp_path / "traces"
    handler = ProfileKwargs(
        schedule_option={"wait": 5, "warmup": 1, "active": 1}, output_trace_dir=str(folder)
    )
    accelerator = Accelerator(kwargs_handlers=[handler])
    recording = accelerator.profile()
    profiler = recording.__enter__()
    profiler.step()
    profiler.step()
    with pytest.warns(UserWarning, match="nothing was recorded.* skips all of the 2 steps"):
        recording.__exit__(None, None, None)
    assert not folder.exists()


def test_models_spread_by_a_device_map_are_recognised():
    accelerator = Accelerator()
    model = network()
    assert not accelerator.verify_device_map(model)
    model.hf_device_map = {"a": 0, "b": "cpu"}
    assert accelerator.verify_device_map(model)


def test_a_copy_of_a_half_precision_model_runs_its_own_weights():
    accelerator = Accelerator(precision="bf16")
    model = accelerator.prepare(nn.Linear(2, 1, bias=False))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.fill_(1.0)
        copied.weight.fill_(5.0)
    assert model(torch.ones(1, 2)).item() == 2.0
    assert copied(torch.ones(1, 2)).item() == 10.0
    assert pickle.loads(pickle.dumps(model)).weight.tolist() == [[1.0, 1.0]]
    plain = accelerator.unwrap_model(copied, keep_fp32_wrapper=False)
    assert "forward" not in plain.__dict__


def test_a_prepared_optimizer_can_be_copied_and_pickled():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = network()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.param_groups[0]["lr"] == 0.1
        assert twin.gradient_state.__dict__ is accelerator.gradient_state.__dict__
        twin.step()


def test_clipping_waits_for_the_last_micro_batch():
    accelerator = Accelerator(precision="fp16", gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = model.weight.detach().clone()
    norms = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 3)).sum())
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 100.0))
            optimizer.step()
            optimizer.zero_grad()
    assert norms[0] is None
    assert norms[1].item() == pytest.approx(8**0.5)
    torch.testing.assert_close(before - model.weight, torch.ones(2, 3), rtol=1e-3, atol=1e-3)


def test_clipping_one_model_leaves_the_scaled_gradients_of_another_alone():
    accelerator = Accelerator(precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=4.0)])
    one, two = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (one, two)]
    one, two, first, second = accelerator.prepare(one, two, *optimizers)
    before = two.weight.detach().clone()
    accelerator.backward(two(torch.ones(1, 3)).sum())
    accelerator.backward(one(torch.ones(1, 3)).sum())
    accelerator.clip_grad_norm_(one.parameters(), 100.0)
    first.step()
    first.zero_grad()
    accelerator.backward(two(torch.ones(1, 3)).sum())
    second.step()
    torch.testing.assert_close(before - two.weight, torch.full((2, 3), 2.0))


def test_scaled_gradients_are_never_added_to_unscaled_ones():
    accelerator = Accelerator(precision="fp16")
    model = network()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    accelerator.backward(model(torch.ones(1, 3)).sum())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(OperationError, match="unscaled already"):
        accelerator.backward(model(torch.ones(1, 3)).sum())


def test_the_loss_scaler_forgets_the_step_that_free_memory_interrupts():
    accelerator = Accelerator(precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=4.0)])
    model = network()
    raw = torch.optim.SGD(model.parameters(), lr=1.0)

    def begin(inputs):
        prepared, optimizer = accelerator.prepare(model, raw)
        accelerator.backward(prepared(inputs).sum())
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        return optimizer

    begin(torch.full((1, 3), torch.inf))
    accelerator.free_memory()  # as after an error between clipping and the step
    raw.zero_grad()
    optimizer = begin(torch.ones(1, 3))
    optimizer.step()
    assert optimizer.step_was_skipped is False
    assert accelerator.scaler.get_scale() == 4.0


def test_several_losses_in_one_micro_batch_weigh_the_same():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = accelerator.prepare(nn.Linear(1, 1, bias=False))
    for count in (3, 1):
        with accelerator.accumulate(model, num_items=count):
            for _ in range(2):
                accelerator.backward(model(torch.ones(count, 1)).mean())
    assert model.weight.grad.item() == pytest.approx(2.0)


@pytest.mark.parametrize("number", [0, torch.tensor(0)])
def test_a_window_without_items_changes_nothing(number):
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(1, 1, bias=False))
    with accelerator.accumulate(model, num_items=number, reduction="sum"):
        accelerator.backward(model(torch.ones(1, 1)).sum() * 0)
    assert model.weight.grad.item() == 0.0


def test_item_counts_leave_other_models_alone():
    accelerator = Accelerator()
    one, other = accelerator.prepare(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    accelerator.backward(other(torch.ones(1, 1)).sum())
    with accelerator.accumulate(one, num_items=100):
        accelerator.backward(one(torch.ones(100, 1)).mean())
    assert other.weight.grad.item() == 1.0
    assert one.weight.grad.item() == pytest.approx(1.0)


def test_item_counts_do_not_overflow_half_precision():
    accelerator = Accelerator(precision="fp16")
    model = nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    for _ in range(10):
        with accelerator.accumulate(model, num_items=4096):
            accelerator.backward(model(torch.full((4096, 1), 0.1)).mean())
            optimizer.step()
            assert not accelerator.optimizer_step_was_skipped
            optimizer.zero_grad()


def test_a_batch_skipped_after_an_error_leaves_no_gradients_behind():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    try:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            raise RuntimeError("out of memory")
    except RuntimeError:
        optimizer.zero_grad()
    before = model.weight.item()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert before - model.weight.item() == pytest.approx(1.0)


def test_accumulate_inside_accumulate_is_refused():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = accelerator.prepare(network())
    with pytest.raises(ConfigurationError, match="inside accumulate"), accelerator.accumulate(model):
        accelerator.accumulate(model)


def test_a_second_accelerator_keeps_the_accumulation_settings():
    Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    )
    assert Accelerator().gradient_accumulation_steps == 4
    assert GradientState().plugin.sync_with_dataloader is False


def test_a_plateau_scheduler_takes_its_metric_once():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = accelerator.prepare(
        model, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    )
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 3)).sum())
            optimizer.step()
            scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_scheduler_needs_its_optimizer_to_be_prepared():
    accelerator = Accelerator()
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(network().parameters(), lr=1.0), 1)
    with pytest.raises(ConfigurationError, match="no optimizer is prepared"):
        accelerator.prepare(scheduler)


def test_arguments_that_cannot_be_honoured_are_refused():
    with pytest.raises(ConfigurationError, match="'nonsense' is not a type of generator"):
        Accelerator(rng_types=["nonsense"])
    PartialState()
    with pytest.raises(ConfigurationError, match="asks for a timeout of 0:00:07"):
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=7))])
    with pytest.raises(TypeError, match="DataLoaderConfiguration"):
        Accelerator(split_batches=True)


def test_the_seed_of_a_process_is_its_own_before_there_is_a_state(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29511")
    set_seed(10, device_specific=True)
    assert torch.initial_seed() == 11
