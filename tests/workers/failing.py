"""One of the ranks fails in the way that the argument says, while the others rely on it."""

import os
import signal
import sys
import threading

import torch

from teacherstudent.distributed import connect

comm = connect(timeout_seconds=120)
comm.barrier()
if sys.argv[1] == "late":
    comm.timeout_seconds = 3
if comm.rank == 1:
    if sys.argv[1] == "raise":
        raise ValueError("this rank has a problem of its own")
    if sys.argv[1] == "exit":
        sys.exit(3)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(300)  # "late": it never comes
comm.all_reduce(torch.ones(3))
