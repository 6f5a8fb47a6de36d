"""What one process does with four devices of 64 MiB each."""

import copy
import os

import torch
from checks import run_checks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, find_executable_batch_size, set_seed
from torchport.errors import BatchSizeError, TorchportError
from torchport.runtime import Runtime
from torchport.state import AcceleratorState

MIB = 2**20


def raised(function, *arguments, **options) -> Exception:
    try:
        function(*arguments, **options)
    except Exception as error:
        return error
    raise AssertionError("it did not raise")


def check_it_is_chosen_where_devices_are_asked_for(folder):
    accelerator = Accelerator()
    assert (accelerator.plan.backend, str(accelerator.device)) == ("sim", "sim:0")
    assert accelerator.plan["backend"].source.startswith("automatic")
    assert torch.sim.device_count() == 4
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert str(accelerator.distributed_type) == "NO"


def check_a_process_without_a_device_of_its_own_is_refused(folder):
    Accelerator()
    error = raised(Runtime.current.backend.device, 4)
    assert isinstance(error, TorchportError)
    assert "the process of local rank 4 has no device of its own" in str(error)
    assert "4 visible devices of the backend 'sim'" in str(error)


def check_models_and_optimizer_states_are_on_the_device(folder):
    accelerator = Accelerator()
    model = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.ones(2, 4, device=accelerator.device)).sum())
    optimizer.step()
    state = optimizer.state[model.weight]
    assert {str(t.device) for t in (model.weight, model.weight.grad, state["exp_avg"])} == {"sim:0"}


def check_tensors_go_from_device_to_device_and_never_by_themselves(folder):
    values = torch.arange(6.0).view(2, 3)
    one = values.to("sim:1")
    two = one.to("sim:2")
    assert (str(one.device), str(two.device)) == ("sim:1", "sim:2")
    two += 1
    assert torch.equal(one.cpu(), values)
    assert torch.equal(two.cpu(), values + 1)
    assert "at least two devices, sim:1 and sim:2!" in str(raised(torch.add, one, two))
    assert "at least two devices, sim:1 and cpu!" in str(raised(torch.add, one, values))
    assert torch.equal((one + torch.tensor(1.0)).cpu(), values + 1)  # numbers may come from the host
    assert torch.equal(one[torch.tensor([1])].cpu(), values[1:])  # so may indices
    assert "sim has no device 4: it has 4" in str(raised(torch.ones, 1, device="sim:4"))
    with torch.sim.device(3):
        assert str(torch.ones(1, device="sim").device) == "sim:3"
    assert torch.sim.current_device() == 0


def check_tied_weights_stay_tied(folder):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.to("sim:1")
    assert model[0].weight is model[1].weight


def check_memory_is_counted_for_each_device(folder):
    Accelerator()
    before = torch.sim.memory_allocated(1)
    torch.accelerator.reset_peak_memory_stats(1)
    tensor = torch.empty(MIB, dtype=torch.uint8, device="sim:1")
    view = tensor[10:]
    assert torch.sim.memory_allocated(1) - before == MIB
    free, total = torch.sim.mem_get_info(1)
    assert (total, free) == (64 * MIB, 64 * MIB - before - MIB)
    assert Runtime.current.backend.memory_info(torch.device("sim:1")) == (free, total)
    result = tensor + view[0]  # the result of an operator is counted too
    assert torch.sim.memory_allocated(1) - before == 2 * MIB
    del tensor, view, result
    assert torch.sim.memory_allocated(1) == before
    assert torch.sim.max_memory_allocated(1) - before >= 2 * MIB


def check_memory_runs_out_at_the_limit_and_not_before(folder):
    exactly = torch.empty(64 * MIB, dtype=torch.uint8, device="sim:2")
    error = raised(torch.empty, 1, dtype=torch.uint8, device="sim:2")
    assert isinstance(error, torch.OutOfMemoryError)
    assert "Tried to allocate 1 bytes on device 2, whose capacity is 64 MiB, of which 64 MiB" in str(error)
    torch.empty(1, device="sim:3")  # another device has its own
    del exactly
    torch.empty(1, device="sim:2")
    assert torch.sim.memory_stats(2)["num_ooms"] == 1
    half = torch.ones(40 * MIB, dtype=torch.uint8, device="sim:2")
    assert isinstance(raised(torch.add, half, 1), torch.OutOfMemoryError)


