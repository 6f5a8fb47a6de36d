"""Checkpoints and processes: saved by several, killed at any moment, loaded by another number of them."""

import hashlib
import json

import pytest
import torch
from torch import nn
from torchport.checkpoint.reshard import load_scheduler
from torchport.state import GradientState
from torchport.training.scheduler import AcceleratedScheduler

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_in_the_background_fails_on_all_ranks_alike_and_nobody_waits_for_the_dead(
    run_worker, launch, victim
):
    (told,) = run_worker(launch(2), "background.py", str(victim))
    assert "error" not in told, told.get("error")
    problem, found, reason = told["failed"].split("\n")
    assert problem.endswith("/0 could not be saved")
    assert (
        found
        == "  found:  rank 1 could not write: OSError: [Errno 5] Input/output error: 'random_states_1.pkl'"
    )
    assert reason.startswith("  reason: the older checkpoint")
    assert reason.endswith("/0 is still whole")
    assert told["left"] == []
    if victim == 1:
        assert "rank 1 has ended, or has not been heard of for 3 seconds" in told["lost"]
        assert told["hidden"] == []
    else:
        assert "rank 0 has ended" in told["lost"]
        assert told["hidden"] == [".0.writing"]  # whose lock is free: the next save takes it away


def uninterrupted(steps, batch_size):
    """The losses of the same training, written by hand."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7)
    losses, rates = [], []
    for step in range(steps):
        inputs = torch.randn(batch_size, 5, generator=torch.Generator().manual_seed(100 + step))
        loss = nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True).sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
    return losses, rates


def test_losses_and_rates_go_on_when_the_number_of_processes_changes(run_worker, launch, tmp_path):
    project, parts = tmp_path / "project", []
    for number, processes in enumerate((2, 1, 3, 2)):
        command = launch(processes, "--resume", "auto")
        parts.append(run_worker(command, "reshard.py", str(project), str(4 * number), str(4 * number + 4)))
    losses, rates = uninterrupted(16, 12)
    found = [loss for part in parts for loss in part[0]["losses"]]
    assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < 1e-6
    for rank in range(2):
        assert [rate for part in parts for rate in part[rank % len(part)]["rates"]] == pytest.approx(
            rates, abs=1e-12
        )
    others = [rate for part in parts for rate in part[0]["others"]]
    assert others == pytest.approx([1 - (n + 1) / 16 for n in range(16)], abs=1e-12)
    assert parts[0][0]["resumed"] is None
    resumed = [{rank["resumed"] for rank in part} for part in parts[1:]]
    assert resumed == [{str(project / "checkpoints" / f"checkpoint_{n}")} for n in range(3)]
    drawn, derived = random_numbers()
    assert [[rank["chance"] for rank in part] for part in parts[:3]] == [
        [drawn[0], drawn[0]], [drawn[1]], [drawn[2], *derived],
    ]  # fmt: skip
    assert parts[3][0]["chance"] == drawn[3]


def random_numbers():
    """What rank 0 draws, once in each part, and what ranks 1 and 2 draw first where only rank 0 was saved."""
    torch.manual_seed(3)
    nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    drawn = [torch.rand(1).item() for _ in range(2)]
    saved = torch.get_rng_state()
    drawn += [torch.rand(1).item() for _ in range(2)]
    derived = []
    for rank in (1, 2):
        digest = hashlib.sha256(saved.numpy().tobytes() + rank.to_bytes(8, "little")).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        derived.append(torch.rand(1).item())
    return drawn, derived


def wrapped(kind, processes, **settings):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    return AcceleratedScheduler(kind(optimizer, **settings), [], GradientState(), steps_per_update=processes)


@pytest.mark.parametrize(
    ("before", "after", "batches", "steps"),
    [
        (2, 3, (12, 12), 2),  # the global batch stays: a step keeps its number of samples
        (2, 4, (8, 16), 4),  # the batch of a process stays: more steps for each update
        (4, 1, (16, 4), 1),
        (1, 1, (12, 24), 2),
    ],
)
def test_a_schedule_keeps_its_place_in_samples(before, after, batches, steps):
    saved = wrapped(torch.optim.lr_scheduler.StepLR, before, step_size=10)
    for _ in range(4):
        saved.step()
    facts = {"scheduler_steps": [before], "total_batch_size": batches[0]}
    loaded = wrapped(torch.optim.lr_scheduler.StepLR, after, step_size=7)
    load_scheduler(loaded, saved.state_dict(), 0, facts, batches[1])
    assert (loaded.steps_per_update, loaded.scheduler.last_epoch) == (steps, 4 * before)
    assert loaded.scheduler.step_size == 10


def test_a_schedule_that_cannot_keep_its_place_says_so():
    saved = wrapped(torch.optim.lr_scheduler.StepLR, 1, step_size=10)
    loaded = wrapped(torch.optim.lr_scheduler.StepLR, 1, step_size=10)
    with pytest.warns(UserWarning, match="1 steps for each update, though 1.5 would cover as many samples"):
        load_scheduler(loaded, saved.state_dict(), 0, {"scheduler_steps": [1], "total_batch_size": 8}, 12)


@pytest.mark.parametrize(("scaled", "position", "steps"), [(True, 12, 3), (False, 8, 2)])
def test_a_schedule_of_the_script_is_followed_where_its_rates_say(scaled, position, steps):
    kind = torch.optim.lr_scheduler.LambdaLR
    saved = wrapped(kind, 2, lr_lambda=lambda n: 1 - n / 32)
    for _ in range(4):
        saved.step()
    loaded = wrapped(kind, 3, lr_lambda=lambda n: 1 - n / (48 if scaled else 32))
    load_scheduler(loaded, saved.state_dict(), 0, {"scheduler_steps": [2], "total_batch_size": None}, None)
    assert (loaded.scheduler.last_epoch, loaded.steps_per_update) == (position, steps)
    loaded.step()
    assert loaded.get_last_lr() == [pytest.approx(1 - 5 / 16)]


@pytest.mark.parametrize("kills", [50, pytest.param(200, marks=pytest.mark.long)])
def test_whenever_a_process_is_killed_the_newest_checkpoint_is_complete(run_worker, python, capsys, kills):
    (figures,) = run_worker(python, "kills.py", str(kills))
    assert figures["kills"] == figures["complete"] == kills
    assert figures["half-written"] == 0
    assert kills / 4 < figures["amid"] <= kills
    with capsys.disabled():
        print(f"\ncheckpoints: {json.dumps(figures)}")
