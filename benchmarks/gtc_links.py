"""Section `gtc-links` of `make bench`: what exchanging one step of the full-size student costs over real, shaped links.

python benchmarks/gtc_links.py

Each worker is a process with one compute thread. "step": from gradients at hand, as backward leaves them, to
gradients that are updated, codec included; all workers run at once and share this machine's cores, as they would not
on machines of their own. "wire": the same collectives with buffers made beforehand, nothing computed. "cpu": the
process's own seconds on a processor within the step. "own core": cpu + wire, an upper bound of the step where every
worker has a core of its own (what the transport computes is in both).
"""
# N workers, n elements of a tensor

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from links import Links, bytes_transmitted, find_obstacle
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from teacherstudent.distributed import GTC, Communicator, ExactAveraging
from teacherstudent.distributed.optimizers import DistributedOptimizer

DENSE = ("exact", "DDP", "DDP fp16")
COMPRESSED = ("PowerSGD 1", "PowerSGD 4", "GTC 1e-3")
DENSE_REPEATS, COMPRESSED_REPEATS = 3, 9
# Workers, and bits a second of each one's own port. The third is 1 Gbit/s shared by four.
LINKS = ((2, 10**8), (2, 10**9), (4, 25 * 10**7), (4, 10**8), (4, 10**9))
AIM_AT = (4, 10**9)
SETTLING_STEPS = 60
NUM_GRADIENTS, BATCH, FRAMES = 3, 4, 32  # made by backward on each worker


class Stamp(torch.optim.SGD):
    """Notes when it is called. What SGD then does with the gradients is no part of the exchange and is left out."""

    called: tuple[float, float]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.called = time.perf_counter(), time.process_time()


class OurOptimizer:
    """One of ours; `move(payload bytes of a step)` runs its collectives alone."""

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        make: Callable[..., DistributedOptimizer],
        move: Callable[[float], object],
    ) -> None:
        self._parameters = list(model.parameters())
        self._stamp = Stamp(self._parameters, lr=0.1)
        self._optimizer = make(self._stamp, comm, initial_weights="check")
        self._move = move
        self._payloads: deque[float] = deque(maxlen=COMPRESSED_REPEATS)
        self._densities: deque[float] = deque(maxlen=COMPRESSED_REPEATS)

    def take_step(self, gradients: list[Tensor]) -> tuple[float, float]:
        """Wall and processor seconds until the gradients are updated."""
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
        before = self._optimizer.metrics()["bytes_sent"]
        wall, cpu = time.perf_counter(), time.process_time()
        self._optimizer.step()
        after = self._optimizer.metrics()
        self._payloads.append(after["bytes_sent"] - before)
        self._densities.append(after.get("density", 1.0))
        return self._stamp.called[0] - wall, self._stamp.called[1] - cpu

    def move(self) -> None:
        self._move(statistics.mean(self._payloads))

    def describe(self) -> dict[str, float]:
        return {"payload": statistics.mean(self._payloads), "density": statistics.mean(self._densities)}


