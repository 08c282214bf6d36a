"""Section `gtc` of `make bench`: encoding and decoding one step of the full-size student, on one machine.

Gradients are fresh in every step, Gaussian, each parameter with a scale of its own. Residuals begin where such walks
come to rest (a triangle between −τ and τ) and take SETTLING_STEPS more. Every figure is the median of ROUNDS rounds, as
a ratio to the floor measured just before it: one a.add_(b) over as many elements, which moves the bytes that firing
must move (12 an element). Applying writes 4, a third of that. One thread is timed by its own seconds on a processor,
which what else the machine does disturbs least; two threads by the clock on the wall.
"""
# n elements, K elements that send, τ threshold, σ scale of a parameter's gradients

import math
import os
import statistics
import time
from collections.abc import Callable

import torch
from memory import peak_memory
from torch import Tensor, nn

from teacherstudent.distributed import codec, kernels, kernels_torch
from teacherstudent.distributed.codec import Place, Quanta
from teacherstudent.distributed.flat import Bucket, make_buckets
from teacherstudent.distributed.kernels import Part
from teacherstudent.distributed.thresholds import nearest_level, threshold_at

DENSITIES = (1e-4, 1e-3, 1e-2)
NUM_RANKS = 2
SETTLING_STEPS, ROUNDS = 5, 7
AIMS = {1e-4: 2.5, 1e-3: 2.5, 1e-2: 4.0}  # times the floor, one thread


class Walk:
    """Residuals of the student in the steady state of one density, and the gradients of one step after another."""

    def __init__(self, bucket: Bucket, density: float) -> None:
        self.bucket = bucket
        self.draw = torch.Generator().manual_seed(0)
        self.scales = torch.empty(len(bucket.pieces)).log_normal_(0, 0.5, generator=self.draw).tolist()
        sizes = [piece.stop - piece.start for piece in bucket.pieces]
        variance = sum(n * scale**2 for n, scale in zip(sizes, self.scales)) / sum(sizes)
        # A walk of steps σ leaves (−τ, τ) after (τ/σ)² steps on average.
        self.threshold = threshold_at(nearest_level(math.sqrt(variance / density)))
        self.residual = bucket.new_zeros()
        for _ in range(2):
            self.residual += self.threshold * (torch.rand(len(self.residual), generator=self.draw) - 0.5)
        for piece in bucket.pieces:
            piece.parameter.grad = torch.empty_like(piece.parameter)
        for _ in range(SETTLING_STEPS):
            self.step()

    def draw_gradients(self) -> None:
        for piece, scale in zip(self.bucket.pieces, self.scales):
            assert piece.parameter.grad is not None
            piece.parameter.grad.normal_(0, scale, generator=self.draw)

    def parts(self) -> list[Part]:
        return [Part(piece.start, piece.stop, piece.parameter.grad, 1.0) for piece in self.bucket.pieces]

    def fire(self, residual: Tensor) -> Quanta:
        return kernels.fire(residual, self.parts(), self.threshold)

    def fire_plainly(self, residual: Tensor, parts: list[Part]) -> Quanta:
        return Quanta(*kernels_torch.fire(residual, parts, self.threshold, 1.0, 1, True))

    def step(self) -> Quanta:
        self.draw_gradients()
        return self.fire(self.residual)

    def place(self) -> Place:
        return Place(1, 0, len(self.residual), self.threshold, 0)


