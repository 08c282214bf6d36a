"""What is wrong with a step on one rank is an error on all of them, and none waits for the others."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from worker_errors import errors_of
from workers.small_model import backward, batch_of, make_model

from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging, in_process

AGREEING: dict[str, Callable[..., Any]] = {
    "exact": ExactAveraging,
    "gtc": lambda inner, comm: GTC(inner, comm, density=0.1),
    "gtc in its warm-up": lambda inner, comm: GTC(inner, comm, density=0.1, warmup_steps=5),
}
agreeing = pytest.mark.parametrize("make", AGREEING.values(), ids=AGREEING.keys())
every_method = pytest.mark.parametrize(
    "make",
    [*AGREEING.values(), lambda inner, comm: BMUF(inner, comm, block_steps=3)],
    ids=[*AGREEING, "bmuf"],
)


def sgd(model: torch.nn.Module, **settings: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


@every_method
def test_a_parameter_that_is_unfrozen_after_construction_is_an_error(make: Callable[..., Any]) -> None:
    """Its gradients would stay on their ranks, and replicas part."""

    def work(comm: Communicator) -> None:
        model = make_model()
        model[0].requires_grad_(False)  # type: ignore[index]
        optimizer = make(sgd(model), comm)
        backward(model, *batch_of(comm.rank, 0, 4))
        optimizer.step()
        model[0].requires_grad_(True)  # type: ignore[index]
        backward(model, *batch_of(comm.rank, 1, 4))
        optimizer.step()

    assert all(message.startswith("2 parameters were added") for message in errors_of(2, work))


@every_method
def test_a_group_added_to_the_inner_optimizer_is_an_error(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        inner = torch.optim.SGD(model[2].parameters(), lr=0.1)  # type: ignore[index]
        optimizer = make(inner, comm)
        inner.add_param_group({"params": list(model[0].parameters())})  # type: ignore[index]
        backward(model, *batch_of(comm.rank, 0, 4))
        optimizer.step()

    assert all(message.startswith("2 parameters were added") for message in errors_of(2, work))


@agreeing
def test_a_parameter_may_be_frozen_and_come_back(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> list[float]:
        model = make_model()
        optimizer = make(sgd(model), comm)
        for step, trains in enumerate((True, False, True)):
            model[0].requires_grad_(trains)  # type: ignore[index]
            optimizer.zero_grad()
            backward(model, *batch_of(comm.rank, step, 4))
            optimizer.step()
        return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).tolist()

    one, other = in_process(2, work)
    assert one == other


@agreeing
@pytest.mark.parametrize("weight", [-1, 2**40, 2**64, 1.5])
def test_a_weight_that_is_no_count_on_one_rank_is_an_error_on_all(
    make: Callable[..., Any], weight: object
) -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        optimizer = make(sgd(model), comm)
        backward(model, *batch_of(comm.rank, 0, 4))
        optimizer.step(weight=weight if comm.rank else 1)

    assert all(message.startswith(f"rank 1: weight is {weight}; give") for message in errors_of(2, work))


@agreeing
@pytest.mark.parametrize(("rate", "other"), [(0.1, 0.2), (0.3, 0.1), (0.0, 1e-9)])
def test_learning_rates_that_differ_are_an_error_in_every_kind_of_step(
    make: Callable[..., Any], rate: float, other: float
) -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        optimizer = make(sgd(model), comm)
        optimizer.param_groups[0]["lr"] = other if comm.rank else rate
        backward(model, *batch_of(comm.rank, 0, 4))
        optimizer.step()

    expected = f"rank 0: the ranks differ in learning rate: here it is [{rate}]; rank 1: the ranks differ in"
    assert all(message.startswith(expected) for message in errors_of(2, work))


@every_method
def test_settings_of_the_inner_optimizer_that_differ_are_an_error(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        groups = [{"params": [parameter]} for parameter in model.parameters()]
        groups[2]["weight_decay"] = 0.125 * comm.rank  # type: ignore[assignment]
        make(torch.optim.SGD(groups, lr=0.1), comm)

    for message in errors_of(2, work):
        assert "the groups differ between ranks: rank 0 has group 2:" in message
        assert "weight_decay=0.0" in message and "weight_decay=0.125" in message


@agreeing
def test_sparse_gradients_are_refused(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        layer = torch.nn.Embedding(10, 4, sparse=True)
        optimizer = make(sgd(layer), comm)
        if comm.rank:
            layer(torch.tensor([1])).sum().backward()
        optimizer.step(weight=comm.rank)

    assert all("rank 1: a gradient is sparse" in message for message in errors_of(2, work))


@every_method
def test_a_copy_is_refused(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        optimizer = make(sgd(make_model()), comm)
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.* state_dict\(\)"):
            copy.deepcopy(optimizer)

    in_process(2, work)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_number_leaves_the_residual_alone(rate: float, overlap: bool) -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        optimizer = GTC(sgd(model), comm, threshold=1.0, overlap=overlap)

        def step() -> None:
            if overlap:
                optimizer.begin_step()
            backward(model, *batch_of(comm.rank, 0, 4))
            optimizer.step()

        step()
        held = [residual.clone() for residual in optimizer._residuals]
        optimizer.param_groups[0]["lr"] = rate if comm.rank else 0.1
        with pytest.raises(ValueError, match=f"rank 1: the learning rate is {rate}"):
            step()
        assert all(map(torch.equal, held, optimizer._residuals))
        optimizer.param_groups[0]["lr"] = 0.1
        step()

    in_process(2, work, timeout_seconds=10)


@pytest.mark.parametrize("weight", [-1, 2**40])
def test_a_wrong_weight_of_one_rank_does_not_begin_a_step_on_any(weight: int) -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        optimizer = GTC(sgd(model), comm, threshold=1.0, overlap=True)
        with pytest.raises(ValueError, match=f"rank 1: weight is {weight}"):
            optimizer.begin_step(weight=weight if comm.rank else 1)
        optimizer.begin_step()
        backward(model, *batch_of(comm.rank, 0, 4))
        optimizer.step()
        assert optimizer.metrics()["steps"] == 1

    in_process(2, work, timeout_seconds=10)


@agreeing
def test_under_a_grad_scaler_a_rank_without_data_takes_part_and_learns_what_others_found(
    make: Callable[..., Any],
) -> None:
    def work(comm: Communicator) -> list[float]:
        model = make_model(dtype=torch.float32)
        optimizer = make(sgd(model), comm)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        scales = []
        for step, factor in enumerate((1.0, 1.0, float("inf"), 1.0, 1.0, 1.0)):
            has_data = comm.rank == 0 or step in (0, 4)
            optimizer.zero_grad()
            if has_data:
                inputs, targets = batch_of(comm.rank, step, 4, torch.float32)
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
                scaler.scale(loss * factor).backward()
            scaler.step(optimizer, weight=int(has_data))
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    assert in_process(2, work) == [[8.0, 8.0, 4.0, 4.0, 4.0, 8.0]] * 2


def test_an_inf_on_a_rank_without_weight_does_not_let_scales_part() -> None:
    def work(comm: Communicator) -> float:
        model = make_model(dtype=torch.float32)
        optimizer = ExactAveraging(sgd(model), comm)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        inputs, targets = batch_of(comm.rank, 0, 4, torch.float32)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        scaler.scale(loss * (float("inf") if comm.rank else 1.0)).backward()
        scaler.step(optimizer, weight=1 - comm.rank)
        scaler.update()
        return scaler.get_scale()

    assert in_process(2, work) == [8.0, 8.0]
