"""What all distributed optimisers share."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional
from worker_errors import errors_of
from workers.small_model import backward, batch_of, make_model, weights_of

from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging, in_process
from teacherstudent.distributed.flat import hash_parameters, make_buckets

METHODS = {
    "exact": ExactAveraging,
    "gtc": lambda inner, comm: GTC(inner, comm, density=0.1),
    "bmuf": lambda inner, comm: BMUF(inner, comm, block_steps=3, block_momentum=0.5),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


@every_method
def test_initial_weights_are_those_of_rank_0(make) -> None:  # type: ignore[no-untyped-def]
    def work(comm: Communicator) -> torch.Tensor:
        model = make_model(seed=comm.rank)
        make(torch.optim.SGD(model.parameters(), lr=0.1), comm)
        return weights_of(model)

    assert all(torch.equal(weights, weights_of(make_model(seed=0))) for weights in in_process(3, work))


@every_method
def test_models_that_differ_are_an_error_on_every_worker(make) -> None:  # type: ignore[no-untyped-def]
    def other_shape(comm: Communicator) -> None:
        make(torch.optim.SGD(torch.nn.Linear(4, 2 + comm.rank // 2).parameters(), lr=0.1), comm)

    def fewer_parameters(comm: Communicator) -> None:
        make(torch.optim.SGD(torch.nn.Linear(4, 2, bias=comm.rank != 2).parameters(), lr=0.1), comm)

    for work in (other_shape, fewer_parameters):
        for message in errors_of(3, work):
            assert "the parameters differ between ranks: rank 0 has 2 parameters, 10 elements" in message
            assert "rank 2 has" in message

    def no_gradient(comm: Communicator) -> None:
        model = torch.nn.Linear(4, 2).requires_grad_(False)
        make(torch.optim.SGD(model.parameters(), lr=0.1), comm)

    assert all("no parameter that requires a gradient" in message for message in errors_of(2, no_gradient))


def test_differing_initial_weights_are_an_error_on_every_worker_when_checked() -> None:
    def work(comm: Communicator) -> None:
        model = make_model(seed=comm.rank // 2)
        ExactAveraging(torch.optim.SGD(model.parameters(), lr=0.1), comm, initial_weights="check")

    messages = errors_of(4, work)
    assert all("initial weights of rank 2, 3 differ from those of rank 0" in message for message in messages)


def test_a_problem_on_one_worker_is_an_error_on_every_worker() -> None:
    def work(comm: Communicator) -> None:
        GTC(torch.optim.SGD(make_model().parameters(), lr=0.1), comm, density=2.0 if comm.rank == 1 else 0.1)

    assert all("rank 1: density is 2.0" in message for message in errors_of(2, work))


@pytest.mark.parametrize("weight", [-1, 1.5, "3", None])
def test_a_weight_that_is_no_count_is_refused(weight: object) -> None:
    [comm] = in_process(1, lambda comm: comm)
    optimizer = ExactAveraging(torch.optim.SGD(make_model().parameters(), lr=0.1), comm)
    with pytest.raises(ValueError, match="give an integer ≥ 0"):
        optimizer.step(weight=weight)


@every_method
def test_a_step_in_which_nobody_has_data_changes_nothing(make) -> None:  # type: ignore[no-untyped-def]
    def work(comm: Communicator) -> float:
        model = make_model()
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
        backward(model, *batch_of(comm.rank, 0, 4))
        optimizer.step(weight=0)
        optimizer.synchronize()
        assert torch.equal(weights_of(model), weights_of(make_model()))
        assert not optimizer.state
        return optimizer.metrics()["skipped_empty"]

    assert in_process(2, work) == [1, 1]


@pytest.mark.parametrize("make", [METHODS["exact"], METHODS["gtc"]], ids=["exact", "gtc"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), -float("inf")])
def test_a_gradient_that_is_not_finite_makes_all_workers_skip_and_leaves_no_trace(
    make, poison: float
) -> None:  # type: ignore[no-untyped-def]
    def work(comm: Communicator, poisoned: bool) -> tuple[torch.Tensor, float]:
        model = make_model()
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
        for step in range(6):
            if step == 3 and not poisoned:
                continue
            optimizer.zero_grad()
            backward(model, *batch_of(comm.rank, step, 4))
            if step == 3 and comm.rank == 1:
                list(model.parameters())[-1].grad[1] = poison  # type: ignore[index]
            optimizer.step()
        return weights_of(model), optimizer.metrics()["skipped_nonfinite"]

    clean = in_process(2, lambda comm: work(comm, False))[0][0]
    for weights, num_skipped in in_process(2, lambda comm: work(comm, True)):
        assert torch.equal(weights, clean)
        assert num_skipped == 1


@every_method
def test_torchs_schedulers_hooks_and_closures_work_on_it(make) -> None:  # type: ignore[no-untyped-def]
    def work(comm: Communicator) -> None:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = make(inner, comm)
        assert isinstance(optimizer, torch.optim.Optimizer)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            inputs, targets = batch_of(comm.rank, 0, 4)
            loss = functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        assert optimizer.step(closure, weight=2).item() > 0
        scheduler.step()
        assert calls == ["before", "after"]
        assert inner.param_groups[0]["lr"] == 0.05
        with pytest.raises(ValueError, match="add the group to the inner optimizer before constructing it"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_process(2, work)


@every_method
def test_going_on_from_a_checkpoint_is_going_on(make) -> None:  # type: ignore[no-untyped-def]
    def build(comm: Communicator, seed: int):  # type: ignore[no-untyped-def]
        model = make_model(seed)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = make(inner, comm)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)

    def train(comm: Communicator, model, optimizer, scheduler, steps: range) -> None:  # type: ignore[no-untyped-def]
        for step in steps:
            optimizer.zero_grad()
            backward(model, *batch_of(comm.rank, step, 4))
            optimizer.step(weight=1 + (step + comm.rank) % 3)
            scheduler.step()

    def work(comm: Communicator, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        whole = build(comm, 0)
        train(comm, *whole, range(stop))
        with whole[1].global_weights():  # as for an evaluation: saving inside must not matter
            saved = copy.deepcopy([part.state_dict() for part in whole])
        train(comm, *whole, range(stop, 14))
        whole[1].synchronize()
        resumed = build(comm, 1)
        for part, state in zip(resumed, saved):
            part.load_state_dict(state)
        assert resumed[1].state is resumed[1].inner.state
        train(comm, *resumed, range(stop, 14))
        resumed[1].synchronize()
        assert resumed[1].metrics()["steps"] == 14
        return weights_of(whole[0]), weights_of(resumed[0])

    def uninterrupted(comm: Communicator) -> torch.Tensor:
        parts = build(comm, 0)
        train(comm, *parts, range(14))
        parts[1].synchronize()
        return weights_of(parts[0])

    reference = in_process(2, uninterrupted)[0]
    for stop in (3, 7, 8):  # at a block's end, and inside blocks of 3 steps
        for whole, resumed in in_process(2, lambda comm, stop=stop: work(comm, stop)):
            assert torch.equal(whole, reference)
            assert torch.equal(resumed, reference)


def test_the_state_of_another_method_is_refused() -> None:
    def work(comm: Communicator) -> None:
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="saved by a plain optimizer, not by ExactAveraging"):
            ExactAveraging(inner, comm).load_state_dict(inner.state_dict())
        with pytest.raises(ValueError, match="saved by GTC, not by ExactAveraging"):
            ExactAveraging(inner, comm).load_state_dict(GTC(inner, comm, density=0.1).state_dict())

    in_process(2, work)


@pytest.mark.parametrize("make", [METHODS["exact"], METHODS["gtc"]], ids=["exact", "gtc"])
def test_under_a_grad_scaler_all_workers_skip_together_and_keep_equal_scales(make) -> None:  # type: ignore[no-untyped-def]
    def work(comm: Communicator, overflow: bool) -> tuple[torch.Tensor, float]:
        model = make_model(dtype=torch.float32)
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.125), comm)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            inputs, targets = batch_of(comm.rank, step, 4, torch.float32)
            scaler.scale(functional.mse_loss(model(inputs), targets)).backward()
            if overflow and step == 3 and comm.rank == 1:
                next(model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
            if step == 1:
                scaler.unscale_(optimizer)  # as for gradient clipping
            scaler.step(optimizer, weight=4)
            scaler.update()
            if overflow and step == 2:
                before = weights_of(model)
        if overflow:
            assert torch.equal(weights_of(model), before)
        return weights_of(model), scaler.get_scale()

    def without_scaler(comm: Communicator) -> torch.Tensor:
        model = make_model(dtype=torch.float32)
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.125), comm)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, *batch_of(comm.rank, step, 4, torch.float32))
            optimizer.step(weight=4)
        return weights_of(model)

    assert [scale for _, scale in in_process(2, lambda comm: work(comm, True))] == [512.0, 512.0]
    scaled = in_process(2, lambda comm: work(comm, False))
    # A power of two scales without rounding.
    assert torch.equal(scaled[0][0], in_process(2, without_scaler)[0])
    assert torch.equal(scaled[0][0], scaled[1][0])


@every_method
def test_parameters_of_several_dtypes_and_frozen_ones_are_trained_in_place(make) -> None:  # type: ignore[no-untyped-def]
    def work(comm: Communicator) -> str:
        parameters = [
            torch.nn.Parameter(torch.randn(4, 3)),
            torch.nn.Parameter(torch.randn(5, dtype=torch.float64)),
            torch.nn.Parameter(torch.randn(3, 4).t()),  # not contiguous
            torch.nn.Parameter(torch.randn(7).to(torch.bfloat16)),
            torch.nn.Parameter(torch.randn(2), requires_grad=False),
            torch.nn.Parameter(torch.empty(0)),
        ]
        places = [parameter.data_ptr() for parameter in parameters]
        optimizer = make(torch.optim.SGD(parameters, lr=0.1), comm)
        frozen = comm.broadcast(parameters[4].detach().clone())
        start = parameters[2].detach().clone()
        for step in range(12):
            for parameter in parameters:
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(10 * step + comm.rank)
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            optimizer.step()
        optimizer.synchronize()
        assert [parameter.data_ptr() for parameter in parameters] == places
        assert torch.equal(parameters[4], frozen)
        assert not torch.equal(parameters[2], start)
        return hash_parameters(make_buckets(optimizer.param_groups))

    assert len(set(in_process(3, work))) == 1


def test_settings_that_differ_between_workers_are_an_error_on_every_worker() -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="the settings differ between ranks"):
            GTC(
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0),
                comm,
                density=0.1 + 0.1 * comm.rank,
            )

    in_process(2, work)


@every_method
def test_flat_lstm_weights_stay_where_they_are(make) -> None:  # type: ignore[no-untyped-def]
    def work(comm: Communicator) -> None:
        model = torch.nn.LSTM(3, 4)
        places = [parameter.data_ptr() for parameter in model.parameters()]
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1), comm)
        for step in range(4):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * comm.rank + step)
            model(torch.randn(5, 2, 3, generator=generator))[0].square().mean().backward()
            optimizer.step()
        assert [parameter.data_ptr() for parameter in model.parameters()] == places

    in_process(2, work)
