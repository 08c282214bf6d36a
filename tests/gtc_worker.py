"""A GTC worker that is given its gradients, and whose quanta and messages are listened to."""

import warnings
from typing import Any

import numpy as np
import torch

from teacherstudent.distributed import GTC, Communicator
from teacherstudent.distributed.codec import Quanta
from teacherstudent.distributed.communicators import Handle
from teacherstudent.distributed.exchange import Fired

NUM_ELEMENTS = 400
RATES = [0.1, 0.1, 0.3, 0.1, 1.7, 0.0, 0.02, 0.02, 5e-3, 0.4]
WEIGHTS = [(1, 1, 1), (2, 5, 1), (0, 3, 3), (4, 0, 0), (1, 1, 2)]

ALL_AT_ONCE = {
    "density": 0.05,
    "multi_quantum": True,
    "capacity": 0.09,
    "momentum": 0.875,
    "clip_norm": 40.0,
}


def gradient_of(
    rank: int, step: int, dtype: torch.dtype = torch.float32, size: int = NUM_ELEMENTS
) -> torch.Tensor:
    """Noise around a drift; elements of very different sizes."""
    sizes = np.exp(np.random.default_rng(0).normal(size=size))
    noise = np.random.default_rng([1, rank, step]).normal(size=size)
    return torch.tensor(sizes * (noise + 0.3), dtype=dtype)


class Worker:
    def __init__(
        self,
        comm: Communicator,
        dtype: torch.dtype = torch.float32,
        inner: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.comm = comm
        self.parameter = torch.nn.Parameter(torch.zeros(NUM_ELEMENTS, dtype=dtype))
        sgd = torch.optim.SGD([self.parameter], **{"lr": 0.1, **(inner or {})})
        self.optimizer = quiet_gtc(sgd, comm, **options)
        self.fired: list[Fired] = []  # of each step
        self.messages: list[list[torch.Tensor]] = []  # of each step, one for each rank
        self._listen()

    def _listen(self) -> None:
        note, start = self.optimizer._note, self.comm.start_all_gather

        def keep_fired(fired: Fired) -> None:
            self.fired.append(fired)
            note(fired)

        def keep_messages(tensor: torch.Tensor) -> Handle:
            handle = start(tensor)
            wait = handle.wait

            def keep(timeout_seconds: float | None = None) -> list[torch.Tensor]:
                self.messages.append(wait(timeout_seconds))
                return self.messages[-1]

            handle.wait = keep  # type: ignore[method-assign]
            return handle

        self.optimizer._note = keep_fired  # type: ignore[method-assign]
        self.comm.start_all_gather = keep_messages  # type: ignore[method-assign]

    @property
    def residual(self) -> torch.Tensor:
        return self.optimizer._residuals[0]

    @property
    def velocity(self) -> torch.Tensor:
        assert self.optimizer._correction is not None
        return self.optimizer._correction.velocities[0]

    @property
    def last_threshold(self) -> float:
        return self.fired[-1].place.threshold

    def step(self, gradient: torch.Tensor, rate: float = 0.1, weight: int = 1) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.parameter.grad = gradient.to(self.parameter.dtype, copy=True)
        self.optimizer.step(weight=weight)


def counts_of(quanta: Quanta, size: int = NUM_ELEMENTS) -> torch.Tensor:
    """The count of every element of a bucket, int64."""
    counts = torch.zeros(size, dtype=torch.int64)
    counts[quanta.indices.long()] = quanta.counts.long()
    return counts


def quiet_gtc(inner: torch.optim.Optimizer, comm: Communicator, **options: Any) -> GTC:
    """Without the remark that there is one worker only."""
    if comm.size > 1:  # several threads must not touch the filters of warnings
        return GTC(inner, comm, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GTC(inner, comm, **options)


def assert_equal_states(one: Any, other: Any) -> None:
    """Equal bit for bit, whatever they are made of."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_equal_states(*pair)
    else:
        assert one == other
