"""Threads that read ahead and write behind, so that neither waits for the network nor it for them.

Queues are bounded. An error on either side comes out where the `with` block is, and no thread outlives the block.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


@contextmanager
def read_ahead(items: Iterable[Item], size: int) -> Iterator[Iterator[Item]]:
    """The items in order, up to `size` of them made in a thread before they are asked for."""
    waiting: queue.Queue[Any] = queue.Queue(size)
    leaving = threading.Event()

    def put(item: Any) -> bool:
        while not leaving.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # also an interrupt: it is the reader's to end by
            put(_Failed(error))

    def take() -> Iterator[Item]:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        leaving.set()
        thread.join()


class WriteBehind(Generic[Item]):
    """`function(item)` in a thread, in order; a context manager, which waits for the last one.

    At most `size` items wait. What function raises is raised by the next `put`, or at the end of the block; items
    after it are not written. Nor are those that wait when the block ends with an error of its own.
    """

    def __init__(self, function: Callable[[Item], None], size: int) -> None:
        self._function = function
        self._waiting: queue.Queue[Any] = queue.Queue(size)
        self._error: BaseException | None = None
        self._leaving = False
        self._thread = threading.Thread(target=self._work, name="write behind", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = error is not None
        self._waiting.put(_END)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, item: Item) -> None:
        self._raise()
        self._waiting.put(item)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._waiting.get()) is not _END:
            if self._error is None and not self._leaving:
                try:
                    self._function(item)
                except BaseException as error:
                    self._error = error
