"""Optimizers that want more than `step`: schedule-free ones, and those that step inside the backward."""

import pytest
import schedulefree
import torch
from torch import nn
from torchport import Accelerator
from torchport.errors import ConfigurationError, UnsupportedOperationError
from torchport.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def inputs(step: int) -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3) / 10 + step


def test_a_schedule_free_optimizer_trains_and_switches_modes_as_by_hand(tmp_path):
    model = network()
    by_hand = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05, warmup_steps=2)
    by_hand.train()
    for step in range(4):
        model(inputs(step)).square().mean().backward()
        by_hand.step()
        by_hand.zero_grad()
    trained = [p.clone() for p in model.parameters()]
    by_hand.eval()
    evaluated = [p.clone() for p in model.parameters()]
    assert not torch.equal(trained[0], evaluated[0])

    accelerator = Accelerator()
    prepared = network()
    optimizer = schedulefree.AdamWScheduleFree(prepared.parameters(), lr=0.05, warmup_steps=2)
    prepared, optimizer = accelerator.prepare(prepared, optimizer)
    optimizer.train()
    for step in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(inputs(step)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(prepared.parameters(), trained, strict=True))
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(prepared.parameters(), evaluated, strict=True))
    accelerator.save_state(tmp_path / "checkpoint")
    optimizer.train()
    accelerator.load_state(tmp_path / "checkpoint")
    assert optimizer.param_groups[0]["train_mode"] is False
    assert all(torch.equal(p, q) for p, q in zip(prepared.parameters(), evaluated, strict=True))


class Fused(torch.optim.Optimizer):
    """Steps inside the backward, by the interface of `lomo_optim.Lomo`: `fused_backward(loss, lr)`, and no `step`."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})

    def fused_backward(self, loss: torch.Tensor, lr: float) -> None:
        loss.backward()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(parameter.grad, alpha=-lr)
                    parameter.grad = None


@pytest.mark.parametrize("name", ["backward", "lomo_backward"])
def test_an_optimizer_that_steps_in_the_backward_is_given_the_loss_and_the_rate(name):
    reference = network()
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
    accelerator = Accelerator()
    model = network()
    model, optimizer = accelerator.prepare(model, Fused(model, lr=0.1))
    for step in range(3):
        reference(inputs(step)).square().mean().backward()
        sgd.step()
        sgd.zero_grad()
        getattr(accelerator, name)(model(inputs(step)).square().mean(), learning_rate=0.1)
        optimizer.step()
        assert not optimizer.step_was_skipped
        optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_without_a_learning_rate_the_backward_is_a_plain_one():
    accelerator = Accelerator()
    model = network()
    model, _ = accelerator.prepare(model, Fused(model, lr=0.1))
    accelerator.backward(model(inputs(0)).sum())
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "learning_rate", "error", "message"),
    [
        ({}, None, ConfigurationError, "needs the learning rate there"),
        ({"mixed_precision": "fp16"}, 0.1, UnsupportedOperationError, "the loss is scaled"),
        ({"gradient_accumulation_steps": 2}, 0.1, UnsupportedOperationError, "nothing to accumulate"),
    ],
)
def test_what_a_fused_backward_cannot_do_is_refused(settings, learning_rate, error, message):
    accelerator = Accelerator(**settings)
    model = network()
    model, _ = accelerator.prepare(model, Fused(model, lr=0.1))
    with pytest.raises(error, match=message):
        accelerator.lomo_backward(model(inputs(0)).sum(), learning_rate)


def test_lomo_backward_without_such_an_optimizer_says_what_to_install():
    accelerator = Accelerator()
    model = network()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigurationError, match="pip install lomo-optim"):
        accelerator.lomo_backward(model(inputs(0)).sum(), 0.1)
