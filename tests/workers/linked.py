"""What workers do over shaped links; benchmarks/link_worker.py calls these."""

import os
import signal
import threading
from collections.abc import Iterator

import torch

from teacherstudent.distributed import Communicator


def exchange(comm: Communicator, num_elements: int) -> Iterator[object]:
    """Yields where the worker is, then a sum over all of them and the bytes that its interface sent for it."""
    from links import bytes_transmitted  # beside link_worker.py

    comm.barrier()
    yield [comm.rank, comm.size]
    before = bytes_transmitted()
    total = comm.all_reduce(torch.full((num_elements,), 1.0 + comm.rank))
    comm.barrier()  # the other has the sum, too: nothing waits to be sent any more
    yield [float(total[0]), float(total[-1]), bytes_transmitted() - before]


def die(comm: Communicator) -> Iterator[object]:
    """Worker 1 is killed while the other relies on it."""
    comm.barrier()
    yield comm.rank
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
    yield comm.rank


def wait(comm: Communicator) -> Iterator[object]:
    comm.barrier()
    yield os.getpid()
    threading.Event().wait(300)
