"""The GTC hook on a real DistributedDataParallel, as a program under torchrun; prints each law that holds."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from teacherstudent.distributed import GTC, Communicator, connect, in_process
from teacherstudent.distributed.ddp_hook import GTCState, gtc_hook
from teacherstudent.distributed.optimizers import STATE_KEY

RATE = 0.25  # a power of two: residuals in update units and in gradients differ by an exact factor
SMALL_BUCKETS = 2e-3  # MiB
NUM_STEPS = 9


class Net(torch.nn.Module):
    """Two ways from the input to the output, of which a forward pass takes one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = torch.nn.Linear(20, 30)
        self.ways = torch.nn.ModuleList([torch.nn.Linear(30, 30) for _ in range(2)])
        self.last = torch.nn.Linear(30, 5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.to(dtype).parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs: torch.Tensor, way: int | None) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs))
        for number, layer in enumerate(self.ways):
            if way in (None, number):
                hidden = torch.tanh(layer(hidden))
        return self.last(hidden)


class Trainee:
    """A network under DDP with the hook, or on its own with GTC as the reference."""

    def __init__(
        self,
        comm: Communicator,
        hook: bool,
        dtype: torch.dtype = torch.float32,
        momentum: float = 0.5,
        **ddp: Any,
    ) -> None:
        self.comm = comm
        self.net = Net(dtype)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.net.parameters(), RATE, momentum)
        self.model: torch.nn.Module = self.net
        self.num_buckets: list[int] = []  # of each synchronised backward pass
        self.local: list[dict[str, torch.Tensor]] = []  # this rank's own gradients in them
        if hook:
            self.model = DistributedDataParallel(self.net, bucket_cap_mb=SMALL_BUCKETS, **ddp)
            self.names: dict[torch.Tensor, str] = {
                parameter: name for name, parameter in self.net.named_parameters()
            }
            self.state = GTCState(self.model, comm, density=0.05)
            self.model.register_comm_hook(self.state, self.listen)
        else:
            self.optimizer = GTC(self.optimizer, comm, density=0.05)

    def listen(
        self, state: GTCState, bucket: torch.distributed.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        if bucket.index() == 0:
            self.local.append({})
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients()):
            self.local[-1][self.names[parameter]] = gradient.clone()
        if bucket.is_last():
            self.num_buckets.append(bucket.index() + 1)
        return gtc_hook(state, bucket)

    def backward(self, seed: int, way: int | None = None, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1000 * self.comm.rank + seed)
        inputs = torch.randn(8, 20, generator=generator).to(self.net.last.weight.dtype)
        targets = torch.randint(5, (8,), generator=generator)
        (functional.cross_entropy(self.model(inputs, way), targets) * factor).backward()

    def step(self, seed: int, way: int | None = None) -> None:
        self.optimizer.zero_grad()
        self.backward(seed, way)
        self.optimizer.step()

    def residual(self, name: str) -> torch.Tensor:
        state = self.state.state_dict()
        return state[STATE_KEY]["residuals"][state["names"].index(name)]

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.net.parameters()])

    def check_replicas(self) -> None:
        for other in self.comm.all_gather(self.weights()):
            assert torch.equal(other, self.weights())


def check_it_equals_gtc(comm: Communicator, **ddp: Any) -> None:
    one, other = Trainee(comm, hook=True, **ddp), Trainee(comm, hook=False)
    for step in range(NUM_STEPS):
        one.step(step)
        other.step(step)
        one.check_replicas()
        assert torch.equal(one.weights(), other.weights()), step
    assert one.num_buckets[0] == 1 and one.num_buckets[-1] == 3  # cut anew in between
    assert one.state.metrics()["quanta_sent"] == other.optimizer.metrics()["quanta_sent"] > 0  # type: ignore[attr-defined]
    assert one.state.metrics()["threshold"] * RATE == other.optimizer.metrics()["threshold"]  # type: ignore[attr-defined]


def check_accumulation(comm: Communicator, **ddp: Any) -> None:
    one, other = Trainee(comm, hook=True, **ddp), Trainee(comm, hook=False)
    assert isinstance(one.model, DistributedDataParallel)
    for step in range(NUM_STEPS):
        for trainee in (one, other):
            trainee.optimizer.zero_grad()
            with one.model.no_sync() if trainee is one else contextlib.nullcontext():
                trainee.backward(2 * step)
            trainee.backward(2 * step + 1)
            trainee.optimizer.step()
        assert torch.equal(one.weights(), other.weights()), step
    assert len(one.num_buckets) == NUM_STEPS


