"""Level L1 for precisions: models compute in the format while they are bound to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from torchport.config.kwargs import GradScalerKwargs
from torchport.plan.selection import Request
from torchport.plugin.context import RunContext
from torchport.plugin.precision import Precision
from torchport.runtime import Runtime
from torchport.state import PartialState
from torchport.testing.checks import Check, Checks, NotClaimed, Place, Subject, require
from torchport.testing.claims import training_unclaimed
from torchport.testing.training import network


@dataclass
class Format:
    """A precision in an open run.

    Attributes:
        precision: The precision.
        context: The run.
    """

    precision: Precision
    context: RunContext

    def model(self) -> nn.Module:
        """Return a model on the device."""
        return network().to(self.context.device)

    def inputs(self) -> torch.Tensor:
        """Return sixteen rows."""
        generator = torch.Generator().manual_seed(5)
        return torch.randn(16, 16, generator=generator).to(self.context.device)


@contextmanager
def format_bench(subject: Subject, place: Place) -> Iterator[Format]:
    """Open a run in the precision."""
    PartialState._reset_state()
    arguments = {"backend": subject.backend, "precision": subject.name}
    runtime = Runtime.open(Request(arguments=arguments, asked_by="the conformance kit"))
    precision = runtime.precision()
    context = runtime.context(precision, 1, (GradScalerKwargs(init_scale=1024.0),))
    precision.open(context)
    try:
        yield Format(precision, context)
    finally:
        PartialState._reset_state()


def _unclaimed(subject: Subject) -> str:
    return training_unclaimed(subject.strategies[0], subject.name, 1)(subject)


_checks = Checks("L1", format_bench, unclaimed=_unclaimed)


def checks(subject: Subject) -> list[Check]:
    """Return the checks of this level."""
    return list(_checks)


@_checks("format.context", "inside the forward context, products are computed in the compute dtype")
def context_computes_in_the_format(bench: Format) -> None:
    """Multiply a number that the format rounds."""
    dtype = bench.precision.compute_dtype
    if dtype is None:
        raise NotClaimed("it names no compute_dtype: tensors keep their own")
    device = bench.context.device
    fine = torch.full((16, 16), 1.0 + 2.0**-12, device=device)
    with bench.precision.forward_context(bench.context)():
        product = fine @ torch.eye(16, device=device)
    require(product.dtype == dtype, f"the product has dtype {product.dtype} instead of {dtype}")
    rounded = torch.tensor(1.0 + 2.0**-12).to(dtype).float().item()
    require(product.float().cpu().eq(rounded).all().item(), f"the product was not computed in {dtype}")


@_checks("format.model-computes-in-it", "a model that is bound to the format rounds as the format does")
def model_computes_in_the_format(bench: Format) -> None:
    """Compare the outputs of the model with those in float32: equal where the format is none, different where it is."""
    model, inputs = bench.model(), bench.inputs()
    plain = model(inputs).detach().clone()
    bound = bench.precision.apply(model, bench.context)
    outputs = bound(inputs).detach().float()
    dtype = bench.precision.compute_dtype
    if dtype in (None, torch.float32):
        raise NotClaimed("it names no compute_dtype by which it could be told")
    require(not torch.equal(outputs, plain), f"the outputs are those of float32, not of {dtype}")
    difference = ((outputs - plain).abs().max() / plain.abs().max()).item()
    require(difference < 0.25, f"the outputs differ from those in float32 by {difference:.1e}")


@_checks("format.gradients", "every parameter of a bound model gets a gradient, finite and not zero")
def gradients_come_through(bench: Format) -> None:
    """Go backward, with the loss scale where there is one."""
    model = bench.precision.apply(bench.model(), bench.context)
    loss = model(bench.inputs()).float().square().mean()
    scaled = bench.precision.scaler.scale(loss) if bench.precision.scaler is not None else loss
    torch.autograd.backward(scaled)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        good = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.abs().sum() > 0)
        require(good, f"the gradient of {name} is {'missing' if gradient is None else 'zero or not finite'}")


@_checks("format.restore", "after restore(), the model has its own names, values and outputs again")
def restore_undoes_apply(bench: Format) -> None:
    """Bind, run, restore; compare with the model as it was."""
    model, inputs = bench.model(), bench.inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(inputs).detach().clone()
    bound = bench.precision.apply(model, bench.context)
    bound(inputs)
    bench.precision.restore(bound)
    after = bound.state_dict()
    require(
        after.keys() == before.keys(), f"the state has the names {sorted(after)} instead of {sorted(before)}"
    )
    changed = [name for name in before if not torch.equal(after[name].float(), before[name])]
    require(not changed, f"the values of {changed} have changed")
    require(torch.equal(bound(inputs).detach().float(), plain), "its outputs are not those it had before")


@_checks("format.state", "what a checkpoint must hold of it can be saved as plain values, and restored")
def state_is_restored(bench: Format) -> None:
    """Save, change the loss scale, load."""
    state = bench.precision.state_dict()
    scaler = bench.precision.scaler
    if not state and scaler is None:
        raise NotClaimed("it has no state")
    require(state, "it has a loss scaler, whose state it does not give out")
    kept = dict(state)
    if scaler is not None:
        scaler.update(3.0)
    bench.precision.load_state_dict(kept)
    found = bench.precision.state_dict()
    require(found == kept, f"restored {found} instead of {kept}")
