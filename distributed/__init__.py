"""Training shared among workers: communicators, and optimisers that exchange little.

    from teacherstudent.distributed import BMUF, GTC, ExactAveraging, TwoTier, connect

    comm = connect()                                   # torchrun, mpirun, srun, or a single process
    model = MyModel().to(comm.device)
    optimizer = GTC(torch.optim.SGD(model.parameters(), lr=0.1), comm, density=1e-3)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step(weight=batch.num_frames)        # how much data this worker's step stands for
    optimizer.synchronize()

Nothing here knows about speech, and nothing here imports the rest of teacherstudent.
"""

if __name__ != "teacherstudent.distributed":
    raise ImportError(
        f"this package was imported as {__name__!r}, but it is 'teacherstudent.distributed': under the bare name "
        "it would hide the 'distributed' package of dask. Write 'from teacherstudent.distributed import …', and "
        "run Python from the repository's root or with teacherstudent installed."
    )

from teacherstudent.distributed.bmuf import BMUF
from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.ddp_hook import GTCState, gtc_hook
from teacherstudent.distributed.exact import ExactAveraging
from teacherstudent.distributed.gtc import GTC
from teacherstudent.distributed.gtc_state import fold_states, ranks_to_fold
from teacherstudent.distributed.launchers import connect
from teacherstudent.distributed.threads import in_process
from teacherstudent.distributed.two_tier import TwoTier

__all__ = [
    "BMUF",
    "GTC",
    "Communicator",
    "ExactAveraging",
    "GTCState",
    "TwoTier",
    "connect",
    "fold_states",
    "gtc_hook",
    "in_process",
    "ranks_to_fold",
]