class HandOver(torch.autograd.Function):
    """Its backward pass takes no time: the gradients are at hand."""

    @staticmethod
    def forward(context: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(context: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *context.gradients


class GivenGradients(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return HandOver.apply(gradients, *self.model.parameters())


class TorchDDP:
    """torch's DistributedDataParallel, with or without one of its hooks."""

    def __init__(self, model: nn.Module, name: str) -> None:
        # PowerSGD's callbacks wait for collectives, which deadlocks on gloo with more than one bucket.
        bucket_megabytes = 1000 if name.startswith("PowerSGD") else None
        given = GivenGradients(model)
        self._ddp = nn.parallel.DistributedDataParallel(
            given, init_sync=False, bucket_cap_mb=bucket_megabytes
        )
        sizes, dtype = [sum(parameter.numel() for parameter in model.parameters())], torch.float32
        if name == "DDP fp16":
            self._ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
            dtype = torch.float16
        elif name.startswith("PowerSGD"):
            rank = int(name.split()[1])
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
            state.iter = state.start_powerSGD_iter  # without the two exact steps before it
            self._ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
            sizes = power_sgd_sizes(model, rank)
        self._buffers = [torch.zeros(size, dtype=dtype) for size in sizes]

    def take_step(self, gradients: list[Tensor]) -> tuple[float, float]:
        """Wall and processor seconds of a backward pass that computes nothing."""
        self._ddp.zero_grad()
        loss = self._ddp(gradients)
        wall, cpu = time.perf_counter(), time.process_time()
        loss.backward()
        return time.perf_counter() - wall, time.process_time() - cpu

    def move(self) -> None:
        for buffer in self._buffers:
            dist.all_reduce(buffer)

    def describe(self) -> dict[str, float]:
        return {}


def power_sgd_sizes(model: nn.Module, rank: int) -> list[int]:
    """Elements of its three all-reduces: what stays whole, and the two factors of all matrices."""
    matrices = [(p.shape[0], p.numel() // p.shape[0]) for p in model.parameters() if p.dim() > 1]
    small = [(rows, columns) for rows, columns in matrices if 2 * rank * (rows + columns) < rows * columns]
    assert small == matrices, "PowerSGD would send some of these matrices whole"
    whole = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    return [whole, rank * sum(rows for rows, _ in small), rank * sum(columns for _, columns in small)]


# ---- in the workers ---------------------------------------------------------------------------------------------


def measure(comm: Communicator, repeats: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yields seconds and bytes for each method named in `repeats`, which says how many steps are counted."""
    from bench import STUDENT, make  # here, since bench.py imports this file

    torch.set_num_threads(1)
    model = make(STUDENT)
    gradients = make_gradients(model, comm.rank)
    for name, num_steps in repeats.items():
        method = make_method(name, model, comm)
        settling = SETTLING_STEPS if name.startswith("GTC") else int(num_steps > 1)
        for _ in range(settling):
            method.take_step(next(gradients))
        steps, wire = [], []
        comm.barrier()
        before = bytes_transmitted()
        for _ in range(num_steps):
            ready = next(gradients)
            comm.barrier()
            steps.append(method.take_step(ready))
        for _ in range(2):  # behind the second one, what was sent before the first has left the queue
            comm.barrier()
        sent = (bytes_transmitted() - before) / num_steps
        for _ in range(num_steps):
            comm.barrier()
            start = time.perf_counter()
            method.move()
            wire.append(time.perf_counter() - start)
        yield {"method": name, "steps": steps, "wire": wire, "sent": sent, **method.describe()}


def make_gradients(model: nn.Module, rank: int) -> Iterator[list[Tensor]]:
    """Of backward through the model on made-up frames, again and again with signs drawn anew, like noise."""
    generator = torch.Generator().manual_seed(rank)
    kept = []
    for _ in range(NUM_GRADIENTS):
        features = torch.randn(BATCH, FRAMES, 192, generator=generator)
        logits = model(features, torch.full((BATCH,), FRAMES)).flatten(0, 1)
        senones = torch.randint(logits.shape[1], (len(logits),), generator=generator)
        loss = nn.functional.cross_entropy(logits, senones)
        kept.append(torch.autograd.grad(loss, list(model.parameters())))
    while True:
        for gradients in kept:
            sign = 1 - 2 * int(torch.randint(2, (), generator=generator))
            yield [gradient * sign for gradient in gradients]


def make_method(name: str, model: nn.Module, comm: Communicator) -> OurOptimizer | TorchDDP:
    if name == "exact":
        flat = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
        return OurOptimizer(model, comm, ExactAveraging, lambda payload: comm.all_reduce(flat))
    if name == "GTC 1e-3":

        def move(payload: float) -> None:
            comm.all_reduce(torch.zeros(3, dtype=torch.int64))
            comm.all_gather(torch.zeros(int(payload) // (comm.size - 1), dtype=torch.uint8))

        return OurOptimizer(model, comm, lambda *inner, **rest: GTC(*inner, density=1e-3, **rest), move)
    return TorchDDP(model, name)


# ---- in the process that started them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Seconds are medians over steps, of the slowest worker in each; bytes are means over steps and workers."""

    step_seconds: float
    wire_seconds: float
    cpu_seconds: float
    sent_bytes: float  # of one worker over its interface, headers and a barrier included
    payload_bytes: float | None
    density: float | None

    @property
    def own_core_seconds(self) -> float:
        return self.cpu_seconds + self.wire_seconds


def summarise(results: list[dict[str, Any]]) -> Row:
    steps = list(zip(*(result["steps"] for result in results)))  # of each step, (wall, cpu) of each worker
    payloads = [result["payload"] for result in results if "payload" in result]
    return Row(
        step_seconds=statistics.median(max(wall for wall, _ in step) for step in steps),
        wire_seconds=statistics.median(map(max, zip(*(result["wire"] for result in results)))),
        cpu_seconds=statistics.median(max(cpu for _, cpu in step) for step in steps),
        sent_bytes=statistics.mean(result["sent"] for result in results),
        payload_bytes=statistics.mean(payloads) if payloads else None,
        density=results[0].get("density"),
    )


def count_repeats(bits_per_second: int) -> dict[str, int]:
    """Few where a step takes many seconds."""
    return dict.fromkeys(DENSE, 1 if bits_per_second < 10**9 else DENSE_REPEATS) | dict.fromkeys(
        COMPRESSED, COMPRESSED_REPEATS
    )


def measure_links(num_workers: int, bits_per_second: int) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    print(f"-- {num_workers} workers at {bits_per_second / 1e6:.0f} Mbit/s each")
    print(
        "   seconds:        step  x exact     wire  x exact      cpu | own core  x exact | MB sent, payload"
    )
    with Links(num_workers, bits_per_second) as links:
        for results in links.run(measure, repeats=count_repeats(bits_per_second)):
            name = results[0]["method"]
            row = rows[name] = summarise(results)
            exact = rows["exact"]
            payload = "" if row.payload_bytes is None else f" {row.payload_bytes / 1e6:8.3f}"
            print(
                f"   {name:10} {row.step_seconds:9.4f} {exact.step_seconds / row.step_seconds:8.1f} "
                f"{row.wire_seconds:8.4f} {exact.wire_seconds / row.wire_seconds:8.1f} {row.cpu_seconds:8.4f} | "
                f"{row.own_core_seconds:8.4f} {exact.own_core_seconds / row.own_core_seconds:8.1f} | "
                f"{row.sent_bytes / 1e6:8.3f}{payload}"
                + (f" (density {row.density:.2e})" if "GTC" in name else ""),
                flush=True,
            )
    return rows


def gtc_links() -> None:
    """One step's exchange of the full-size student over shaped links: exact averaging, torch's hooks, GTC."""
    obstacle = find_obstacle()
    if obstacle is not None:
        print(f"skipped: {obstacle}")
        return
    print(
        f"one compute thread a worker, {os.cpu_count()} cores for all; x exact: times as fast as exact averaging"
    )
    for num_workers, bits_per_second in LINKS:
        rows = measure_links(num_workers, bits_per_second)
        if (num_workers, bits_per_second) == AIM_AT:
            compare_with_aim(rows)


def compare_with_aim(rows: dict[str, Row]) -> None:
    gtc, exact, power = rows["GTC 1e-3"], rows["exact"], rows["PowerSGD 1"]
    print(
        f"   aims here: GTC's step >= 40 x faster than exact averaging: {exact.step_seconds / gtc.step_seconds:.1f} "
        f"({exact.own_core_seconds / gtc.own_core_seconds:.1f} with a core for each worker); the exchange alone "
        f">= 100 x: {exact.wire_seconds / gtc.wire_seconds:.0f}; no slower than PowerSGD rank 1: "
        f"{power.step_seconds / gtc.step_seconds:.1f} x as fast"
    )


if __name__ == "__main__":
    gtc_links()
