"""The arithmetic of the section `bmuf`: what an exchange costs a batch, and how many workers that leaves room for.

T(N), the seconds that N workers' exchange adds to a batch, is the sum of what its bytes take on the wire, its
processor time and its latency, divided by the batches that one exchange serves, and the bookkeeping of each batch:

    T(N) = (8·b·f(N)/speed + p + q·f(N) + collectives·(u + v·(N − 1))) / batches + bookkeeping

f(N), the traffic, is (N − 1)/N where slices are reduced by their owners, as in a ring, and N − 1 where every worker
gets every other one's message. b is a mean of what was measured, (p, q) and (u, v) are lines through it. Nothing
overlaps with anything, and nobody waits for a slow worker. Efficiency is compute / (compute + T(N)).
"""
# N workers, T seconds a batch, f traffic

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MOST_WORKERS = 10**6  # where a method still has the efficiency, its exchange bounds nothing


def split_seconds(steps: Sequence[float], period: int) -> tuple[float, float]:
    """(exchange, bookkeeping) seconds a batch, of consecutive steps of which one exchange serves `period`.

    With a period of 1 all of it is exchange. Otherwise bookkeeping is the median step, and exchange what the steps of
    a block take beyond that; the median of blocks, the last of which may have more steps.
    """
    bookkeeping = statistics.median(steps) if period > 1 else 0.0
    num_blocks = len(steps) // period
    starts = [number * period for number in range(num_blocks)]
    blocks = [steps[start:stop] for start, stop in zip(starts, [*starts[1:], len(steps)])]
    beyond = [sum(seconds - bookkeeping for seconds in block) for block in blocks]
    return statistics.median(beyond) / period, bookkeeping


def count_slices(num_workers: int) -> float:
    return (num_workers - 1) / num_workers


def count_others(num_workers: int) -> float:
    return num_workers - 1


@dataclass(frozen=True)
class Line:
    """start + slope·x, through two points. Costs do not fall with more workers: a slope below 0 is taken for 0."""

    start: float
    slope: float

    @classmethod
    def through(cls, points: Mapping[float, float]) -> "Line":
        (x, y), (x_end, y_end) = sorted(points.items())
        slope = max((y_end - y) / (x_end - x), 0.0)
        return cls((y + y_end - slope * (x + x_end)) / 2, slope)

    def at(self, x: float) -> float:
        return self.start + self.slope * x


@dataclass(frozen=True)
class Cost:
    """What is measured of one method, as the terms of T(N)."""

    traffic: Callable[[int], float]
    bytes_per_traffic: float
    processor_seconds: Line  # of one exchange, over traffic
    num_collectives: float
    latency_seconds: Line  # of one small collective, over N − 1
    num_batches: int
    bookkeeping_seconds: float

    def wire_seconds(self, num_workers: int, bits_per_second: float) -> float:
        """The bytes' part of T(N)."""
        num_bytes = self.bytes_per_traffic * self.traffic(num_workers)
        return 8 * num_bytes / bits_per_second / self.num_batches

    def seconds(self, num_workers: int, bits_per_second: float) -> float:
        """T(N)."""
        exchange = self.processor_seconds.at(self.traffic(num_workers))
        exchange += self.num_collectives * self.latency_seconds.at(num_workers - 1)
        return (
            self.wire_seconds(num_workers, bits_per_second)
            + exchange / self.num_batches
            + self.bookkeeping_seconds
        )


def count_workers(seconds: Callable[[int], float], allowed_seconds: float) -> int:
    """The largest N from 1 to MOST_WORKERS with seconds(N), which rises with N, within what is allowed."""
    low, high = 1, MOST_WORKERS + 1
    while high - low > 1:
        middle = (low + high) // 2
        if seconds(middle) <= allowed_seconds:
            low = middle
        else:
            high = middle
    return low
