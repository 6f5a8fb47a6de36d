"""The states of other optimizers on their way into DeepSpeed's universal format, which knows those of Adam."""

from __future__ import annotations

import pytest
import torch
from torchport.errors import CheckpointError
from torchport_deepspeed.universal import _as_adam


def saved(folder, **states) -> dict:
    """Write what an engine of ZeRO stage 2 writes, and return the optimizer's part."""
    folder.mkdir()
    (folder / "mp_rank_00_model_states.pt").touch()
    optimizer = {
        "optimizer_state_dict": {
            "base_optimizer_state": {"state": {0: states}, "param_groups": [{"lr": 0.1}]},
            "single_partition_of_fp32_groups": [torch.ones(3)],
        }
    }
    torch.save(optimizer, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return optimizer


def test_the_momentum_of_sgd_goes_by_a_name_of_adams_in_a_copy(tmp_path):
    saved(tmp_path / "given", momentum_buffer=torch.tensor([1.0, 2.0, 3.0]))
    folder, names = _as_adam(tmp_path / "given", tmp_path / "renamed")
    assert (folder, names) == (tmp_path / "renamed", {"exp_avg": "momentum_buffer"})
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "given").iterdir()
    )
    (path,) = folder.glob("*_optim_states.pt")
    state = torch.load(path)["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    assert {name: value.tolist() for name, value in state.items()} == {
        "exp_avg": [1.0, 2.0, 3.0],
        "exp_avg_sq": [0.0, 0.0, 0.0],
    }


def test_the_states_of_adam_are_converted_as_they_are(tmp_path):
    saved(tmp_path / "given", exp_avg=torch.ones(3), exp_avg_sq=torch.ones(3), step=torch.tensor(4.0))
    folder, names = _as_adam(tmp_path / "given", tmp_path / "renamed")
    assert (folder, names) == (
        tmp_path / "given",
        {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    )


def test_an_optimizer_with_three_states_is_refused(tmp_path):
    saved(tmp_path / "given", exp_avg=torch.ones(3), exp_avg_sq=torch.ones(3), max_exp_avg_sq=torch.ones(3))
    with pytest.raises(CheckpointError, match="that DeepSpeed cannot convert") as refused:
        _as_adam(tmp_path / "given", tmp_path / "renamed")
    assert refused.value.found == "exp_avg, exp_avg_sq, max_exp_avg_sq"
