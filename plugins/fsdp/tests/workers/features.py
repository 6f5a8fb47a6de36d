"""What a sharded run can do besides training: each check fills one entry of the report."""

import copy

import torch
from shared import (
    BATCH,
    CLIP,
    LR,
    Network,
    batch,
    loss_of,
    optimizer_of,
    prepared,
    report,
    run,
    train,
    whole,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator, PartialState
from torchport.errors import TorchportError
from torchport.state import AcceleratorState
from torchport_fsdp import FullyShardedDataParallelPlugin as Fsdp
from torchport_fsdp import fsdp2_load_full_state_dict

BLOCKS = {"transformer_cls_names_to_wrap": ["Block"]}


def settings(version: int, **more) -> Fsdp:
    return Fsdp(fsdp_version=version, **{**BLOCKS, **more})


def optimizers_go_on(version: int) -> dict:
    """An optimizer that has stepped before `prepare` goes on as if nothing had happened."""
    AcceleratorState._reset_state()
    model = Network()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    for step in range(2):
        loss_of(model, step, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    plain, plain_optimizer = copy.deepcopy((model, optimizer))
    accelerator = Accelerator(strategy=settings(version))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    same = [p is q for p, q in zip(model.parameters(), _all(optimizer), strict=False)]
    train(accelerator, model, optimizer, 2, first=2)
    for step in (2, 3):  # by hand, on the batches of all processes
        losses = [loss_of(plain, step, rank) for rank in range(accelerator.num_processes)]
        (sum(losses) / len(losses)).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    mine, hand = accelerator.get_state_dict(model), plain.state_dict()
    error = max((float((mine[n] - hand[n]).abs().max()) for n in mine), default=0.0)
    held = sum(p.numel() for p in _all(optimizer) if not isinstance(p, DTensor))
    return {
        "error": error,
        "groups": [(len(group["params"]), group["lr"]) for group in optimizer.param_groups],
        "steps": sorted({float(slots["step"]) for slots in optimizer.optimizer.state.values()}),
        "in the model": len(same) > 0
        and {id(p) for p in model.parameters()} == {id(p) for p in _all(optimizer)},
        "plain elements": held,
    }


def _all(optimizer) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def separate_calls() -> list[list[float]]:
    """Models and optimizers prepared in calls of their own, in either order."""
    results = []
    for model_first in (True, False):
        AcceleratorState._reset_state()
        accelerator = Accelerator(strategy=settings(2))
        model = Network()
        optimizer = optimizer_of(model)
        if model_first:
            model = accelerator.prepare(model)
            optimizer = accelerator.prepare(optimizer)
        else:
            optimizer = accelerator.prepare(optimizer)
            model = accelerator.prepare(model)
        results.append(train(accelerator, model, optimizer, clip=CLIP))
    return results


def one_rank_loads(version: int) -> dict:
    """Only rank 0 has weights; the others make the model without memory. Tied weights stay tied."""

    class Tied(Network):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.out = nn.Linear(10, 13, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return super().forward(tokens) + self.out(self.embed(tokens).mean(1))[:, :3]

    AcceleratorState._reset_state()
    accelerator = Accelerator(strategy=settings(version, cpu_ram_efficient_loading=True))
    with accelerator.model_init_context():
        model = Tied(seed=accelerator.process_index)
    meta = all(parameter.is_meta for parameter in model.parameters())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR))
    mine = train(accelerator, model, optimizer, 3)
    AcceleratorState._reset_state()
    accelerator = Accelerator(strategy="ddp")
    model = Tied(seed=0)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR))
    return {"meta": meta, "losses": mine, "ddp": train(accelerator, model, optimizer, 3)}


def different_seeds(version: int) -> list[float]:
    """Every process initialises differently; all go on with what rank 0 has."""
    accelerator, model, optimizer = prepared(
        settings(version), model=Network(seed=PartialState().process_index)
    )
    return train(accelerator, model, optimizer, 3)


def whole_parameters(version: int) -> dict:
    accelerator, model, _ = prepared(settings(version))
    with accelerator.full_parameters(model):
        shapes = [list(parameter.shape) for parameter in model.parameters()]
        plain = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with accelerator.full_parameters(model, writeback=True), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    values = {v for value in accelerator.get_state_dict(model).values() for v in value.flatten().tolist()}
    return {
        "shapes": shapes == [list(p.shape) for p in Network().parameters()],
        "plain": plain,
        "values": sorted(values),
    }


