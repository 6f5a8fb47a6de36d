"""Profile some steps of a training, on each process, and keep the traces.

    torchport launch --num-processes 2 docs/examples/profiler.py

The schedule skips the first steps, in which memory is allocated and code is compiled, and then records few: a trace
of everything would be large, and slow to make. For each recorded cycle, the main process prints the operations that
took longest, with the number of floating-point operations where PyTorch can estimate it. Open the traces,
`profile_0.json` and so on, in https://ui.perfetto.dev, and look for the exchange of gradients among them.
"""

import argparse
from pathlib import Path

import torch
from arguments import at_least_one
from digits import digits, network
from torch import nn
from torch.utils.data import DataLoader
from torchport import Accelerator, ProfileKwargs, set_seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip", type=at_least_one, default=5, help="steps before anything is recorded")
    parser.add_argument("--active", type=at_least_one, default=3, help="steps to record")
    parser.add_argument("--output-dir", default="runs/profiler", help="where the traces go")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(42)
    training, _ = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(training, batch_size=64, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def report(profiler: torch.profiler.profile) -> None:
        accelerator.print(f"steps up to {profiler.step_num}:")
        accelerator.print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=8))

    what = ProfileKwargs(
        schedule_option={"skip_first": args.skip, "wait": 0, "warmup": 1, "active": args.active, "repeat": 1},
        on_trace_ready=report,
        record_shapes=True,
        with_flops=True,
        output_trace_dir=args.output_dir,
    )
    model.train()
    with accelerator.profile(what) as profiler:
        for step, (images, labels) in enumerate(loader):
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()  # moves the schedule on
            if step == args.skip + args.active:
                break
    accelerator.wait_for_everyone()  # each process has written its own
    traces = sorted(path.name for path in Path(args.output_dir).glob("profile_*.json"))
    accelerator.print(f"traces in {args.output_dir}: {', '.join(traces) or 'none'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
