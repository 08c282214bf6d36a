"""What a step of gradient threshold compression takes in: weights of zero, decay, warm-up, clipping, bad gradients."""

from typing import Any

import pytest
import torch
from gtc_worker import (
    ALL_AT_ONCE,
    NUM_ELEMENTS,
    RATES,
    WEIGHTS,
    Worker,
    assert_equal_states,
    gradient_of,
    quiet_gtc,
)

from teacherstudent.distributed import GTC, Communicator, ExactAveraging, in_process

# ---- who takes part ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ExactAveraging, lambda inner, comm: GTC(inner, comm, threshold=2.0)])
def test_a_gradient_of_a_worker_without_weight_moves_nothing(make) -> None:  # type: ignore[no-untyped-def]
    """Also where no worker with weight has one for that parameter: replicas would part."""

    def work(comm: Communicator) -> list[list[float]]:
        used, other = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
        optimizer = make(torch.optim.SGD([used, other], lr=1.0), comm)
        used.grad = torch.ones(3)
        if comm.rank == 1:
            other.grad = torch.ones(3)
        optimizer.step(weight=1 - comm.rank)
        return [used.tolist(), other.tolist()]

    assert in_process(2, work) == [[[-1.0] * 3, [0.0] * 3]] * 2


# ---- weight decay, warm-up -----------------------------------------------------------------------------------


def test_weight_decay_stays_outside_the_residual() -> None:
    """With gradients of 0 the weights decay as the inner optimiser would decay them, whatever the residual holds."""
    settings = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.125}

    def work(comm: Communicator) -> None:
        start = torch.linspace(-1, 1, NUM_ELEMENTS)
        worker = Worker(comm, inner=settings, threshold=2.0)
        alone = torch.nn.Parameter(start.clone())
        sgd = torch.optim.SGD([alone], **settings)
        with torch.no_grad():
            worker.parameter.copy_(start)
        worker.residual.copy_(torch.linspace(-1.9, 1.9, NUM_ELEMENTS))
        held = worker.residual.clone()
        for _ in range(10):
            worker.step(torch.zeros(NUM_ELEMENTS), rate=0.5)
            alone.grad = torch.zeros(NUM_ELEMENTS)
            sgd.step()
            assert torch.equal(worker.parameter, alone)
        assert not torch.equal(alone, start)
        assert torch.equal(worker.residual, held)

    in_process(2, work)


def test_the_warm_up_is_exact_averaging_and_the_first_threshold_follows_it() -> None:
    num_warmup = 4
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}

    def work(comm: Communicator) -> None:
        worker = Worker(comm, inner=settings, density=0.1, warmup_steps=num_warmup)
        other = torch.nn.Parameter(torch.zeros(NUM_ELEMENTS))
        exact = ExactAveraging(torch.optim.SGD([other], lr=0.1, **settings), comm)  # type: ignore[arg-type]
        for step in range(num_warmup):
            weight = WEIGHTS[step % len(WEIGHTS)][comm.rank]
            worker.step(gradient_of(comm.rank, step), RATES[step], weight)
            exact.param_groups[0]["lr"] = RATES[step]
            other.grad = gradient_of(comm.rank, step)
            exact.step(weight=weight)
            assert torch.equal(worker.parameter, other)
        assert not worker.fired and not worker.residual.any()
        fresh = Worker(comm, density=0.1)
        for optimizer in (worker, fresh):
            optimizer.step(gradient_of(comm.rank, num_warmup))
        assert worker.last_threshold == fresh.last_threshold
        assert torch.equal(worker.residual, fresh.residual)
        assert 0.05 < worker.optimizer.metrics()["density"] < 0.2

    in_process(3, work)


# ---- clipping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e30])  # the squares of the latter are beyond float32
def test_each_worker_clips_its_own_gradient_over_all_parameters(size: float) -> None:
    """And not one that is short enough."""

    def work(comm: Communicator) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 2))]
        optimizer = quiet_gtc(torch.optim.SGD(parameters, lr=0.25), comm, threshold=128.0, clip_norm=2.0)
        gradients = [torch.tensor([3.0, -6.0, 2.0]), torch.full((2, 2), 0.0)]  # of norm 7
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient * size if comm.rank else gradient / 7
        optimizer.step()
        held = 0.25 * gradients[0] / 7 * (2 if comm.rank else 1)
        torch.testing.assert_close(optimizer._residuals[0][:3], held)
        assert optimizer.metrics()["clipped"] == comm.rank

    in_process(2, work)


# ---- gradients that are not finite ------------------------------------------------------------------------------


def test_a_step_that_is_skipped_leaves_residual_velocity_and_cursor_untouched() -> None:
    def work(comm: Communicator, poisoned: bool) -> dict[str, Any]:
        worker = Worker(comm, **ALL_AT_ONCE)
        for step in range(8):
            gradient = 4 * gradient_of(comm.rank, step)
            if poisoned and step in (0, 5):
                spoilt = gradient.clone()
                spoilt[7] = float("inf") if comm.rank else 1e4
                worker.step(spoilt)
            worker.step(gradient)
        assert worker.optimizer.metrics()["skipped_nonfinite"] == 2 * poisoned
        assert worker.optimizer.metrics()["carried_over"] > 0
        state = worker.optimizer.state_dict()["distributed"]
        for counter in ("steps", "skipped_nonfinite", "bytes_sent"):
            state["counters"].pop(counter)
        state["buffers"].pop("weight")  # of the data seen, also in a step that is skipped
        return {**state, "weights": worker.parameter.detach()}

    for clean, poisoned in zip(*(in_process(2, lambda comm, p=p: work(comm, p)) for p in (False, True))):
        assert_equal_states(clean, poisoned)
