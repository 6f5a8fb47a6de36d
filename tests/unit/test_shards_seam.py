"""States that are saved in parts: written, read back and guarded against code."""

import pickle

import pytest
import torch
from torchport.errors import CheckpointError
from torchport.plugin import shards


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def stepped():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_and_plain_values_come_back_as_they_were(tmp_path):
    _, optimizer = stepped()
    tensors, rest = shards.split_optimizer_state(optimizer.state_dict())
    assert sorted(tensors) == [
        f"state.{number}.{slot}" for number in (0, 1) for slot in ("exp_avg", "exp_avg_sq", "step")
    ]
    shards.write_shards(tensors, tmp_path / "part", rest)
    assert shards.shapes_of(tmp_path / "part")["state.0.exp_avg"] == (torch.Size([2, 3]), torch.float32)
    read = shards.join_optimizer_state(
        shards.read_whole(tmp_path / "part"), shards.read_plain(tmp_path / "part")
    )
    expected = optimizer.state_dict()
    assert read["param_groups"] == expected["param_groups"]
    for number, slots in expected["state"].items():
        assert slots.keys() == read["state"][number].keys()
        assert all(torch.equal(value, read["state"][number][slot]) for slot, value in slots.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_of_another_shape_or_name_is_an_error(tmp_path):
    shards.write_shards({"weight": torch.ones(2, 3)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"weight has the shape \(3, 2\)\n.*\(2, 3\) was saved"):
        shards.read_shards({"weight": torch.empty(3, 2)}, tmp_path)
    with pytest.raises(CheckpointError, match="no tensor of that name"):
        shards.read_shards({"bias": torch.empty(2)}, tmp_path)


@pytest.mark.parametrize("payload", [Bomb(), {"metadata": Bomb()}, torch.nn.Linear(1, 1)])
def test_code_in_the_table_is_refused(tmp_path, payload, capsys):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match="has no place in this table"):
        shards.shapes_of(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_folder_without_a_table_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no sharded state"):
        shards.read_whole(tmp_path)
