"""What is wrong with a block on one worker is an error on every worker, and none waits for the others."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_bmuf import give_step, gradient_of, make_parameter
from torch import Tensor
from worker_errors import errors_of

from teacherstudent.distributed import BMUF, Communicator, TwoTier, in_process

METHODS: dict[str, Callable[..., Any]] = {
    "plain": lambda inner, comm, **options: BMUF(inner, comm, block_steps=4, **options),
    "fragments with delay": lambda inner, comm, **options: BMUF(
        inner, comm, block_steps=4, fragments=2, delay_steps=1, wire="int8", **options
    ),
    "one member a group": lambda inner, comm, **options: TwoTier(
        inner, comm, group_size=1, block_steps=4, **options
    ),
    "two tiers": lambda inner, comm, **options: TwoTier(
        inner, comm, group_size=2, inner_options={"density": 0.2}, block_steps=4, **options
    ),
    "exact in groups": lambda inner, comm, **options: TwoTier(
        inner, comm, group_size=2, inner="exact", block_steps=4, **options
    ),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


@every_method
@pytest.mark.parametrize("weight", [-1, 1.5, 2**40])
def test_a_wrong_weight_of_one_worker_is_an_error_on_all(make: Callable[..., Any], weight: object) -> None:
    def work(comm: Communicator) -> None:
        parameters = [make_parameter(), make_parameter()]
        optimizer = make(torch.optim.SGD(parameters, lr=0.1), comm)
        for step in range(9):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.step(weight=weight if (comm.rank, step) == (3, 5) else 1)

    [message] = set(errors_of(4, work))
    assert f"rank {1 if 'group 1' in message else 3}: weight is {weight}; give" in message


@every_method
def test_a_worker_may_have_gone_wrong_when_the_others_synchronize(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        parameters = [make_parameter(), make_parameter()]
        optimizer = make(torch.optim.SGD(parameters, lr=0.1), comm)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(weight=-3 if comm.rank == 2 else 1)
        optimizer.synchronize()

    [message] = set(errors_of(4, work))
    assert "weight is -3; give" in message


@every_method
def test_a_loss_below_0_on_one_worker_is_an_error_on_all(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        parameters = [make_parameter(), make_parameter()]
        optimizer = make(torch.optim.SGD(parameters, lr=0.1), comm, outlier_factor=3.0)
        for step in range(9):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.report_loss(-2.0 if (comm.rank, step) == (2, 5) else 1.0)
            optimizer.step()

    [message] = set(errors_of(4, work))
    assert "the loss that was reported is -2; outlier_factor compares losses from 0 up" in message


@every_method
def test_a_sparse_gradient_on_one_worker_is_an_error_on_all(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        model = torch.nn.ModuleList([torch.nn.Embedding(10, 4, sparse=True), torch.nn.Embedding(10, 4)])
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1), comm)
        for step in range(4):
            optimizer.zero_grad()
            if (comm.rank, step) == (1, 1):
                model[0](torch.tensor([1])).sum().backward()
            optimizer.step()

    [message] = set(errors_of(4, work))
    assert "rank 1: a gradient is sparse, and only dense ones are exchanged" in message


@every_method
def test_models_of_other_shapes_are_an_error_on_every_worker(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        model = torch.nn.Linear(4, 2 + comm.rank // 3)
        make(torch.optim.SGD(model.parameters(), lr=0.1), comm)

    assert all(
        "the parameters differ between ranks" in text and "rank 3 has" in text for text in errors_of(4, work)
    )


def test_after_the_error_training_can_go_on() -> None:
    def work(comm: Communicator) -> float:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3)
        with pytest.raises(ValueError, match="rank 1: weight is -1"):
            for step in range(3):
                give_step(
                    optimizer, parameter, comm.rank, step, weight=1 - 2 * (comm.rank == 1 and step == 1)
                )
        for step in range(4):
            give_step(optimizer, parameter, comm.rank, step)
        return optimizer.metrics()["blocks"]

    assert in_process(2, work, timeout_seconds=10) == [2, 2]


# ---- states that are not finite -------------------------------------------------------------------------------------


def spike(rank: int, step: int, like: Tensor) -> Tensor:
    """Finite itself, and its square not."""
    return torch.full_like(like, 1e30) if (rank, step) == (1, 4) else gradient_of(rank, step, like)


@pytest.mark.parametrize("local_state", ["keep", "reset", "average", "adam"])
def test_a_state_that_is_not_finite_is_left_out_with_its_model(local_state: str) -> None:
    def work(comm: Communicator) -> tuple[Tensor, dict[str, float]]:
        parameter = make_parameter(torch.float32)
        inner = torch.optim.Adam([parameter], lr=0.01)
        optimizer = BMUF(inner, comm, block_steps=3, local_state=local_state)
        for step in range(6):
            parameter.grad = spike(comm.rank, step, parameter.detach())
            optimizer.step()
        state = inner.state.get(parameter, {})
        assert all(bool(value.isfinite().all()) for value in state.values())
        if local_state in ("average", "adam"):
            for name in ("exp_avg", "exp_avg_sq", "step"):
                values = comm.all_gather(state[name].reshape(-1))
                assert all(torch.equal(values[0], other) for other in values)
        return parameter.detach(), optimizer.metrics()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = in_process(3, work)
    assert all(torch.equal(found[0][0], weights) for weights, _ in found)
    num_left_out = int(local_state != "reset")  # which drops it anyway
    assert [metrics["ranks_left_out"] for _, metrics in found] == [num_left_out] * 3
    told = [str(each.message) for each in caught]
    assert len(told) == 3 * num_left_out
    assert all("block 1: rank 1 is left out" in text and "state is not finite" in text for text in told)


@pytest.mark.parametrize("what", ["model", "state"])
def test_what_would_overflow_when_weighted_is_left_out_too(what: str) -> None:
    """The share of a rank can be N."""

    def work(comm: Communicator) -> float:
        parameter = make_parameter(torch.float32)
        inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        optimizer = BMUF(inner, comm, block_steps=2, local_state="average")

        def overflow(*_: object) -> None:
            held = parameter if what == "model" else inner.state[parameter]["momentum_buffer"]
            held.detach().fill_(3e38)

        for step in range(2):
            parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            if step == 1 and comm.rank == 1:
                inner.register_step_post_hook(overflow)
            optimizer.step(weight=1 + 9 * comm.rank)
        assert bool(parameter.isfinite().all()) and float(parameter.detach().abs().max()) < 100
        assert bool(inner.state[parameter]["momentum_buffer"].isfinite().all())
        return optimizer.metrics()["ranks_left_out"]

    with pytest.warns(UserWarning, match=f"rank 1 is left out .*{what} is not finite"):
        assert in_process(3, work) == [1, 1, 1]


def test_a_group_whose_state_is_not_finite_is_left_out() -> None:
    def work(comm: Communicator) -> float:
        parameter = make_parameter(torch.float32)
        inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        optimizer = TwoTier(inner, comm, group_size=2, inner="exact", block_steps=1, local_state="average")
        give_step(optimizer, parameter, comm.rank, 0)
        if comm.rank >= 2:
            inner.state[parameter]["momentum_buffer"][1] = math.inf
            optimizer.param_groups[0]["lr"] = 0.0
        parameter.grad = gradient_of(comm.rank // 2, 1, parameter.detach())
        if comm.rank >= 2:
            inner.register_step_post_hook(lambda *_: parameter.detach().nan_to_num_())  # type: ignore[arg-type,return-value]
        optimizer.step()
        assert bool(inner.state[parameter]["momentum_buffer"].isfinite().all())
        return optimizer.metrics()["ranks_left_out"]

    with pytest.warns(UserWarning, match=r"group 1 is left out .*state is not finite"):
        assert in_process(4, work) == [1] * 4