class Stopwatch:
    """Seconds of the clock and of the processor, and ratios to the floor, by what was timed and number of threads."""

    def __init__(self, num_elements: int) -> None:
        self.left, self.right = torch.zeros(num_elements), torch.ones(num_elements)
        self.times: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def time(self, name: str, function: Callable[[], object], num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        floor = seconds_of(lambda: self.left.add_(self.right))  # and leaves nothing of ours in the cache
        self.times.setdefault(("floor of " + name, num_threads), []).append(floor)
        self.times.setdefault((name, num_threads), []).append(seconds_of(function))

    def clock(self, name: str, num_threads: int = 1) -> float:
        return statistics.median(clock for clock, _ in self.times[name, num_threads])

    def seconds(self, name: str, num_threads: int = 1) -> list[float]:
        """Of one thread on the processor, of several by the clock."""
        return [times[num_threads == 1] for times in self.times[name, num_threads]]

    def ratio(self, name: str, num_threads: int = 1) -> float:
        floors = self.seconds("floor of " + name, num_threads)
        pairs = zip(self.seconds(name, num_threads), floors, strict=True)
        return statistics.median(seconds / floor for seconds, floor in pairs)

    def row(self, name: str, text: str, num_threads: int = 1) -> str:
        milliseconds = 1e3 * statistics.median(self.seconds(name, num_threads))
        return f"  {text:46} {milliseconds:7.1f} ms {self.ratio(name, num_threads):7.2f}"


def seconds_of(function: Callable[[], object]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.thread_time()
    function()
    return time.perf_counter() - clock, time.thread_time() - processor


def decode_and_apply(walk: Walk, message: Tensor, apply: Callable[..., None] = kernels.apply) -> None:
    received = [codec.decode(message, walk.place()) for _ in range(NUM_RANKS)]
    apply(walk.parts(), received, walk.threshold, NUM_RANKS, torch.float32)


def time_round(watch: Stopwatch, walk: Walk, num_threads: list[int]) -> Quanta:
    """One step in every way, each from the same residual."""
    walk.draw_gradients()
    work = torch.empty_like(walk.residual)
    place = walk.place()

    def time_from_residual(name: str, function: Callable[[], object], threads: int = 1) -> None:
        work.copy_(walk.residual)
        watch.time(name, function, threads)

    for threads in num_threads:
        time_from_residual("fire", lambda: walk.fire(work), threads)
        time_from_residual("encode", lambda: codec.encode(walk.fire(work), place), threads)
    whole = [Part(0, len(work), torch.cat([part.gradient.view(-1) for part in walk.parts()]), 1.0)]
    for name, parts in (("plain", walk.parts()), ("plain, whole", whole)):
        time_from_residual(name, lambda parts=parts: codec.encode(walk.fire_plainly(work, parts), place))
    quanta = walk.fire(walk.residual)
    watch.time("topk", lambda: walk.residual.abs().topk(len(quanta)))
    for name in codec.LADDER:
        watch.time(f"write {name}", lambda name=name: codec.encode(quanta, place, name))
        message = codec.encode(quanta, place, name)
        watch.time(f"read {name}", lambda message=message: codec.decode(message, place))
    message = codec.encode(quanta, place)
    for threads in num_threads:
        watch.time("apply", lambda: decode_and_apply(walk, message), threads)
    watch.time("apply plainly", lambda: decode_and_apply(walk, message, kernels_torch.apply))
    return quanta


def print_times(watch: Stopwatch, num_threads: list[int], aim: float) -> None:
    floor = statistics.median(watch.seconds("floor of fire"))
    speed = 12 * watch.left.numel() / floor / 1e9
    print(f"  {'floor, a.add_(b), 1 thread':46} {1e3 * floor:7.1f} ms    1.00   {speed:.0f} GB/s")
    print(watch.row("fire", "fire"))
    print(watch.row("encode", "fire and encode") + f"   (aim: {aim})")
    if len(num_threads) > 1:
        gain = watch.clock("encode") / watch.clock("encode", 2)
        print(
            watch.row("encode", "the same, 2 threads, to the floor of 2", 2) + f"   {gain:.2f} times as fast"
        )
    for name, text in (
        ("plain", "the same in plain torch, part by part"),
        ("plain, whole", "the same in plain torch, the bucket as a whole"),
        ("topk", "torch.topk of the residual, nothing encoded"),
    ):
        print(watch.row(name, text) + f"   {watch.ratio(name) / watch.ratio('encode'):.1f} times as long")
    print(watch.row("apply", f"decode and apply the messages of {NUM_RANKS}"))
    if len(num_threads) > 1:
        print(watch.row("apply", "the same, 2 threads, to the floor of 2", 2))
    print(watch.row("apply plainly", "the same in plain torch, part by part"))


def print_codecs(watch: Stopwatch, quanta: Quanta, place: Place) -> None:
    sending = len(quanta) / place.num_elements
    entropy = -sending * math.log2(sending) - (1 - sending) * math.log2(1 - sending)
    bound = place.num_elements * entropy / 8 + len(quanta) / 8  # a bit for each sign
    print(f"  {'codec':10} {'bytes':>12} {'of fp32':>9} {'entropy':>9} {'encode':>12} {'decode':>12}")
    for name in codec.LADDER:
        size = codec.encode(quanta, place, name).numel()
        times = " ".join(f"{watch.ratio(f'{way} {name}'):5.2f} floors" for way in ("write", "read"))
        print(f"  {name:10} {size:12,} {size / (4 * place.num_elements):9.5f} {size / bound:9.2f} {times}")


def print_memory(walk: Walk) -> None:
    """What a step takes beside parameters, gradients and the residual."""
    walk.draw_gradients()
    with peak_memory() as encoding:
        message = codec.encode(walk.fire(walk.residual), walk.place())
    with peak_memory() as applying:
        decode_and_apply(walk, message)
    residual = 4 * len(walk.residual)
    print(
        f"  peak memory beside the residual of {residual / 1e6:.1f} MB: {encoding[0] / 1e6:.1f} MB in fire and encode, "
        f"{applying[0] / 1e6:.1f} MB in decode and apply, {message.numel() / 1e6:.2f} MB of them the message"
    )


def measure(model: nn.Module, density: float) -> None:
    (bucket,) = make_buckets([{"params": list(model.parameters())}])
    walk = Walk(bucket, density)
    watch = Stopwatch(bucket.num_elements)
    num_threads = [1, 2] if (os.cpu_count() or 1) > 1 else [1]
    sent = [time_round(watch, walk, num_threads) for _ in range(ROUNDS)]
    found = statistics.mean(map(len, sent)) / bucket.num_elements
    print(f" density {density:g} ({found:.2e} of {bucket.num_elements / 1e6:.1f} M elements sent)")
    print_times(watch, num_threads, AIMS[density])
    print_codecs(watch, sent[-1], walk.place())
    torch.set_num_threads(1)
    print_memory(walk)


def gtc() -> None:
    """Gradient threshold compression of the full-size student: time as ratios to a.add_(b), bytes, memory."""
    from bench import STUDENT, make  # here, since bench.py imports this file

    before = torch.get_num_threads()
    model = make(STUDENT)
    kernels.compile_for(torch.device("cpu"), torch.float32)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f" load of this machine of {os.cpu_count()} cores over 1, 5 and 15 minutes: {load}")
    for density in DENSITIES:
        measure(model, density)
    torch.set_num_threads(before)


if __name__ == "__main__":
    gtc()
