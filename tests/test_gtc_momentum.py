"""Momentum correction: what compression keeps back has its momentum too."""

from typing import Any

import pytest
import torch
from gtc_worker import NUM_ELEMENTS, Worker, gradient_of

from teacherstudent.distributed import Communicator, in_process

NUM_RANKS = 3
MOMENTUM = 0.9


def distance_to_momentum_sgd(
    comm: Communicator, dtype: torch.dtype, rates: list[float], **options: Any
) -> list[float]:
    """The largest |difference of a weight| from SGD with momentum on the mean gradient, after every step."""
    worker = Worker(comm, dtype, momentum=MOMENTUM, **options)
    weights = torch.nn.Parameter(torch.zeros(NUM_ELEMENTS, dtype=torch.float64))
    sgd = torch.optim.SGD([weights], lr=1.0, momentum=MOMENTUM)
    distances = []
    for step in range(60):
        gradients = [gradient_of(rank, step, dtype) for rank in range(comm.size)]
        if step > 30:  # signs change: what velocity does then counts
            gradients = [-gradient for gradient in gradients]
        rate = rates[step % len(rates)]
        worker.step(gradients[comm.rank], rate)
        sgd.param_groups[0]["lr"] = rate
        weights.grad = torch.stack(gradients).double().mean(dim=0)
        sgd.step()
        distances.append(float((worker.parameter.detach().double() - weights.detach()).abs().max()))
    return distances


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-11), (torch.float32, 2e-3)], ids=str)
@pytest.mark.parametrize("rates", [[0.03125], [1.5], [0.1, 1.5, 0.02]], ids=str)
def test_with_many_quanta_and_no_masking_the_weights_stay_within_a_threshold_of_momentum_sgd(
    dtype: torch.dtype, rounding: float, rates: list[float]
) -> None:
    """For the same gradients, at every step, also where the rate changes: only the mean residual is missing."""
    threshold = 0.5
    settings = {"threshold": threshold, "multi_quantum": True, "momentum_masking": False}

    def work(comm: Communicator) -> list[float]:
        return distance_to_momentum_sgd(comm, dtype, rates, **settings)

    for distances in in_process(NUM_RANKS, work):
        assert max(distances) < threshold + rounding
        assert max(distances) > threshold / 2  # so that the bound is not trivial


def test_with_masking_old_directions_are_forgotten() -> None:
    """Where a quantum is sent the velocity starts anew; so the law above does not hold with it."""

    def work(comm: Communicator) -> float:
        worker = Worker(comm, threshold=1.0, momentum=0.5)
        worker.step(torch.tensor([8.0, 12.0] * (NUM_ELEMENTS // 2)), rate=0.1)
        assert worker.velocity[:2].tolist() == [8.0, 0.0]
        return max(distance_to_momentum_sgd(comm, torch.float64, [1.5], threshold=0.5, multi_quantum=True))

    assert min(in_process(2, work)) > 5.0


def test_a_warm_up_with_momentum_correction_is_momentum_sgd_on_the_mean_gradient() -> None:
    """Also behind the warm-up nothing is lost: the velocities go on."""
    settings = {"threshold": 0.5, "multi_quantum": True, "momentum_masking": False}
    for num_warmup in (60, 20):

        def work(comm: Communicator, num_warmup: int = num_warmup) -> list[float]:
            return distance_to_momentum_sgd(comm, torch.float64, [1.5], warmup_steps=num_warmup, **settings)

        for distances in in_process(2, work):
            assert max(distances[:num_warmup]) < 1e-11
            assert max(distances) < 0.5 + 1e-11


def test_a_rate_of_0_rests_the_velocity() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, threshold=1.0, momentum=0.5)
        worker.step(gradient_of(comm.rank, 0))
        before = worker.velocity.clone(), worker.residual.clone()
        worker.step(gradient_of(comm.rank, 1), rate=0.0)
        assert torch.equal(worker.velocity, before[0]) and torch.equal(worker.residual, before[1])

    in_process(2, work)


def test_momentum_that_a_scheduler_brings_into_the_inner_optimizer_is_an_error() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, threshold=1.0, momentum=0.5)
        torch.optim.lr_scheduler.OneCycleLR(worker.optimizer, 1.0, total_steps=10)  # cycles momentum as well
        with pytest.raises(ValueError, match="count it twice"):
            worker.step(gradient_of(comm.rank, 0))

    in_process(2, work)


def test_a_worker_without_weight_has_a_gradient_of_0() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, threshold=128.0, momentum=0.5, clip_norm=1e6)
        worker.step(torch.ones(NUM_ELEMENTS))
        worker.step(torch.full((NUM_ELEMENTS,), 1.0 if comm.rank else float("nan")), weight=comm.rank)
        assert worker.velocity[0].item() == (2.5 if comm.rank else 0.5)

    in_process(2, work)


def test_a_gradient_that_a_velocity_could_not_hold_makes_all_workers_skip() -> None:
    """1e38 is finite, and ten of it, which 0.9 would add up to, are not."""

    def work(comm: Communicator) -> None:
        worker = Worker(comm, threshold=1.0, momentum=MOMENTUM)
        for _ in range(12):
            worker.step(torch.full((NUM_ELEMENTS,), 1e38), rate=1e-3)
        assert worker.optimizer.metrics()["skipped_nonfinite"] == 12
        assert not worker.velocity.any() and not worker.residual.any()

    in_process(2, work)


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_a_parameter_without_a_gradient_anywhere_goes_on_by_its_momentum(warmup_steps: int) -> None:
    def work(comm: Communicator) -> list[float]:
        worker = Worker(comm, threshold=2.0**-10, multi_quantum=True, momentum=0.5, momentum_masking=False,
                        warmup_steps=warmup_steps)  # fmt: skip
        worker.step(torch.full((NUM_ELEMENTS,), 1.0), rate=1.0)
        worker.parameter.grad = None
        worker.optimizer.step()
        return worker.parameter[:2].tolist()

    assert in_process(2, work) == [[-1.5, -1.5]] * 2
