"""Section `bmuf` of `make bench`: what BMUF's exchange costs a batch of the full-size student over real, shaped links.

python benchmarks/bmuf_links.py

Each worker is a process with one compute thread; all run at once and share this machine's cores. Timed is each
optimizer.step() of whole blocks of 50, with gradients at hand and an inner optimiser that does nothing. "book": the
median step of a block, which is what the optimiser does where nothing is exchanged (is every gradient finite?).
"exchange": what the steps of a block take beyond that, a batch; of exact averaging and GTC the whole step. "a batch":
both. "longest": the longest stall. "own core": processor time and the bytes sent at the link's speed, a batch, as if
each worker had a core to itself. The late one exchanges fifths of the model, each merged 9 steps after it was sent;
only there a pause of 0.1 s stands for the computing of a batch, behind which an exchange can hide (what the transport
computes meanwhile is not in its "own core").

Memory is the resident memory of a worker (VmHWM, reset before) above what it was with model and gradients.
"""
# N workers, T seconds a batch

import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bmuf_worker import COMPUTE_SECONDS, GTC_NAME, METHODS, measure, measure_memory
from exchange_cost import MOST_WORKERS, Cost, Line, count_others, count_workers, split_seconds
from links import Links, find_obstacle

EFFICIENCY, MANY = 0.9, 64
FAST = 10**9
LINKS = ((2, 10**8), (4, 10**8), (2, FAST), (4, FAST))  # workers, bits a second of each one's own port
DENSE_REPEATS, BLOCKS, GTC_REPEATS = 3, 2, 9  # where a link is fast
SPEEDS = (10**9, 10**10, 25 * 10**9)
AIM_RATIO, AIM_BUFFERS = 40, 3
EXTRAPOLATED = ("exact", GTC_NAME, "BMUF", "BMUF bf16", "BMUF int8")


@dataclass(frozen=True)
class Row:
    """Seconds and bytes a batch, seconds of the slowest worker."""

    exchange_seconds: float
    bookkeeping_seconds: float
    longest_seconds: float  # of one step
    exchange_processor_seconds: float
    bookkeeping_processor_seconds: float
    sent_bytes: float  # of one worker over its interface, headers and barriers included
    payload_bytes: float  # NaN where it is not counted
    density: float
    num_collectives: float

    @property
    def seconds(self) -> float:
        return self.exchange_seconds + self.bookkeeping_seconds

    def own_core_seconds(self, bits_per_second: float) -> float:
        processor = self.exchange_processor_seconds + self.bookkeeping_processor_seconds
        return processor + 8 * self.sent_bytes / bits_per_second


def summarise(results: list[dict[str, Any]]) -> Row:
    period = METHODS[results[0]["method"]].period

    def split(what: str) -> tuple[float, float]:
        parts = [split_seconds([step[what] for step in result["steps"]], period) for result in results]
        return max(exchange for exchange, _ in parts), max(bookkeeping for _, bookkeeping in parts)

    clock, processor = split("clock"), split("processor")
    return Row(
        *clock,
        max(step["clock"] for result in results for step in result["steps"]),
        *processor,
        statistics.mean(result["sent"] for result in results),
        statistics.mean(result["payload"] for result in results),
        results[0]["density"],
        split("collectives")[0],
    )


@dataclass(frozen=True)
class Measured:
    """What one link has shown: the median seconds of a small collective, and a row a method."""

    latency_seconds: float
    rows: dict[str, Row]


def count_blocks(bits_per_second: int) -> dict[str, int]:
    """Few where an exchange takes many seconds."""
    is_fast = bits_per_second >= FAST
    blocks = {name: BLOCKS if is_fast and not method.delay_steps else 1 for name, method in METHODS.items()}
    return blocks | {"exact": DENSE_REPEATS if is_fast else 1, GTC_NAME: GTC_REPEATS}


def measure_link(num_workers: int, bits_per_second: int) -> Measured:
    rows: dict[str, Row] = {}
    print(
        f"-- {num_workers} workers at {bits_per_second / 1e6:.0f} Mbit/s each; seconds, and x exact averaging"
    )
    print(
        "                       exchange       x +  book =   a batch       x   longest | own core       x | "
        "MB sent, payload"
    )
    with Links(num_workers, bits_per_second) as links:
        settings = {"num_blocks": count_blocks(bits_per_second), "settled": bits_per_second >= FAST}
        results = links.run(measure, **settings)
        latencies = zip(*next(results))
        for found in results:
            name = found[0]["method"]
            rows[name] = summarise(found)
            print_row(name, rows[name], rows["exact"], bits_per_second)
    return Measured(statistics.median(map(max, latencies)), rows)


def print_row(name: str, row: Row, exact: Row, bits_per_second: int) -> None:
    own, exact_own = row.own_core_seconds(bits_per_second), exact.own_core_seconds(bits_per_second)
    payload = "" if math.isnan(row.payload_bytes) else f" {row.payload_bytes / 1e6:8.4f}"
    density = f" (density {row.density:.2e})" if name == GTC_NAME else ""
    print(
        f"   {name:18} {row.exchange_seconds:10.5f} {exact.seconds / row.exchange_seconds:7.1f} "
        f"{row.bookkeeping_seconds:8.5f} {row.seconds:11.5f} {exact.seconds / row.seconds:7.1f} "
        f"{row.longest_seconds:9.4f} | {own:8.5f} {exact_own / own:7.1f} | "
        f"{row.sent_bytes / 1e6:8.4f}{payload}{density}",
        flush=True,
    )


