"""A model in a pipeline over the processes, beside the same model as a whole."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torchport import PartialState
from torchport.errors import ConfigurationError
from torchport.inference import prepare_pippy


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(size),
            nn.Linear(size, 4 * size),
            nn.Linear(4 * size, size),
        )

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Reads one input at its start and one at its end, and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(5))
        self.head = nn.Linear(16, 50)

    def forward(self, tokens, scale=None):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        return {"logits": logits if scale is None else logits * scale, "hidden": [hidden]}


def refused(*args, **kwargs):
    try:
        prepare_pippy(*args, **kwargs)
    except ConfigurationError as error:
        return str(error)
    return None


def refused_call(pipe, *args):
    try:
        pipe(*args)
    except ConfigurationError as error:
        return str(error)
    return None


def difference(output, whole):
    return max(
        (output["logits"] - whole["logits"]).abs().max().item(),
        (output["hidden"][0] - whole["hidden"][0]).abs().max().item(),
    )


def main():
    torch.manual_seed(0)
    model = Model().eval()
    tokens, scale = torch.randint(50, (9, 7)), torch.rand(9, 1, 1)
    with torch.no_grad():
        whole, unscaled = model(tokens, scale), model(tokens)
    state = PartialState()
    facts = {}

    pipe = prepare_pippy(
        model, example_args=(tokens[:4],), example_kwargs={"scale": scale[:4]}, gather_output=True
    )
    facts["points"] = pipe.split_points
    facts["parameters"] = sum(parameter.numel() for parameter in pipe.parameters())
    facts["all"] = sum(parameter.numel() for parameter in model.parameters())
    facts["everywhere"] = {}
    for batch in (9, 4, 1):
        expected = {"logits": whole["logits"][:batch], "hidden": [whole["hidden"][0][:batch]]}
        facts["everywhere"][batch] = difference(pipe(tokens[:batch], scale=scale[:batch]), expected)
    facts["by name"] = difference(pipe(scale=scale, tokens=tokens), whole)

    points = ["blocks.1", "blocks.3"][: state.num_processes - 1]
    last = prepare_pippy(model, split_points=points, example_args=(tokens,), num_chunks=4)
    output = last(tokens)
    facts["named points"] = list(last.split_points) == points
    facts["on the last alone"] = None if output is None else difference(output, unscaled)

    whole_blocks = {"no_split_module_classes": ["ModuleList"], "example_args": (tokens,)}
    facts["whole"] = prepare_pippy(model, **whole_blocks).split_points if state.num_processes == 2 else None
    facts["refused"] = {
        "unknown": refused(model, split_points=["layers.1"], example_args=(tokens,)),
        "number": refused(model, split_points=["blocks.1"] * 5, example_args=(tokens,)),
        "a word": refused(model, split_points="blocks.1", example_args=(tokens,)),
        "no example": refused(model),
        "few samples": refused(model, example_args=(tokens[:1],)),
        "inputs": refused(model, example_args=(tokens,), example_kwargs={"mask": tokens}),
        "indivisible": refused(nn.Sequential(nn.Linear(2, 2)), example_args=(torch.ones(4, 2),)),
        "another call": refused_call(last, tokens, scale),
        "sizes": refused(model, example_args=(tokens, scale[:3])),
    }
    (Path(sys.argv[1]) / f"rank{state.process_index}.json").write_text(json.dumps(facts))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