def check_find_executable_batch_size_recovers_from_real_exhaustion(folder):
    accelerator = Accelerator()
    tried = []

    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size):
        accelerator.free_memory()
        tried.append(batch_size)
        model = accelerator.prepare(nn.Linear(64, 64))
        batch = torch.ones(batch_size, MIB, dtype=torch.uint8, device=accelerator.device)
        return model, batch.shape[0]

    model, found = train()
    assert (tried, found) == ([128, 64, 32], 32)
    del model
    assert isinstance(
        raised(find_executable_batch_size(lambda n: torch.empty(128 * MIB, device="sim"))), BatchSizeError
    )


def check_random_numbers_belong_to_their_device(folder):
    Accelerator()
    set_seed(7)
    host = torch.get_rng_state()
    first = torch.rand(3, device="sim:1")
    assert torch.equal(torch.get_rng_state(), host)
    state = torch.sim.get_rng_state(1)
    second = torch.rand(3, device="sim:1")
    assert not torch.equal(first, second)
    torch.sim.set_rng_state(state, 1)
    assert torch.equal(torch.rand(3, device="sim:1"), second)
    assert torch.equal(torch.rand(3, device="sim:2").cpu(), first.cpu())  # seeded alike, drawn on their own
    torch.manual_seed(3)
    dropped = torch.native_dropout(torch.ones(50, device="sim"), 0.5, True)[0]
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)  # an operator without a generator drew from the device's
    assert torch.equal(torch.native_dropout(torch.ones(50, device="sim"), 0.5, True)[0], dropped)
    own = torch.Generator("sim:1").manual_seed(1)
    assert torch.equal(
        torch.randn(4, device="sim:1", generator=own).cpu(),
        torch.randn(4, generator=torch.Generator().manual_seed(1)),
    )
    assert "Expected" in str(raised(torch.randn, 4, device="sim", generator=torch.Generator()))


def check_batches_are_copied_ahead_on_a_stream_of_their_own_from_pinned_memory(folder):
    accelerator = Accelerator()
    backend, streams, pinned = Runtime.current.backend, [], []
    use, pin = backend.use_stream, backend.pin

    def watched(stream):
        streams.append(stream.stream_id)
        return use(stream)

    def watched_pin(tensor):
        made = pin(tensor)
        pinned.append(made.is_pinned())
        return made

    backend.use_stream, backend.pin = watched, watched_pin
    data = torch.arange(12.0).view(6, 2)
    loader = accelerator.prepare(DataLoader(TensorDataset(data), batch_size=2))
    current = torch.sim.current_stream().stream_id
    batches = []
    for (batch,) in loader:
        batches.append(batch)
        assert len(streams) == min(len(batches) + 1, 3)  # one ahead
    assert {str(batch.device) for batch in batches} == {"sim:0"}
    assert torch.equal(torch.cat(batches).cpu(), data)
    assert current == 0
    assert 0 not in streams
    assert pinned == [True] * 3
    there = TensorDataset(data.to("sim:0"), data.to("sim:1"), data)
    loader = accelerator.prepare(DataLoader(there, batch_size=2))
    parts = [torch.cat(part) for part in zip(*loader, strict=True)]
    assert {str(part.device) for part in parts} == {"sim:0"}
    assert all(torch.equal(part.cpu(), data) for part in parts)
    assert pinned == [True] * 6  # what is in host memory
    del backend.use_stream, backend.pin


def train(device: torch.device, precision: str) -> list[float]:
    accelerator = Accelerator(mixed_precision=precision) if device.type == "sim" else None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs, labels = torch.randn(8, 1, 6, 6).to(device), torch.arange(8).remainder(3).to(device)
    losses = []
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[precision]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    for _ in range(4):
        if accelerator is not None:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
        else:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs.float(), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_losses_are_those_of_the_host_in_every_precision(folder):
    for precision, bits in (("no", 20), ("bf16", 7), ("fp16", 9)):
        AcceleratorState._reset_state()
        here, there = train(torch.device("cpu"), precision), train(torch.device("sim"), precision)
        worst = max(abs(a - b) / abs(a) for a, b in zip(here, there, strict=True))
        assert worst < 2.0**-bits, (precision, here, there)
        assert here[-1] < here[0]
    AcceleratorState._reset_state()