def print_aim(measured: Mapping[tuple[int, int], Measured]) -> None:
    """Against exact averaging, whose step has its own bookkeeping in it."""
    print(f"-- aim: BMUF's exchange takes a batch at least {AIM_RATIO} x less time than exact averaging")
    for (num_workers, bits_per_second), found in measured.items():
        exact, plain = found.rows["exact"], found.rows["BMUF"]
        ratio = exact.seconds / plain.exchange_seconds
        own = exact.own_core_seconds(bits_per_second) / plain.own_core_seconds(bits_per_second)
        print(
            f"   {num_workers} x {bits_per_second / 1e6:4.0f} Mbit/s: {ratio:5.1f} "
            f"({'met' if ratio >= AIM_RATIO else 'missed'}); bookkeeping included "
            f"{exact.seconds / plain.seconds:.1f}, with a core for each worker {own:.1f}"
        )


def print_memory() -> None:
    print(
        "-- peak memory beside model and gradients, in buffers of the model's size (2 workers; aim: BMUF <= "
        f"{AIM_BUFFERS})"
    )
    with Links(2, 10 * FAST) as links:
        for results in links.run(measure_memory):
            whole, last = (
                max(result[key] / result["model"] for result in results) for key in ("whole", "last")
            )
            print(
                f"   {results[0]['method']:18} {whole:5.2f} at the highest, {last:5.2f} of them for a block alone",
                flush=True,
            )


# ---- extrapolated to more workers ----------------------------------------------------------------------------------


def reckon_cost(name: str, measured: Mapping[int, Measured]) -> Cost:
    """From what was measured with two numbers of workers."""
    method = METHODS[name]
    rows = {num_workers: found.rows[name] for num_workers, found in measured.items()}
    traffic = {num_workers: method.traffic(num_workers) for num_workers in rows}
    sent = [method.period * row.sent_bytes / traffic[number] for number, row in rows.items()]
    processor = {
        traffic[number]: method.period * row.exchange_processor_seconds for number, row in rows.items()
    }
    return Cost(
        traffic=method.traffic,
        bytes_per_traffic=statistics.mean(sent),
        processor_seconds=Line.through(processor),
        num_collectives=method.period * max(row.num_collectives for row in rows.values()),
        latency_seconds=reckon_latency(measured),
        num_batches=method.period,
        bookkeeping_seconds=statistics.mean(row.bookkeeping_processor_seconds for row in rows.values()),
    )


def reckon_latency(measured: Mapping[int, Measured]) -> Line:
    return Line.through({number - 1: found.latency_seconds for number, found in measured.items()})


def print_worker_counts(measured: Mapping[int, Measured]) -> None:
    """How many workers each method serves; with exact averaging often one, which exchanges nothing."""
    allowed = COMPUTE_SECONDS / EFFICIENCY - COMPUTE_SECONDS
    latency = reckon_latency(measured)
    numbers = " and ".join(map(str, measured))
    print(
        f"-- workers at {EFFICIENCY:.0%} efficiency where a batch computes for {COMPUTE_SECONDS} s: T(N), what\n"
        f"   the exchange adds, may be {allowed:.4f} s. Reckoned, not measured, from {numbers} workers at 1 Gbit/s:\n"
        "   T(N) = (bytes(N) * 8 / speed + processor(N) + collectives * latency(N)) / batches + bookkeeping\n"
        f"   latency(N) = {1e3 * latency.start:.2f} ms + {1e3 * latency.slope:.2f} ms * (N-1); nothing overlaps, no "
        "worker is late, messages stay as dense as here"
    )
    costs = {name: reckon_cost(name, measured) for name in EXTRAPOLATED}
    for name, cost in costs.items():
        traffic = "(N-1)" if cost.traffic is count_others else "(N-1)/N"
        line = cost.processor_seconds
        print(
            f"   {name:10} bytes {cost.bytes_per_traffic / 1e6:8.3f} MB * {traffic}; processor {line.start:.4f} s + "
            f"{line.slope:.4f} s * {traffic}; {cost.num_collectives:.0f} collectives; {cost.num_batches} batches; "
            f"bookkeeping {cost.bookkeeping_seconds:.4f} s"
        )
    for title, seconds in (("bytes alone", Cost.wire_seconds), ("all of T(N)", Cost.seconds)):
        print(f"   {title:12}" + " ".join(f"{speed / 1e9:>13.0f} Gbit/s" for speed in SPEEDS))
        for name, cost in costs.items():
            cells = [
                describe_count(partial(seconds, cost, bits_per_second=speed), allowed) for speed in SPEEDS
            ]
            print(f"   {name:12}" + " ".join(f"{cell:>20}" for cell in cells))


def describe_count(seconds: Callable[[int], float], allowed: float) -> str:
    """The number of workers; where not even two have the efficiency, also what they and `MANY` have."""
    number = count_workers(seconds, allowed)
    if number == MOST_WORKERS:
        return "any"
    if number == 1:
        two, many = (COMPUTE_SECONDS / (COMPUTE_SECONDS + seconds(n)) for n in (2, MANY))
        return f"1 (2: {two:.0%}, {MANY}: {many:.0%})"
    return str(number)


def bmuf_links() -> None:
    """BMUF of the full-size student over shaped links: exchange a batch, bytes, memory, and what more workers do."""
    obstacle = find_obstacle()
    if obstacle is not None:
        print(f"skipped: {obstacle}")
        return
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"one compute thread a worker, {os.cpu_count()} cores for all; load over 1, 5 and 15 minutes: {load}"
    )
    measured = {link: measure_link(*link) for link in LINKS}
    print_aim(measured)
    print_memory()
    print_worker_counts({number: found for (number, speed), found in measured.items() if speed == FAST})


if __name__ == "__main__":
    bmuf_links()
