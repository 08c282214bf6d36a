"""Messages exchanged in a thread of their own, while the worker goes on computing."""

import atexit
import functools
import threading
import time
import weakref
from collections import deque
from typing import NamedTuple

from torch import Tensor

from teacherstudent.distributed.communicators import Communicator

# A process that ends meanwhile, as after an exception, waits so long for peers that are still sending.
EXIT_SECONDS = 2.0
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


class Delivery:
    """An all-gather that a Courier makes."""

    def __init__(self, message: Tensor) -> None:
        self.message = message
        self.bytes_sent = 0
        self.messages: list[Tensor] = []
        self.error: BaseException | None = None
        self.is_over = threading.Event()

    def wait(self) -> list[Tensor]:
        """The messages of all ranks, in rank order. Raises what the all-gather raised."""
        self.is_over.wait()
        if self.error is not None:
            raise self.error
        return self.messages


class Arrived(NamedTuple):
    """The messages of a delivery that was over before a checkpoint."""

    messages: list[Tensor]
    bytes_sent: int  # counted when they are received, as those of a Delivery

    def wait(self) -> list[Tensor]:
        return self.messages


class Courier:
    """Makes all-gathers one after the other, in the order in which they were given to it, without being waited for.

    It has a communicator of its own, so that whatever the worker exchanges meanwhile, be it in another order on each
    rank, cannot come between. All ranks must give it as many messages, in the same order. The constructor is
    collective. After an error all later deliveries fail with it.

    Raises ValueError where the transport cannot be used by two threads at once.
    """

    def __init__(self, comm: Communicator) -> None:
        if not comm.serves_threads:
            raise ValueError(
                "exchanging in the background (overlap, delay) needs an MPI with MPI_THREAD_MULTIPLE, and this one was "
                "started with less; start it with that, use torchrun, or overlap=False and delay=False"
            )
        self._comm = comm.split(0)
        self._lock = threading.Lock()
        self._waiting: deque[Delivery] = deque()
        self._is_busy = False  # whether there is a thread
        self._error: BaseException | None = None

    def start_all_gather(self, message: Tensor) -> Delivery:
        """`message`, in host memory, must be left alone until the delivery is over."""
        delivery = Delivery(message)
        with self._lock:
            self._waiting.append(delivery)
            is_busy, self._is_busy = self._is_busy, True
        if not is_busy:
            # Ends with its work, since a thread that is there when the process ends makes gloo abort; and a daemon,
            # since a process must end that waits for a peer in vain.
            thread = threading.Thread(target=self._deliver, name=f"courier-{self._comm.rank}", daemon=True)
            _threads.add(thread)
            _wait_at_exit()
            thread.start()
        return delivery

    def _deliver(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_busy = False
                    return
                delivery = self._waiting.popleft()
            bytes_before = self._comm.bytes_sent
            if self._error is None:
                try:
                    delivery.messages = self._comm.all_gather(delivery.message)
                except BaseException as raised:
                    self._error = raised
            delivery.error, delivery.bytes_sent = self._error, self._comm.bytes_sent - bytes_before
            delivery.is_over.set()


@functools.cache
def _wait_at_exit() -> None:
    atexit.register(_join_threads)


def _join_threads() -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
