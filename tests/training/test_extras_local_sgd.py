"""Local SGD: processes train apart, and average their parameters."""

import pytest
import torch
from torch import nn
from torchport import Accelerator, LocalSGD
from torchport.errors import ConfigurationError
from torchport.state import AcceleratorState


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state()
    yield Accelerator()
    AcceleratorState._reset_state()


@pytest.mark.multiprocess
def test_parameters_are_averaged_as_by_hand_and_nothing_else_is_exchanged(run_worker, launch):
    ranks = run_worker(launch(2), "local_sgd.py")
    assert [rank["raised"] for rank in ranks] == ["KeyError", "ZeroDivisionError"]
    for rank in ranks:
        for trained in rank["trained"]:  # without and with gradient accumulation
            assert trained["difference"] < 1e-6
            assert trained["difference from synchronous training"] > 1e-3
            assert trained["equal after step"] == [step % 3 == 0 for step in range(1, 9)]
            assert trained["equal after step, disabled"] == [True] * 8
            assert trained["equal at the end"]
        assert rank["gradients are exchanged again"]
        assert "has not prepared" in rank["not prepared"]
        assert "local_sgd_steps=0) must be a whole number" in rank["no steps"]
        assert "LocalSGD does not work with strategy 'ddp'" in rank["strategy"]
        assert rank["strategy, disabled"] == ""


def test_one_process_trains_as_without_it(accelerator):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = model.weight.clone()
    with LocalSGD(accelerator, model, local_sgd_steps=2) as local_sgd:
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        local_sgd.step()
    torch.testing.assert_close(model.weight, before - 0.5)


def test_a_number_of_steps_that_is_none_is_refused(accelerator):
    with pytest.raises(ConfigurationError, match="must be a whole number, at least 1"):
        LocalSGD(accelerator, nn.Linear(1, 1), local_sgd_steps=None)
    LocalSGD(accelerator, nn.Linear(1, 1), local_sgd_steps=None, enabled=False)


def test_it_is_also_where_accelerate_documents_it():
    from torchport.local_sgd import LocalSGD as documented

    assert documented is LocalSGD