def states_of(version: int) -> dict:
    accelerator, model, optimizer = prepared(settings(version))
    train(accelerator, model, optimizer, 1)
    state = accelerator.get_state_dict(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    results = {"names": list(state), "devices": sorted({str(v.device) for v in state.values()})}
    if version == 2:
        fsdp2_load_full_state_dict(accelerator, model, state)
        again = accelerator.get_state_dict(model)
        results["loaded"] = all(torch.equal(state[name], again[name]) for name in state)
    return results


def norms(version: int) -> dict:
    """The norm that clipping returns, and the gradients that it leaves, are those of the whole model."""
    results = {}
    for norm_type in (2.0, 1.0, float("inf")):
        accelerator, model, _ = prepared(
            settings(version, ignored_params=r"head\.bias" if version == 2 else None)
        )
        accelerator.backward(loss_of(model, 0, accelerator.process_index))
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.01, norm_type)
        after = accelerator.clip_grad_norm_(model.parameters(), 1e9, norm_type)
        plain = Network()
        losses = [loss_of(plain, 0, rank) for rank in range(accelerator.num_processes)]
        (sum(losses) / len(losses)).backward()
        hand = nn.utils.clip_grad_norm_(plain.parameters(), 0.01, norm_type)
        results[str(norm_type)] = [float(norm), float(hand), float(after)]
    accelerator.clip_grad_value_(model.parameters(), 1e-9)
    largest = max(float(local.abs().max()) for local in map(_local, model.parameters()) if local.numel())
    results["value"] = largest
    return results


def _local(parameter) -> torch.Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.empty(0)
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def overflow(version: int) -> dict:
    """A gradient that overflows on one process only: all skip the step."""
    accelerator, model, optimizer = prepared(settings(version), precision="fp16", optimizer="sgd")
    skipped = []
    for step in range(2):
        loss = loss_of(model, step, accelerator.process_index)
        bad = step == 0 and accelerator.process_index == 1
        accelerator.backward(loss * float("inf") if bad else loss)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
    return {"skipped": skipped, "scale": accelerator.scaler.get_scale()}


def tokens_weigh_the_same() -> list[float]:
    """Uneven numbers of items over processes and micro-batches give the gradient of one big batch."""
    accelerator, model, _ = prepared(settings(2), accumulate=2)
    rank, counts = accelerator.process_index, [[3, 1], [2, 4]]
    for step in range(2):
        tokens, labels = batch(step, rank)
        count = counts[rank][step]
        with accelerator.accumulate(model, num_items=count):
            loss = nn.functional.cross_entropy(model(tokens[:count]), labels[:count])
            accelerator.backward(loss)
    plain = Network()
    pieces = [(s, r) for s in range(2) for r in range(2)]
    tokens = torch.cat([batch(s, r)[0][: counts[r][s]] for s, r in pieces])
    labels = torch.cat([batch(s, r)[1][: counts[r][s]] for s, r in pieces])
    nn.functional.cross_entropy(plain(tokens), labels).backward()
    return [
        float((parameter.grad.full_tensor() - hand.grad).abs().max())
        for parameter, hand in zip(model.parameters(), plain.parameters(), strict=True)
    ]


def uneven_batches(strategy, accumulate: int) -> dict:
    """Rank 0 has three batches and rank 1 two: inside `join_uneven_inputs` all of them count."""
    accelerator, model, optimizer = prepared(strategy, accumulate=accumulate, optimizer="sgd")
    data = [batch(step, 7) for step in range(5)]
    tokens, labels = torch.cat([t for t, _ in data]), torch.cat([n for _, n in data])
    loader = accelerator.prepare(DataLoader(TensorDataset(tokens, labels), batch_size=BATCH))
    seen, ends = 0, []
    with accelerator.join_uneven_inputs([model], even_batches=False):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            seen += 1
            ends.append(accelerator.gradient_state.end_of_dataloader)
    return {"parameters": whole(accelerator, model), "seen": seen, "ends": ends}


