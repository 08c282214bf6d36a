"""Batches read ahead by processes of their own: for features computed from audio at every use.

A batch is a pure function of its place (batches.py), so whoever makes it makes the same one: with processes or
without, and however many, a training sees the same bits.
"""

import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch

from teacherstudent.config import Features
from teacherstudent.training.batches import Batch, Position, Source

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Readers(Generic[Argument, Result]):
    """Spawned processes that compute `function` of what they are given; a context manager.

    function and results must be picklable, arguments also small: a few kilobytes. With no process at all `map` is the
    built-in one.
    """

    def __init__(
        self, function: Callable[[Argument], Result], num_processes: int, timeout_seconds: float = 600.0
    ) -> None:
        self._function, self._timeout_seconds = function, timeout_seconds
        self._num_processes, self._num_sent = num_processes, 0
        self._processes: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._arguments: dict[int, Argument] = {}  # of what was sent and has not come back
        self._results: dict[int, Result] = {}  # of what came back before its turn

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        for number in range(self._num_processes):
            ours, theirs = context.Pipe()
            name = f"reader {number + 1} of {self._num_processes}"
            process = context.Process(target=_serve, args=(theirs, self._function), name=name, daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, connection in self._processes:
            connection.close()  # one that waits for work ends by itself
            process.terminate()
            process.join()
        self._processes.clear()

    def map(self, arguments: Iterable[Argument]) -> Iterator[Result]:
        """Results in the order of the arguments, one a process ahead of what is asked for. Calls may be nested.

        Raises ValueError naming a process that died or does not answer, and for what it raised.
        """
        if not self._processes:
            yield from map(self._function, arguments)
            return
        pending: deque[int] = deque()
        try:
            for argument in arguments:
                pending.append(self._send(argument))
                if len(pending) > len(self._processes):
                    yield self._take(pending.popleft())
            while pending:
                yield self._take(pending.popleft())
        finally:
            for number in pending:  # nobody will ask for them
                self._arguments.pop(number, None)
                self._results.pop(number, None)

    def _send(self, argument: Argument) -> int:
        number = self._num_sent
        self._num_sent += 1
        self._arguments[number] = argument
        process, connection = self._processes[number % len(self._processes)]
        try:
            connection.send_bytes(pickle.dumps((number, argument)))
        except (BrokenPipeError, ConnectionResetError):
            self._give_up(process, argument)
        return number

    def _take(self, number: int) -> Result:
        process, connection = self._processes[number % len(self._processes)]
        while number not in self._results:
            argument = self._arguments[number]
            ready = wait([connection, process.sentinel], self._timeout_seconds)
            if not ready:
                raise ValueError(
                    f"{process.name} (process {process.pid}) has not read {argument} in {self._timeout_seconds:g} "
                    "seconds: is the disk with the audio there?"
                )
            try:
                came, result, error = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                self._give_up(process, argument)
            if error is not None and came in self._arguments:
                raise ValueError(error)
            if self._arguments.pop(came, None) is not None:
                self._results[came] = result
        return self._results.pop(number)

    def _give_up(self, process: multiprocessing.process.BaseProcess, argument: Argument) -> None:
        process.join()
        raise ValueError(
            f"{process.name} (process {process.pid}) died with exit code {process.exitcode} before it had read "
            f"{argument}: was memory short? Start again with fewer features.jobs; the step goes on where it was"
        ) from None


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """What a process does, until the other end is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            number, argument = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        result, failure = None, None
        try:
            result = function(argument)
        except Exception as error:
            failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        try:
            connection.send_bytes(pickle.dumps((number, result, failure)))
        except (BrokenPipeError, ConnectionResetError):
            return


def num_readers(settings: Features) -> int:
    """Processes that read ahead: none where features are stored, which takes no longer than to ask for them."""
    return settings.jobs if settings.storage == "on-the-fly" else 0


# -- batches of a training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One worker's micro-batch of one source."""

    source: str
    position: Position
    rank: int = 0
    after: Position = field(
        default_factory=Position
    )  # where the source stands when all workers have had theirs

    def __str__(self) -> str:
        number = self.position.consumed + self.rank
        return f"micro-batch {number} of epoch {self.position.epoch} of the source {self.source!r}"


class BatchReader:
    """Makes micro-batches of the sources, in `num_processes` processes or in this one; a context manager."""

    def __init__(self, sources: Mapping[str, Source], num_processes: int) -> None:
        self._readers: Readers[Request, dict[str, np.ndarray]] = Readers(_Read(dict(sources)), num_processes)

    def __enter__(self) -> Self:
        self._readers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._readers.__exit__(*error)

    def read(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Batch]]:
        """In order; those that come next are made meanwhile."""
        sent: deque[Request] = deque()

        def remember() -> Iterator[Request]:
            for request in requests:
                sent.append(request)
                yield request

        for arrays in self._readers.map(remember()):
            batch = Batch(**{name: torch.from_numpy(values) for name, values in arrays.items()})
            yield sent.popleft(), batch


class _Read:
    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def __call__(self, request: Request) -> dict[str, np.ndarray]:
        batch = self._sources[request.source].batch(request.position, request.rank)
        return {name: value.numpy() for name, value in vars(batch).items() if value is not None}


def list_requests(
    order: Iterable[str],
    sources: Mapping[str, Source],
    positions: Mapping[str, Position],
    rank: int,
    num_workers: int,
) -> Iterator[Request]:
    """What a worker needs next, in the order in which its steps take the sources. positions: where they stand."""
    standing = dict(positions)
    for name in order:
        after = sources[name].advance(standing[name], num_workers)
        yield Request(name, standing[name], rank, after)
        standing[name] = after
