"""What the workers of bmuf_links.py do: whole blocks of optimizer.step() with gradients at hand."""
# N workers

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from exchange_cost import count_others, count_slices
from gtc_links import SETTLING_STEPS, Stamp, make_gradients
from links import bytes_transmitted
from memory import peak_memory
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging
from teacherstudent.distributed.optimizers import DistributedOptimizer

BLOCK_STEPS = 50
NUM_FRAGMENTS, DELAY_STEPS = 5, 9
LEARNING_STEPS = BLOCK_STEPS // NUM_FRAGMENTS  # after so many the weights move, at no cost
COMPUTE_SECONDS = 0.1  # of a batch
MEMORY_BLOCK_STEPS = 10
SMALL_ELEMENTS, SMALL_REPEATS = 2048, 50  # of a collective that takes two rounds and moves next to nothing
RATE = 1e-3

GTC_NAME = "GTC 1e-3"

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Method:
    """`make(inner, comm, block_steps)`; one exchange serves `period` steps, and may end `delay_steps` later."""

    make: Callable[[Stamp, Communicator, int], Optimizer]
    period: int = BLOCK_STEPS
    delay_steps: int = 0
    traffic: Callable[[int], float] = count_slices


def make_post_local(inner: Stamp, comm: Communicator, block_steps: int) -> Optimizer:
    # Its averager leaves out parameters without a gradient; here every parameter has one, on every worker.
    return PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=block_steps))


def make_bmuf(**options: Any) -> Callable[[Stamp, Communicator, int], Optimizer]:
    return lambda inner, comm, block_steps: BMUF(
        inner, comm, block_steps=block_steps, initial_weights="check", **options
    )


METHODS = {
    "exact": Method(lambda inner, comm, _: ExactAveraging(inner, comm, initial_weights="check"), period=1),
    "post-local SGD": Method(make_post_local),
    "BMUF": Method(make_bmuf()),
    "BMUF bf16": Method(make_bmuf(wire="bf16")),
    "BMUF int8": Method(make_bmuf(wire="int8")),
    "BMUF fifths, late": Method(
        make_bmuf(fragments=NUM_FRAGMENTS, delay_steps=DELAY_STEPS), delay_steps=DELAY_STEPS
    ),
    GTC_NAME: Method(
        lambda inner, comm, _: GTC(inner, comm, density=1e-3, initial_weights="check"),
        period=1,
        traffic=count_others,
    ),
}
IN_MEMORY = [name for name in METHODS if name != GTC_NAME]  # whose memory the section `gtc` prints


class Training:
    """The student, gradients of its own on each worker, and one method after the other on the same weights."""

    def __init__(self, comm: Communicator) -> None:
        from bench import STUDENT, make  # here, since bench.py imports this file

        torch.set_num_threads(1)
        model = make(STUDENT)
        self.comm = comm
        self.parameters = list(model.parameters())
        self.num_elements = sum(parameter.numel() for parameter in self.parameters)
        self._initial = [parameter.detach().clone() for parameter in self.parameters]
        self._gradients = make_gradients(model, comm.rank)
        self.draw_gradients()

    def draw_gradients(self) -> None:
        for parameter, gradient in zip(self.parameters, next(self._gradients)):
            parameter.grad = gradient

    def start(self, method: Method, block_steps: int = BLOCK_STEPS) -> Optimizer:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self._initial)
        return method.make(Stamp(self.parameters, lr=RATE), self.comm, block_steps)

    def learn(self) -> None:
        """What the inner optimiser would have done."""
        with torch.no_grad():
            for parameter in self.parameters:
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-RATE)

    def settle(self, optimizer: Optimizer) -> None:
        """One exchange that is not counted; of GTC until thresholds have settled."""
        for _ in range(SETTLING_STEPS if isinstance(optimizer, GTC) else 1):
            self.draw_gradients()
            optimizer.step()
        if isinstance(optimizer, BMUF):
            optimizer.synchronize()

    def take_steps(self, optimizer: Optimizer, method: Method, num_steps: int) -> Iterator[dict[str, float]]:
        """Clock and processor seconds of each step, and how many collectives it began."""
        for number in range(num_steps):
            if method.period == 1:
                self.draw_gradients()
            elif number % LEARNING_STEPS == 0:
                self.learn()
            if method.delay_steps:  # a barrier would end what is under way
                time.sleep(COMPUTE_SECONDS)
            else:
                self.comm.barrier()
            started = self.comm._num_started
            clock, processor = time.perf_counter(), time.process_time()
            optimizer.step()
            yield {
                "clock": time.perf_counter() - clock,
                "processor": time.process_time() - processor,
                "collectives": self.comm._num_started - started,
            }


def measure(comm: Communicator, num_blocks: Mapping[str, int], settled: bool) -> Iterator[Any]:
    """Yields seconds of small collectives, then seconds and bytes of each method, over so many blocks.

    settled  whether an exchange comes first that is not counted
    """
    training = Training(comm)
    yield time_small_collectives(comm)
    for name, number in num_blocks.items():
        method = METHODS[name]
        optimizer = training.start(method)
        if settled or isinstance(optimizer, GTC):
            training.settle(optimizer)
        payload_before, _ = read_metrics(optimizer)
        comm.barrier()
        before = bytes_transmitted()
        num_steps = number * method.period + method.delay_steps
        steps = list(training.take_steps(optimizer, method, num_steps))
        for _ in range(2):  # behind the second one, what was sent before the first has left the queue
            comm.barrier()
        num_batches = number * method.period
        sent = (bytes_transmitted() - before) / num_batches
        payload, density = read_metrics(optimizer)
        yield {
            "method": name,
            "steps": steps,
            "sent": sent,
            "payload": (payload - payload_before) / num_batches,
            "density": density,
        }


def read_metrics(optimizer: Optimizer) -> tuple[float, float]:
    """Payload bytes so far, and the density; NaN where the optimiser does not count."""
    metrics = optimizer.metrics() if isinstance(optimizer, DistributedOptimizer) else {}
    return metrics.get("bytes_sent", math.nan), metrics.get("density", math.nan)


def time_small_collectives(comm: Communicator) -> list[float]:
    seconds = []
    for _ in range(SMALL_REPEATS):
        comm.barrier()
        start = time.perf_counter()
        comm.all_reduce(torch.zeros(SMALL_ELEMENTS))
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_memory(comm: Communicator) -> Iterator[dict[str, Any]]:
    """Yields bytes that each method adds at the highest: from its construction over two blocks, and in a third."""
    training = Training(comm)
    for name in IN_MEMORY:
        method = METHODS[name]
        num_steps = min(method.period, MEMORY_BLOCK_STEPS)
        with peak_memory() as whole:
            optimizer = training.start(method, MEMORY_BLOCK_STEPS)
            exchange_in_place(training, optimizer, 2 * num_steps + method.delay_steps)
        with peak_memory() as last:
            exchange_in_place(training, optimizer, num_steps)
        yield {"method": name, "whole": whole[0], "last": last[0], "model": 4 * training.num_elements}
        del optimizer


def exchange_in_place(training: Training, optimizer: Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        training.learn()
        optimizer.step()
