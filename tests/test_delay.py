"""A delayed step is the same step, one later."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from workers.overlapping import SMALL_BUCKETS, Trainee, assert_equal

from teacherstudent.distributed import GTC, Communicator, fold_states, in_process
from teacherstudent.distributed.optimizers import STATE_KEY


class GivenGradients:
    """A GTC whose gradients do not depend on its weights."""

    def __init__(self, comm: Communicator, momentum: float = 0.0, **options: Any) -> None:
        self.comm = comm
        self.parameters = [torch.nn.Parameter(torch.zeros(50)) for _ in range(3)]
        groups = [{"params": [parameter]} for parameter in self.parameters]
        inner = torch.optim.SGD(groups, lr=0.125, momentum=momentum)
        self.optimizer = GTC(inner, comm, threshold=2**-4, **options)

    def step(self, step: int, factor: float = 1.0) -> None:
        numbers = np.random.default_rng([self.comm.rank, step])
        for parameter in self.parameters:
            parameter.grad = factor * torch.tensor(numbers.normal(size=50) + 0.3, dtype=torch.float32)
        self.optimizer.step()

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach() for parameter in self.parameters])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_delayed_step_is_applied_one_step_later_and_synchronize_applies_the_last(momentum: float) -> None:
    def work(comm: Communicator) -> None:
        plain, delayed = GivenGradients(comm, momentum), GivenGradients(comm, momentum, delay=True)
        for step in range(8):
            before = plain.weights()
            plain.step(step)
            delayed.step(step)
            assert torch.equal(delayed.weights(), before)
            assert torch.equal(delayed.optimizer._residuals[0], plain.optimizer._residuals[0])
        delayed.optimizer.synchronize()
        assert torch.equal(delayed.weights(), plain.weights())
        delayed.optimizer.synchronize()  # nothing is left
        assert torch.equal(delayed.weights(), plain.weights())
        assert delayed.optimizer.metrics()["quanta_sent"] == plain.optimizer.metrics()["quanta_sent"] > 0

    in_process(3, work)


def test_a_step_that_is_skipped_does_not_hold_up_the_one_before() -> None:
    def work(comm: Communicator) -> None:
        plain, delayed = GivenGradients(comm), GivenGradients(comm, delay=True)
        for step in range(3):
            plain.step(step)
            delayed.step(step)
        delayed.step(3, factor=math.nan if comm.rank else 1.0)
        assert torch.equal(delayed.weights(), plain.weights())

    in_process(2, work)


def test_a_rate_that_has_become_0_gives_a_delayed_update_back_to_the_residual() -> None:
    """Weights + mean residual are what all ranks have earned: it cannot be applied, and is not lost."""

    def work(comm: Communicator) -> None:
        trainee = GivenGradients(comm, delay=True)
        for step in range(6):
            trainee.step(step)
        total = trainee.weights() - comm.all_reduce(trainee.optimizer._residuals[0].clone()) / comm.size
        sent = trainee.optimizer._pending.exchanges[0].handle.wait()  # type: ignore[union-attr]
        assert sum(message.numel() for message in sent) > 40 * comm.size
        for group in trainee.optimizer.param_groups:
            group["lr"] = 0.0
        before = trainee.weights()
        trainee.step(6)
        assert torch.equal(trainee.weights(), before)
        after = trainee.weights() - comm.all_reduce(trainee.optimizer._residuals[0].clone()) / comm.size
        pending = (after - total).abs().max()
        assert pending > 2**-6  # the update that had not been applied is in the residuals again
        for group in trainee.optimizer.param_groups:
            group["lr"] = 0.125
        for _ in range(60):
            trainee.step(7, factor=0.0)
        trainee.optimizer.synchronize()
        settled = trainee.weights() - comm.all_reduce(trainee.optimizer._residuals[0].clone()) / comm.size
        assert float((settled - after).abs().max()) < 1e-5

    in_process(2, work)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_delayed_training_resumed_from_a_checkpoint_goes_on_bit_for_bit(overlap: bool) -> None:
    def work(comm: Communicator) -> None:
        options: dict[str, Any] = {
            "density": 0.02,
            "delay": True,
            "overlap": overlap,
            "momentum": 0.5,
            "bucket_bytes": SMALL_BUCKETS,
        }
        trainee = Trainee(comm, **options)
        for step in range(5):
            trainee.step(step)
        weights = copy.deepcopy(trainee.net.state_dict())
        state = copy.deepcopy(trainee.optimizer.state_dict())
        assert state[STATE_KEY]["pending"]["messages"]
        resumed = Trainee(comm, **options)
        resumed.net.load_state_dict(weights)
        resumed.optimizer.load_state_dict(state)
        for step in range(5, 9):
            for each in (trainee, resumed):
                each.step(step)
            assert_equal(trainee.snapshot(), resumed.snapshot())
        assert trainee.optimizer.metrics()["bytes_sent"] == resumed.optimizer.metrics()["bytes_sent"]
        other = Trainee(comm, density=0.1, delay=True)
        with pytest.raises(ValueError, match="a delayed step in buckets of"):
            other.optimizer.load_state_dict(state)

    in_process(2, work)


@pytest.mark.parametrize("options", [{}, {"delay": True, "warmup_steps": 100}], ids=str)
def test_a_delayed_step_is_applied_also_where_the_training_goes_on_otherwise(options: dict[str, Any]) -> None:
    """Weights less mean residual are what all ranks have earned, whether steps are delayed or whole from now on."""

    def work(comm: Communicator) -> None:
        delayed, plain = GivenGradients(comm, delay=True), GivenGradients(comm)
        for step in range(4):
            delayed.step(step)
            plain.step(step)
        resumed = GivenGradients(comm, **options)
        state = copy.deepcopy(delayed.optimizer.state_dict())
        resumed.optimizer.load_state_dict(state)
        for parameter, other in zip(resumed.parameters, delayed.parameters):
            parameter.data.copy_(other.data)
        for step in range(4, 7):
            resumed.step(step)
            plain.step(step)
            assert resumed.optimizer.state_dict()[STATE_KEY]["pending"] is None
            owed = [each.optimizer._residuals[0] / comm.size for each in (resumed, plain)]
            settled = [each.weights() - comm.all_reduce(rest) for each, rest in zip((resumed, plain), owed)]
            torch.testing.assert_close(*settled)
            assert options or torch.equal(resumed.weights(), plain.weights())

    in_process(2, work)


def test_a_delayed_step_loaded_without_delay_returns_what_a_rate_of_0_cannot_apply() -> None:
    def work(comm: Communicator) -> None:
        delayed, resumed = GivenGradients(comm, delay=True), GivenGradients(comm)
        delayed.step(0)
        state = copy.deepcopy(delayed.optimizer.state_dict())
        held = state[STATE_KEY]["residuals"]
        resumed.optimizer.load_state_dict(state)
        for group in resumed.optimizer.param_groups:
            group["lr"] = 0.0
        resumed.optimizer.synchronize()
        assert not resumed.weights().any()
        returned = resumed.optimizer._residuals[0] - torch.cat(held)
        assert int((returned.abs() == 2**-4).sum()) == delayed.optimizer.metrics()["quanta_sent"] > 0

    in_process(2, work)


def test_states_that_hold_a_delayed_step_are_not_folded() -> None:
    def work(comm: Communicator) -> None:
        trainee = GivenGradients(comm, delay=True)
        trainee.step(0)
        with pytest.raises(ValueError, match="hold a delayed step"):
            fold_states([trainee.optimizer.state_dict()], comm.rank, 3)
        trainee.optimizer.synchronize()
        fold_states([trainee.optimizer.state_dict()], comm.rank, 3)

    in_process(2, work)
