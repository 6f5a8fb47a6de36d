"""Says where this process stands, and what the launcher gave it; then exits with the code given."""

import os
import sys

from job import say, topology

place = topology()
if len(sys.argv) > 1:
    from mpi4py import MPI

    say(
        "place",
        place.rank,
        place.world_size,
        place.local_rank,
        place.local_world_size,
        place.source.replace(" ", ""),
        MPI.COMM_WORLD.Get_size(),
        *(os.environ.get(name, "-") for name in sys.argv[2:]),
    )
    MPI.COMM_WORLD.Barrier()
    if place.rank == 1:  # MPICH's mpiexec sometimes loses the exit code of a process that has finalised
        os._exit(int(sys.argv[1]))
    MPI.Finalize()
    os._exit(0)
