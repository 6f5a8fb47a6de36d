"""What the workers share: a small model, its data, and a training loop."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchport import Accelerator
from torchport.state import AcceleratorState

BATCH, STEPS, CLIP = 4, 2, 0.5


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4))


def make_data(samples=48):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 16, generator=generator), torch.randint(0, 4, (samples,), generator=generator)
    )


def new(plugin=None, **options):
    """A new run in this process, with an accelerator of its own."""
    AcceleratorState._reset_state(True)
    return Accelerator(**({"deepspeed_plugin": plugin} if plugin else {}), **options)


def prepared(accelerator, samples=48, batch=BATCH):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return accelerator.prepare(model, optimizer, DataLoader(make_data(samples), batch))


def one(accelerator, model, optimizer, inputs, labels, clip):
    loss = cross_entropy(model(inputs), labels)
    accelerator.backward(loss)
    if clip:
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(accelerator, model, optimizer, loader, *, inside=True, clip=True):
    """One epoch, in or outside of `accumulate`; the loss of each micro-batch of this process."""
    losses = []
    for inputs, labels in loader:
        if inside:
            with accelerator.accumulate(model):
                losses.append(one(accelerator, model, optimizer, inputs, labels, clip))
        else:
            losses.append(one(accelerator, model, optimizer, inputs, labels, clip))
    return losses


def whole(accelerator, model):
    """The sum of the sizes of all weights, the same on every process."""
    with accelerator._contents.strategy.full_parameters(model):
        module = accelerator.unwrap_model(model)
        return float(sum(p.detach().double().abs().sum() for p in module.parameters()))


def momenta(accelerator, model, optimizer):
    """The sum of the sizes of all of Adam's first moments, the same on every process."""
    state = accelerator._contents.strategy.optimizer_state_dict(model, optimizer.optimizer)["state"]
    assert len(state) == 4
    return float(sum(own["exp_avg"].double().abs().sum() for own in state.values()))
