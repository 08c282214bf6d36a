"""In-process workers: many ranks as threads of one process, for studies and tests on one machine."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from teacherstudent.distributed.communicators import (
    DEFAULT_TIMEOUT_SECONDS,
    Communicator,
    PeerLost,
    Transfer,
    late_error,
    mismatch_error,
)

Result = TypeVar("Result")
Context = tuple[int, ...]


def in_process(
    num_workers: int,
    function: Callable[[Communicator], Result],
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    device: str | torch.device = "cpu",
    worker_bytes: int = 0,
) -> list[Result]:
    """Run `function(comm)` in `num_workers` threads and return their results in rank order.

    One compute thread per worker. Threads share torch's global generator: draw dropout, masks and noise from
    explicit generators derived from (seed, step, rank). `worker_bytes`, where given, is what one worker holds in
    memory; what does not fit is refused.

    An exception in one worker wakes the others, which fail with PeerLost; it is raised here, with a note saying
    which rank it came from. A worker that neither fails nor returns is left behind after `timeout_seconds` more.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; at least 1 is needed")
    _check_memory(num_workers, worker_bytes)
    world = _World(num_workers)
    results: list[Any] = [None] * num_workers

    def work(rank: int) -> None:
        # OpenMP's thread count belongs to the calling thread: this leaves the other threads' alone.
        torch.set_num_threads(1)
        try:
            comm = ThreadCommunicator(
                world, list(range(num_workers)), rank, (), torch.device(device), timeout_seconds, "ordered"
            )
            results[rank] = function(comm)
        except BaseException as error:
            world.fail(rank, error)

    with _one_compute_thread():
        workers = [
            threading.Thread(target=work, args=(rank,), name=f"worker-{rank}", daemon=True)
            for rank in range(num_workers)
        ]
        for worker in workers:
            worker.start()
        _join(workers, world, timeout_seconds)
    world.raise_error()
    return results


def single_process(device: torch.device, timeout_seconds: float, reduction: str) -> "ThreadCommunicator":
    """The communicator of a worker that is alone."""
    return ThreadCommunicator(_World(1), [0], 0, (), device, timeout_seconds, reduction)


class _World:
    """What the threads share: a mailbox for each rank, and the first failure."""

    def __init__(self, size: int) -> None:
        self.mailboxes = [_Mailbox() for _ in range(size)]
        self.errors: dict[int, BaseException] = {}
        self.failed_rank: int | None = None

    def fail(self, rank: int, error: BaseException) -> None:
        self.errors[rank] = error
        if self.failed_rank is None:
            self.failed_rank = rank
        for mailbox in self.mailboxes:
            with mailbox.changed:
                mailbox.changed.notify_all()

    def raise_error(self) -> None:
        causes = {rank: error for rank, error in self.errors.items() if not isinstance(error, PeerLost)}
        for rank, error in sorted((causes or self.errors).items()):
            error.add_note(f"raised by rank {rank} of {len(self.mailboxes)} in-process workers")
            raise error


class _Mailbox:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: dict[tuple[Context, int, int], Tensor] = {}  # (group, sender, tag) -> bytes


class ThreadCommunicator(Communicator):
    """A group of in-process workers; `members` are their numbers in the world."""

    def __init__(
        self,
        world: _World,
        members: list[int],
        rank: int,
        context: Context,
        device: torch.device,
        timeout_seconds: float,
        reduction: str,
    ) -> None:
        super().__init__(rank, len(members), device, timeout_seconds, reduction)
        self._world = world
        self._members = members
        self._context = context
        self._num_splits = 0

    def number_of(self, rank: int) -> int:
        return self._members[rank]

    def split(self, color: int) -> "ThreadCommunicator":
        colors = [int(other) for other in self.all_gather(torch.tensor(color))]
        ranks = [rank for rank, other in enumerate(colors) if other == color]
        self._num_splits += 1
        return ThreadCommunicator(
            self._world,
            [self._members[rank] for rank in ranks],
            ranks.index(self.rank),
            (*self._context, self._num_splits, color),
            self.device,
            self.timeout_seconds,
            self.reduction,
        )

    def _transfer(
        self, outgoing: dict[int, Tensor], incoming: dict[int, int], own: Tensor, tag: int
    ) -> Transfer:
        # One copy of a message that goes to many ranks; the sender may then overwrite its own.
        copies: dict[tuple[int, int], Tensor] = {}
        for rank, message in outgoing.items():
            place = (message.data_ptr(), message.numel())
            if place not in copies:
                copies[place] = message.clone()
            mailbox = self._world.mailboxes[self._members[rank]]
            with mailbox.changed:
                mailbox.messages[self._context, self.rank, tag] = copies[place]
                mailbox.changed.notify_all()
        return _ThreadTransfer(self, incoming, own, tag)


class _ThreadTransfer(Transfer):
    def __init__(self, comm: ThreadCommunicator, incoming: dict[int, int], own: Tensor, tag: int) -> None:
        self._comm = comm
        self._incoming = incoming
        self._own = own
        self._tag = tag

    def finish(self, deadline: float) -> list[Tensor]:
        received = [
            self._own if rank == self._comm.rank else self._own[:0] for rank in range(self._comm.size)
        ]
        for rank, num_bytes in self._incoming.items():
            message = self._receive(rank, deadline)
            if message.numel() != num_bytes:
                raise mismatch_error(self._comm, rank)
            received[rank] = message.clone()
        return received

    def _receive(self, rank: int, deadline: float) -> Tensor:
        comm, world = self._comm, self._comm._world
        mailbox = world.mailboxes[comm._members[comm.rank]]
        key = (comm._context, rank, self._tag)
        with mailbox.changed:
            while key not in mailbox.messages:
                if world.failed_rank is not None:
                    raise PeerLost(world.failed_rank, f"worker {world.failed_rank} failed")
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    awaited = list(self._incoming)
                    awaited = awaited[awaited.index(rank) :]  # the messages of those before have been taken
                    late = [
                        other
                        for other in awaited
                        if (comm._context, other, self._tag) not in mailbox.messages
                    ]
                    raise late_error(comm, late, "in-process workers")
                mailbox.changed.wait(min(remaining, threading.TIMEOUT_MAX))
            return mailbox.messages.pop(key)


@contextlib.contextmanager
def _one_compute_thread() -> Iterator[None]:
    """Threads started inside compute alone; the caller's own setting comes back afterwards."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _join(workers: list[threading.Thread], world: _World, timeout_seconds: float) -> None:
    try:
        for worker in workers:
            while worker.is_alive() and world.failed_rank is None:
                worker.join(0.05)
        deadline = time.monotonic() + timeout_seconds
        for worker in workers:
            worker.join(max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))
    except KeyboardInterrupt as error:
        world.fail(-1, error)
        raise


def _check_memory(num_workers: int, worker_bytes: int) -> None:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if num_workers * worker_bytes > available:
        raise ValueError(
            f"{num_workers} in-process workers of {worker_bytes / 2**20:.0f} MiB each need "
            f"{num_workers * worker_bytes / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are available, enough for "
            f"{available // worker_bytes}. Use fewer workers, a smaller model, or several machines"
        )