def check_recurrent_layers_have_the_hosts_outputs_and_gradients(folder):
    for kind in (nn.LSTM, nn.GRU):
        host = kind(3, 5, num_layers=2)
        device = copy.deepcopy(host).to("sim")
        inputs = torch.randn(4, 2, 3)
        outputs = host(inputs)[0], device(inputs.to("sim"))[0]
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(outputs[1].cpu(), outputs[0], rtol=1e-5, atol=1e-6)
        for a, b in zip(host.parameters(), device.parameters(), strict=True):
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-4, atol=1e-5)


def check_autocast_takes_pytorchs_lists(folder):
    a = torch.randn(4, 4, device="sim")
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert (a @ a).exp().dtype == torch.float32
        assert (a @ a).sum().dtype == torch.float32
        assert torch.softmax(a @ a, 0).dtype == torch.float32
        assert torch.addcmul(a, (a @ a), a).dtype == torch.float32  # the widest that it gets
        assert torch.cat([a @ a, a]).dtype == torch.float32
        error = raised(nn.functional.binary_cross_entropy, a.sigmoid(), a.sigmoid())
        assert "unsafe to autocast" in str(error)
    assert (a @ a).dtype == torch.float32


def check_models_compile_without_generated_code(folder):
    accelerator = Accelerator(dynamo_backend="aot_eager")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    expected = copy.deepcopy(model)(torch.ones(2, 4))
    torch.testing.assert_close(accelerator.prepare(model)(torch.ones(2, 4, device="sim")).cpu(), expected)
    AcceleratorState._reset_state()


def check_a_forked_process_is_told_why_it_cannot_use_the_devices(folder):
    torch.ones(1, device="sim")
    child = os.fork()
    if child == 0:
        try:
            torch.ones(1, device="sim")
        except RuntimeError as error:
            (folder / "child").write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)
    assert "Cannot re-initialize sim in forked subprocess" in (folder / "child").read_text()


def check_deepspeed_is_refused_with_its_reason(folder):
    error = raised(Accelerator, strategy="deepspeed")
    assert isinstance(error, TorchportError)
    assert "DeepSpeed works on" in str(error)
    assert "sim" in str(error)
    AcceleratorState._reset_state()


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = nn.Linear(3, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    accelerator.backward(model(torch.ones(2, 3, device=accelerator.device)).square().sum())
    optimizer.step()
    optimizer.zero_grad()
    return model.weight.detach().cpu().clone()


def check_checkpoints_go_from_the_device_to_the_host_and_back(folder):
    for first, second in (("sim", "cpu"), ("cpu", "sim")):
        AcceleratorState._reset_state()
        saving = Accelerator(backend=first)
        model, optimizer = saving.prepare(*small())
        step(saving, model, optimizer)
        saving.save_state(folder / first)
        expected = step(saving, model, optimizer)
        AcceleratorState._reset_state()
        loading = Accelerator(backend=second)
        model, optimizer = loading.prepare(*small())
        loading.load_state(folder / first)
        assert model.weight.device.type == optimizer.state[model.weight]["exp_avg"].device.type == second
        torch.testing.assert_close(step(loading, model, optimizer), expected, rtol=1e-6, atol=1e-7)
    AcceleratorState._reset_state()


def check_files_load_where_their_map_says(folder):
    torch.save({"weight": torch.arange(3.0, device="sim:2")}, folder / "file")
    places = {None: "sim:2", "cpu": "cpu", "sim:1": "sim:1", torch.device("sim", 3): "sim:3"}
    for place, device in places.items():
        loaded = torch.load(folder / "file", map_location=place)["weight"]
        assert str(loaded.device) == device
        assert loaded.tolist() == [0, 1, 2]
    torch.save({"weight": torch.arange(3.0)}, folder / "host")
    assert str(torch.load(folder / "host", map_location="sim:1")["weight"].device) == "sim:1"


if __name__ == "__main__":
    run_checks(dict(globals()))