def check_unused_parameters(comm: Communicator, **ddp: Any) -> None:
    """Where some rank uses a parameter it is GTC; where none does the residual waits. Nothing is lost over all."""
    trainee = Trainee(comm, hook=True, dtype=torch.float64, momentum=0.0, find_unused_parameters=True, **ddp)
    start = trainee.weights().clone()
    for step in range(NUM_STEPS):
        before = trainee.residual("ways.1.weight").clone()
        way = (comm.rank + step) % 2 if step % 3 else 0  # in every third step no rank takes way 1
        trainee.step(step, way)
        trainee.check_replicas()
        after = trainee.residual("ways.1.weight")
        if step % 3 == 0 or way == 1:
            assert torch.equal(before, after) == (step % 3 == 0)
    gradients = [
        torch.cat([step[name].view(-1) for name in trainee.names.values()]) for step in trainee.local
    ]
    earned = torch.stack(gradients).sum(0)

    kept = torch.cat([trainee.residual(name).view(-1) for name in trainee.names.values()])
    total = comm.all_reduce(earned - kept) / comm.size
    assert float((start - RATE * total - trainee.weights()).abs().max()) < 1e-12
    assert float(kept.abs().max()) > 0
    assert min(trainee.num_buckets) > 1


def check_non_finite(comm: Communicator, **ddp: Any) -> None:
    """One rank alone, in the bucket that DDP reduces last: every rank sees NaN, and nothing else has happened."""
    trainee = Trainee(comm, hook=True, **ddp)
    for step in range(3):
        trainee.step(step)
    before = copy.deepcopy(trainee.state.state_dict()[STATE_KEY])
    trainee.optimizer.zero_grad()
    spoil = trainee.net.first.weight.register_hook(
        lambda gradient: gradient * (torch.inf if comm.rank == comm.size - 1 else 1.0)
    )
    trainee.backward(3)
    spoil.remove()
    for parameter in trainee.net.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isnan().all())
    after = trainee.state.state_dict()[STATE_KEY]
    for one, other in zip(before["residuals"], after["residuals"], strict=True):
        assert torch.equal(one, other)
    assert after["controller"] == before["controller"]
    assert trainee.state.metrics()["skipped_nonfinite"] == 1
    weights = trainee.weights().clone()
    trainee.step(4)
    trainee.check_replicas()
    assert bool(trainee.weights().isfinite().all()) and not torch.equal(trainee.weights(), weights)


def check_joining(comm: Communicator) -> None:
    """Ranks that have no more data shadow the others with gradients of 0, and give what they still hold."""
    trainee = Trainee(comm, hook=True)
    assert isinstance(trainee.model, DistributedDataParallel)
    with trainee.model.join():
        for step in range(3 + 2 * comm.rank):
            trainee.step(step)
    trainee.check_replicas()
    num_steps = comm.all_gather(torch.tensor(trainee.state.metrics()["steps"]))
    assert num_steps == [3 + 2 * (comm.size - 1)] * comm.size


def check_other_workers_are_refused(comm: Communicator) -> None:
    ddp = DistributedDataParallel(Net(torch.float32))
    alone = in_process(1, lambda comm: comm)[0]
    with pytest.raises(ValueError, match=f"worker {comm.rank} of 3 of the DDP, and worker 0 of 1"):
        GTCState(ddp, alone)


def laws() -> Iterator[tuple[str, Callable[[Communicator], None]]]:
    for view in (False, True):
        for check in (check_it_equals_gtc, check_accumulation, check_unused_parameters, check_non_finite):
            law = f"{check.__name__} gradient_as_bucket_view={view}"
            yield law, functools.partial(check, gradient_as_bucket_view=view)
    yield "check_it_equals_gtc static_graph=True", functools.partial(check_it_equals_gtc, static_graph=True)
    yield "check_joining", check_joining
    yield "check_other_workers_are_refused", check_other_workers_are_refused


if __name__ == "__main__":
    torch.set_num_threads(1)
    with connect(timeout_seconds=30) as comm:
        for law, check in laws():
            check(comm)
            if not comm.rank:
                print(law, flush=True)
