"""Share prompts out over processes, and gather what a model makes of them in the order of the prompts.

    python docs/examples/language_model.py                                       # trains the model
    torchport launch --num-processes 2 docs/examples/distributed_inference.py

`split_between_processes` gives each process its share, the first ones one more where the number does not divide;
`gather_object` puts the results together again. Nothing is prepared: inference needs no gradients, and each process
holds the whole model. Look at the first column, which says who did what: the texts are the same however many
processes there are.
"""

import argparse
from pathlib import Path

from language_model import ByteTransformer, continue_text
from safetensors.torch import load_file
from torchport import PartialState
from torchport.utils import gather_object

PROMPTS = [
    "import ", "from collections ", "class Error(", "def __init__(self", "    def close(", "        return ",
    "        if not ", "for name in ", "    raise ValueError(",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="runs/language_model/model.safetensors", help="weights to use")
    parser.add_argument("--length", type=int, default=30, help="most bytes to add to each prompt")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="beginnings of lines of code")
    args = parser.parse_args()
    if not Path(args.model).is_file():
        parser.error(f"there is no {args.model}: python docs/examples/language_model.py trains a model")

    state = PartialState()
    model = ByteTransformer().to(state.device)
    model.load_state_dict(load_file(args.model, device=str(state.device)))

    with state.split_between_processes(args.prompts) as prompts:
        mine = [(state.process_index, continue_text(model, prompt, args.length)) for prompt in prompts]
    for prompt, (rank, text) in zip(args.prompts, gather_object(mine), strict=True):
        if state.is_main_process:
            print(f"process {rank}: {prompt!r} -> {text!r}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