def uneven_by_hand(accumulate: int) -> dict:
    """The same in one process: a missing batch adds nothing, and counts in the mean over processes."""
    plain = Network()
    optimizer = optimizer_of(plain, "sgd")
    rounds = [[0, 1], [2, 3], [4]]
    for start in range(0, 3, accumulate):
        window = rounds[start : start + accumulate]
        for members in window:
            for index in members:
                tokens, labels = batch(index, 7)
                loss = nn.functional.cross_entropy(plain(tokens), labels)
                (loss / 2 / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.tolist() for name, value in plain.state_dict().items()}


def triggered() -> bool:
    """A forward under `no_sync` whose backward exchanges gradients all the same."""
    accelerator, model, _ = prepared(settings(2))
    with accelerator.no_sync(model):
        loss = loss_of(model, 0, accelerator.process_index)
    with accelerator.no_sync(model), accelerator.trigger_sync_in_backward(model):
        accelerator.backward(loss)
    return all(parameter.grad is not None for parameter in model.parameters())


def compiled() -> list[float]:
    """Blocks compiled in place, then sharded."""
    AcceleratorState._reset_state()
    model = Network()
    for block in model.blocks:
        block.compile(backend="eager")
    accelerator, model, optimizer = prepared(settings(2), model=model)
    losses = train(accelerator, model, optimizer, clip=CLIP)
    return [losses, list(accelerator.get_state_dict(model))]


def wrapped_by_compile() -> list[float]:
    """A model inside what `torch.compile(model)` returns."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(strategy=settings(2))
    model = Network()
    optimizer = optimizer_of(model)
    model, optimizer = accelerator.prepare(torch.compile(model, backend="eager"), optimizer)
    losses = train(accelerator, model, optimizer, clip=CLIP)
    return [losses, list(accelerator.get_state_dict(model))]


def low_precision() -> dict:
    """Trainable 16-bit parameters are held in float32 under mixed precision, and left alone without."""
    results = {}
    for precision in ("bf16", "no"):
        _, model, _ = prepared(settings(2), precision=precision, model=Network().bfloat16())
        results[precision] = sorted({str(p.dtype) for p in model.parameters()})
    return results


def refusals() -> dict:
    """What cannot work says so before anything is exchanged."""
    found = {}

    def refused(name: str, action) -> None:
        AcceleratorState._reset_state()
        try:
            action()
            found[name] = ""
        except TorchportError as error:
            found[name] = str(error)

    def shared():
        model = Network()
        model.blocks[0].up.weight = model.blocks[1].up.weight
        prepared(settings(2), model=model)

    refused("shared", shared)
    refused("class", lambda: prepared(Fsdp(transformer_cls_names_to_wrap=["Blok"])))
    refused("no class", lambda: prepared(Fsdp(auto_wrap_policy="TRANSFORMER_BASED_WRAP")))
    refused("activations", lambda: prepared(Fsdp(activation_checkpointing=True)))
    refused("pattern", lambda: prepared(settings(2, ignored_params="hed.*")))
    refused("group", lambda: prepared(settings(2, sharding_strategy="HYBRID_SHARD", shard_group_size=3)))
    refused("meta", lambda: prepared(settings(2), model=Network().to("meta")))
    refused("flat", lambda: prepared(settings(1, use_orig_params=False)))
    return found


def main() -> None:
    results = {"alone": run(settings(2), clip=CLIP)}
    for version in (1, 2):
        results[f"{version} optimizers"] = optimizers_go_on(version)
        results[f"{version} one rank loads"] = one_rank_loads(version)
        results[f"{version} seeds"] = different_seeds(version)
        results[f"{version} whole"] = whole_parameters(version)
        results[f"{version} states"] = states_of(version)
        results[f"{version} norms"] = norms(version)
        results[f"{version} overflow"] = overflow(version)
        for accumulate in (1, 2):
            results[f"{version} uneven {accumulate}"] = uneven_batches(settings(version), accumulate)
    for accumulate in (1, 2):
        results[f"hand uneven {accumulate}"] = uneven_by_hand(accumulate)
    results["same seeds"] = run(settings(2), steps=3)
    for check in (
        separate_calls,
        tokens_weigh_the_same,
        triggered,
        compiled,
        wrapped_by_compile,
        low_precision,
    ):
        results[check.__name__] = check()
    results["refusals"] = refusals()
    report(results)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
