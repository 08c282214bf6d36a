"""A function over many items in spawned processes, results in order; the threads that a process computes in."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch

_GUARD = 'a script that starts processes needs `if __name__ == "__main__":` around what it does'
_function: Callable[[Any], Any] | None = None  # of this process, where it is one of a ProcessMap's
_failure: Exception | None = None  # why it could not be made


@contextmanager
def compute_threads(number: int) -> Iterator[None]:
    """Torch computes in so many threads inside the block: last bits depend on it."""
    before = torch.get_num_threads()
    if before == number:  # workers of this process have one each, and share the setting
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ProcessMap:
    """function(item), where function = make(*arguments) is made once in each of `jobs` processes; a context manager.

    jobs = 1 works in this process. What make or function raises is raised here. Raises ValueError when a script has no
    main guard, and when a process dies.
    """

    def __init__(self, jobs: int, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        imported_anew = getattr(multiprocessing.current_process(), "_inheriting", False)
        if imported_anew:  # by a process that the same script has started
            raise ValueError(_GUARD)
        self._jobs = jobs
        self._here = make(*arguments) if jobs == 1 else None
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(jobs, spawn, initializer=_start, initargs=(make, *arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """In order. Items are taken as they are needed; only a few are held at a time."""
        return map(self._here, items) if self._here is not None else self._map(items)

    def _map(self, items: Iterable[Any]) -> Iterator[Any]:
        assert self._pool is not None
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(_call, item))
                if len(waiting) >= 4 * self._jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                f"a process ended before its work did: too little memory for {self._jobs} of them, or {_GUARD}"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def map_in_processes(make: tuple[Any, ...], items: Iterable[Any], jobs: int) -> Iterator[Any]:
    """A ProcessMap for one use: function(item) of every item, where function = make[0](*make[1:])."""
    with ProcessMap(jobs, *make) as processes:
        yield from processes.map(items)


def _start(make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
    global _function, _failure
    try:
        _function = make(*arguments)
    except Exception as error:  # raised here, it would only break the pool, without a reason
        _failure = error


def _call(item: Any) -> Any:
    if _failure is not None:
        raise _failure
    assert _function is not None
    return _function(item)
