"""Ranks that talk through torch.distributed: gloo between hosts, NCCL for reductions between GPUs.

Messages travel by gloo, through host memory where they come from a GPU. NCCL is used for the native reduction,
where the time goes.
"""

import math
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from teacherstudent.distributed.communicators import Communicator, PeerLost, Transfer, late_error, lost_error

FOREVER = timedelta(days=3650)
# How long the ranks that ran into a deadline wait for each other's sign of life before they name the late one.
ROLL_CALL_SECONDS = 10.0
ROLL_CALL_TAG = 32765
# gloo counts whole milliseconds, and may give up a little before its time.
CLOCK_SECONDS = 0.05


class TorchCommunicator(Communicator):
    """Ranks of one torch.distributed process group, which need not be the default one."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, timeout_seconds: float, reduction: str
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device, timeout_seconds, reduction)
        self._group = group

    def number_of(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)

    def split(self, color: int) -> "TorchCommunicator":
        colors = [int(other) for other in self.all_gather(torch.tensor(color))]
        ranks = [
            dist.get_global_rank(self._group, rank) for rank, other in enumerate(colors) if other == color
        ]
        group = dist.new_group(
            ranks, timeout=to_timedelta(self.timeout_seconds), use_local_synchronization=True
        )
        return TorchCommunicator(group, self.device, self.timeout_seconds, self.reduction)

    def close(self) -> None:
        super().close()
        dist.destroy_process_group(self._group)

    def _transfer(
        self, outgoing: dict[int, Tensor], incoming: dict[int, int], own: Tensor, tag: int
    ) -> Transfer:
        return _TorchTransfer(self, outgoing, incoming, own, tag)

    def _reduce_natively(self, tensor: Tensor, op: str) -> Transfer:
        return _TorchReduction(self, tensor, op)

    def roll_call(self) -> list[int]:
        """Ranks that are not at this point themselves within a few seconds."""
        byte = torch.zeros(1, dtype=torch.uint8)
        others = [rank for rank in range(self.size) if rank != self.rank]
        transfer = _TorchTransfer(
            self, dict.fromkeys(others, byte), dict.fromkeys(others, 1), byte, ROLL_CALL_TAG
        )
        return transfer.absent(time.monotonic() + ROLL_CALL_SECONDS)


class _TorchTransfer(Transfer):
    def __init__(
        self,
        comm: TorchCommunicator,
        outgoing: dict[int, Tensor],
        incoming: dict[int, int],
        own: Tensor,
        tag: int,
    ) -> None:
        self._comm = comm
        self._received = [own if rank == comm.rank else own[:0] for rank in range(comm.size)]
        self._outgoing = outgoing  # gloo reads from these until the sends are over
        self._receives: dict[int, dist.Work] = {}
        for rank, num_bytes in incoming.items():
            self._received[rank] = torch.empty(num_bytes, dtype=torch.uint8)
            self._receives[rank] = self._start(dist.irecv, self._received[rank], rank, tag)
        self._sends = {
            rank: self._start(dist.isend, message, rank, tag) for rank, message in outgoing.items()
        }

    def finish(self, deadline: float) -> list[Tensor]:
        for works in (self._receives, self._sends):
            for rank, work in works.items():
                self._wait(work, rank, deadline)
        return self._received

    def absent(self, deadline: float) -> list[int]:
        """Ranks from which nothing has come by the deadline; unlike `finish`, this leaves the group usable."""
        pending = list(self._receives)
        while pending and time.monotonic() < deadline:
            pending = [rank for rank in pending if not self._receives[rank].is_completed()]
            time.sleep(0.01)
        return pending

    def _start(self, start, message: Tensor, rank: int, tag: int) -> dist.Work:  # type: ignore[no-untyped-def]
        peer = {"group_src": rank} if start is dist.irecv else {"group_dst": rank}
        try:
            return start(message, group=self._comm._group, tag=tag, **peer)
        except RuntimeError as error:
            raise lost_error(self._comm, rank) from error

    def _wait(self, work: dist.Work, rank: int, deadline: float) -> None:
        if work.is_completed():
            deadline = math.inf  # it is over, or failed: collect which, whatever the time
        try:
            work.wait(to_timedelta(max(deadline - time.monotonic(), 0.001)))
        except RuntimeError as error:
            if time.monotonic() >= deadline - CLOCK_SECONDS:
                raise late_error(self._comm, [rank], "torch.distributed") from error
            raise lost_error(self._comm, rank) from error


class _TorchReduction(Transfer):
    def __init__(self, comm: TorchCommunicator, tensor: Tensor, op: str) -> None:
        self._comm = comm
        operation = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        self._work = dist.all_reduce(tensor, operation, comm._group, async_op=True)
        self._tensor = tensor

    def finish(self, deadline: float) -> list[Tensor]:
        try:
            if self._tensor.is_cuda:
                self._poll(deadline)
            else:
                self._work.wait(to_timedelta(max(deadline - time.monotonic(), 0.001)))
        except RuntimeError as error:
            own = self._comm.number_of(self._comm.rank)
            raise PeerLost(-1, f"rank {own}: a native all_reduce failed: {error}") from error
        return []

    def _poll(self, deadline: float) -> None:
        # NCCL's wait() only orders streams, so its end is polled for; it does not tell who is missing either.
        while not self._work.is_completed():
            if time.monotonic() > deadline:
                raise late_error(self._comm, self._comm.roll_call(), "NCCL")
            time.sleep(0.0001)
        self._work.wait()


def to_timedelta(seconds: float) -> timedelta:
    return FOREVER if seconds > FOREVER.total_seconds() else timedelta(seconds=seconds)
