"""A small network and its training by GTC, for tests of overlap and delay."""

from typing import Any

import numpy as np
import torch

from teacherstudent.distributed import GTC, Communicator
from teacherstudent.distributed.optimizers import STATE_KEY

SMALL_BUCKETS = 300  # bytes
COUNTS = (
    "steps",
    "skipped_nonfinite",
    "skipped_empty",
    "quanta_sent",
    "carried_over",
    "density",
    "threshold",
)


class Net(torch.nn.Module):
    """Two ways from the input to the output, of which a forward pass takes one or both."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 12)
        self.ways = torch.nn.ModuleList([torch.nn.Linear(12, 12) for _ in range(2)])
        self.last = torch.nn.Linear(12, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.to(dtype).parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs: torch.Tensor, ways: tuple[int, ...]) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs))
        for way in ways:
            hidden = torch.tanh(self.ways[way](hidden))
        return self.last(hidden)


class Trainee:
    def __init__(
        self, comm: Communicator, dtype: torch.dtype = torch.float32, momentum: float = 0.0, **options: Any
    ) -> None:
        self.comm = comm
        self.net = Net(dtype)
        groups = [{"params": [*self.net.first.parameters(), *self.net.ways.parameters()], "lr": 0.3},
                  {"params": self.net.last.parameters(), "lr": 0.07}]  # fmt: skip
        self.overlaps = options.get("overlap", False)
        self.optimizer = GTC(torch.optim.SGD(groups, lr=0.1, momentum=momentum), comm, **options)

    def loss(self, step: int, ways: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        numbers = np.random.default_rng([self.comm.rank, step])
        inputs, targets = (torch.tensor(numbers.normal(size=(4, size))) for size in (6, 3))
        dtype = self.net.last.weight.dtype
        return ((self.net(inputs.to(dtype), ways) - targets.to(dtype)) ** 2).mean()

    def step(self, step: int, weight: int = 1, ways: tuple[int, ...] = (0, 1), factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        if self.overlaps:
            self.optimizer.begin_step(weight=weight)
        spoil = self.net.first.weight.register_hook(lambda gradient: gradient * factor)  # which comes last
        self.loss(step, ways).backward()
        spoil.remove()
        self.optimizer.step(weight=weight)

    def snapshot(self) -> list[torch.Tensor]:
        """Weights and all that is hidden."""
        hidden = self.optimizer.state_dict()[STATE_KEY]
        velocities = [state["momentum_buffer"] for state in self.optimizer.state.values() if state]
        controller = torch.tensor([float(value or 0) for value in hidden["controller"].values()])
        tensors = [
            *self.net.parameters(),
            *hidden["residuals"],
            *velocities,
            controller,
            torch.tensor(hidden["cursors"]),
        ]
        return [tensor.detach().clone() for tensor in tensors]

    def counts(self) -> dict[str, float]:
        metrics = self.optimizer.metrics()
        return {name: metrics[name] for name in COUNTS if name in metrics}


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
