"""`python -m torchport_tpu.spawn N [-m] SCRIPT ...`: run a script in each process of `torch_xla.launch`."""

from __future__ import annotations

import os
import runpy
import sys

from torchport.builtin.ranks import rank_variables
from torchport.plugin import Topology


def run(ordinal: int, arguments: list[str]) -> None:
    """Run a script as the process of this number, whose place it finds in the variables of ranks.

    Args:
        ordinal: Number of the process among all, as torch_xla counts them.
        arguments: `["script.py", ...]` or `["-m", "module", ...]`.
    """
    import torch_xla.runtime as xr

    each = xr.local_process_count()
    place = Topology(
        rank=ordinal,
        world_size=xr.world_size(),
        local_rank=xr.local_ordinal(),
        local_world_size=each,
        node_rank=xr.host_index() if xr.world_size() > each else 0,
        num_nodes=max(1, xr.world_size() // each),
        master_addr=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(os.environ.get("MASTER_PORT", "29500")),
    )
    os.environ.update(rank_variables(place))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))  # noqa: PTH100, PTH120 - as Python does
        runpy.run_path(arguments[0], run_name="__main__")


def main() -> None:
    """Start the processes, and check that there are as many as were asked for."""
    import torch_xla

    torch_xla.launch(_checked, args=(int(sys.argv[1]), sys.argv[2:]))


def _checked(ordinal: int, asked: int, arguments: list[str]) -> None:
    import torch_xla.runtime as xr

    if xr.world_size() != asked:
        sys.exit(
            f"torchport: torch_xla starts one process for each device, {xr.world_size()} here; asked for {asked}:"
            f" --num-processes {xr.world_size()}, or choose devices by TPU_VISIBLE_CHIPS"
        )
    run(ordinal, arguments)


if __name__ == "__main__":
    main()
