"""Ranks that talk through MPI. Imported only where mpirun started the workers, since it needs mpi4py.

Only non-blocking calls, polled against the deadline: a blocking one would never time out. A process that leaves,
cleanly or not, says goodbye to all the others, since MPI itself would let them wait for ever; one that leaves after
losing a peer or a deadline takes the whole job with it, since MPI's own end waits for everybody.
"""

import atexit
import sys
import time

import torch
from mpi4py import MPI
from torch import Tensor

from teacherstudent.distributed.communicators import (
    Communicator,
    Transfer,
    late_error,
    lost_error,
    mismatch_error,
)

GOODBYE_TAG = 32767
# What a rank sent before it left may still be on its way when its goodbye is seen.
GOODBYE_GRACE_SECONDS = 2.0
SPINS_BEFORE_SLEEP = 200
POLL_SECONDS = 0.0001
_TYPES = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}
_OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX}
_goodbyes: "list[MPI.Comm]" = []  # the group on which goodbyes are said; one for the process
_lost_ranks: list[int] = []  # whom this process has waited for in vain


class MpiCommunicator(Communicator):
    """Ranks of one MPI communicator."""

    def __init__(self, mpi: "MPI.Comm", device: torch.device, timeout_seconds: float, reduction: str) -> None:
        super().__init__(mpi.Get_rank(), mpi.Get_size(), device, timeout_seconds, reduction)
        self._mpi = mpi
        self.serves_threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        world = MPI.COMM_WORLD.Get_group()
        self._world_ranks = MPI.Group.Translate_ranks(mpi.Get_group(), list(range(self.size)), world)

    def number_of(self, rank: int) -> int:
        return self._world_ranks[rank]

    def split(self, color: int) -> "MpiCommunicator":
        self.barrier()  # MPI's own split would wait for ever for a rank that is gone
        return MpiCommunicator(
            self._mpi.Split(color, self.rank), self.device, self.timeout_seconds, self.reduction
        )

    def _transfer(
        self, outgoing: dict[int, Tensor], incoming: dict[int, int], own: Tensor, tag: int
    ) -> Transfer:
        return _MpiTransfer(self, outgoing, incoming, own, tag)

    def _reduce_natively(self, tensor: Tensor, op: str) -> Transfer:
        if tensor.dtype not in _TYPES:
            raise ValueError(f"MPI cannot reduce {tensor.dtype} by itself; use reduction='ordered'")
        if tensor.is_cuda:
            raise ValueError("MPI's own reduction needs tensors in host memory; use reduction='ordered'")
        return _MpiReduction(self, tensor, op)


def connect_mpi(device: torch.device, timeout_seconds: float, reduction: str) -> MpiCommunicator:
    """All processes of this mpirun. Called again, it gives a new group of the same processes."""
    if not _goodbyes:
        _goodbyes.append(MPI.COMM_WORLD.Dup())
        atexit.register(_say_goodbye)
    return MpiCommunicator(MPI.COMM_WORLD.Dup(), device, timeout_seconds, reduction)


def _say_goodbye() -> None:
    if _lost_ranks:
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
    comm = _goodbyes[0]
    for rank in range(comm.Get_size()):
        if rank != comm.Get_rank():
            comm.Isend([b"", 0, MPI.BYTE], rank, GOODBYE_TAG)


class _MpiTransfer(Transfer):
    def __init__(
        self,
        comm: MpiCommunicator,
        outgoing: dict[int, Tensor],
        incoming: dict[int, int],
        own: Tensor,
        tag: int,
    ) -> None:
        self._comm = comm
        self._received = [own if rank == comm.rank else own[:0] for rank in range(comm.size)]
        self._outgoing = outgoing  # MPI reads from these until the sends are over
        # (rank, request, bytes expected from it, or None for what is sent there)
        self._pending: list[tuple[int, MPI.Request, int | None]] = []
        for rank, num_bytes in incoming.items():
            self._received[rank] = torch.empty(num_bytes, dtype=torch.uint8)
            buffer = [self._received[rank].numpy(), MPI.BYTE]
            self._pending.append((rank, comm._mpi.Irecv(buffer, rank, tag), num_bytes))
        for rank, message in outgoing.items():
            request = comm._mpi.Isend([message.numpy(), MPI.BYTE], rank, tag)
            self._pending.append((rank, request, None))

    def finish(self, deadline: float) -> list[Tensor]:
        spins, left = 0, _Leavers(self._comm)
        while self._pending:
            self._pending = [entry for entry in self._pending if not self._is_over(*entry)]
            if not self._pending:
                break
            late = sorted({rank for rank, _, _ in self._pending})
            if time.monotonic() > deadline:
                _lost_ranks.extend(late)
                raise late_error(self._comm, late, "MPI")
            spins += 1
            if spins > SPINS_BEFORE_SLEEP:
                left.check(late)
                time.sleep(POLL_SECONDS)
        return self._received

    def _is_over(self, rank: int, request: "MPI.Request", expected: int | None) -> bool:
        status = MPI.Status()
        try:
            over = request.Test(status)
        except MPI.Exception as error:
            raise mismatch_error(self._comm, rank) from error
        if over and expected is not None and status.Get_count(MPI.BYTE) != expected:
            raise mismatch_error(self._comm, rank)
        return over


class _MpiReduction(Transfer):
    def __init__(self, comm: MpiCommunicator, tensor: Tensor, op: str) -> None:
        self._comm = comm
        self._tensor = tensor
        buffer = [tensor.numpy(), _TYPES[tensor.dtype]]
        self._request = comm._mpi.Iallreduce(MPI.IN_PLACE, buffer, _OPERATIONS[op])

    def finish(self, deadline: float) -> list[Tensor]:
        others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
        spins, left = 0, _Leavers(self._comm)
        while not self._request.Test():
            if time.monotonic() > deadline:
                _lost_ranks.extend(others)
                raise TimeoutError(
                    f"rank {self._comm.number_of(self._comm.rank)}: MPI's all_reduce passed its deadline; it does not "
                    "say who is late, reduction='ordered' does"
                )
            spins += 1
            if spins > SPINS_BEFORE_SLEEP:
                left.check(others)
                time.sleep(POLL_SECONDS)
        return []


class _Leavers:
    """Notices ranks that have said goodbye while something was still expected of them."""

    def __init__(self, comm: MpiCommunicator) -> None:
        self._comm = comm
        self._seen: dict[int, float] = {}

    def check(self, pending: list[int]) -> None:
        for rank in pending:
            if rank not in self._seen and _goodbyes[0].Iprobe(self._comm._world_ranks[rank], GOODBYE_TAG):
                self._seen[rank] = time.monotonic()
        for rank, since in self._seen.items():
            if rank in pending and time.monotonic() > since + GOODBYE_GRACE_SECONDS:
                _lost_ranks.append(rank)
                raise lost_error(self._comm, rank)
