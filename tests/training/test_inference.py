"""Pipelines for inference, over gloo, beside the whole model."""

import pytest
import torch
from torch import nn
from torchport.inference import prepare_pippy

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, run_worker, launch):
    return run_worker(launch(request.param), "pipeline.py")


def test_every_process_has_the_outputs_of_the_whole_model_where_they_are_gathered(ranks):
    for facts in ranks:
        assert all(difference < 1e-6 for difference in facts["everywhere"].values())
        assert facts["by name"] < 1e-6


def test_each_process_holds_its_own_part_of_the_parameters(ranks):
    held = [facts["parameters"] for facts in ranks]
    assert sum(held) == ranks[0]["all"]
    assert max(held) < 1.3 * sum(held) / len(held)
    assert ranks[0]["points"] == {2: ["blocks.3"], 3: ["blocks.2", "blocks.4"]}[len(ranks)]


def test_the_output_is_on_the_last_process_alone_unless_it_is_gathered(ranks):
    assert all(facts["named points"] for facts in ranks)
    assert [facts["on the last alone"] for facts in ranks[:-1]] == [None] * (len(ranks) - 1)
    assert ranks[-1]["on the last alone"] < 1e-6


def test_modules_of_given_classes_are_not_cut(ranks):
    if len(ranks) == 2:
        assert ranks[0]["whole"] in (["blocks"], ["head"])


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("unknown", "has no module named layers.1"),
        ("number", "found:  5: blocks.1, blocks.1"),
        ("a word", "'auto' or a list of names"),
        ("no example", "missing a required argument: 'tokens'"),
        ("few samples", "found:  1 sample(s) and num_chunks="),
        ("inputs", "the inputs do not fit the model's forward"),
        ("indivisible", "cannot be cut for"),
        ("another call", "found:  a tensor, a tensor, where the example had a tensor"),
        ("sizes", "found:  batch sizes [3, 9]"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused_on_every_process(ranks, case, text):
    assert all(text in facts["refused"][case] for facts in ranks)


def test_one_process_keeps_the_model_as_it_is():
    model = nn.Linear(2, 2)
    assert prepare_pippy(model, example_args=(torch.ones(4, 2),)) is model
