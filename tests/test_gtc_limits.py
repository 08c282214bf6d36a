"""Numbers that are very large or very small: residuals stay finite, and nothing is lost unsaid."""

import math
import warnings

import pytest
import torch
from gtc_worker import Worker, quiet_gtc

from teacherstudent.distributed import GTC, Communicator, in_process
from teacherstudent.distributed.thresholds import HIGHEST_THRESHOLD

LARGEST = torch.finfo(torch.float32).max


def train(optimizer: GTC, parameter: torch.Tensor, gradient: torch.Tensor, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        parameter.grad = gradient.clone()
        optimizer.step()


# ---- the first threshold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [1e-30, 1e-40])
def test_one_tiny_gradient_among_few_does_not_become_the_first_threshold(tiny: float) -> None:
    """Fewer elements than the density wants are not 0. τ must be of their size, or r − τ would be r."""

    def work(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.zeros(10_000))
        optimizer = GTC(torch.optim.SGD([parameter], lr=1.0), comm, density=0.1)
        gradient = torch.zeros(10_000)
        gradient[:60] = torch.linspace(1.0, 2.0, 60)
        gradient[7] = tiny
        train(optimizer, parameter, gradient)
        assert 1 < optimizer.metrics()["threshold"] < 2
        assert 0 < optimizer.metrics()["density"] < 60 / 10_000

    in_process(2, work)


@pytest.mark.filterwarnings("ignore:.*residuals are so many times")
def test_float64_gradients_beyond_float32_get_the_highest_threshold_on_every_rank() -> None:
    def work(comm: Communicator) -> float:
        parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = GTC(torch.optim.SGD([parameter], lr=1.0), comm, density=0.25)
        train(optimizer, parameter, torch.full_like(parameter, 1e60))
        return optimizer.metrics()["threshold"]

    assert in_process(2, work, timeout_seconds=10) == [HIGHEST_THRESHOLD] * 2


# ---- large updates -------------------------------------------------------------------------------------------


def test_no_series_of_finite_gradients_overflows_a_residual() -> None:
    """A gradient is skipped or cannot overflow, be the residual however near to the largest number."""

    [comm] = in_process(1, lambda comm: comm)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = quiet_gtc(torch.optim.SGD([parameter], lr=1.0), comm, threshold=0.125)
    for size in (1.6e38, LARGEST, 1.1e31):
        train(optimizer, parameter, torch.tensor([size, 0.25]), 3)
    assert optimizer.metrics()["skipped_nonfinite"] == 9
    optimizer._residuals[0][0] = LARGEST
    with pytest.warns(UserWarning, match="taking quanta out of them rounds"):
        train(optimizer, parameter, torch.tensor([1e31, 0.25]), 3)
    assert optimizer.metrics()["skipped_nonfinite"] == 9
    assert optimizer._residuals[0].isfinite().all()


def test_16_bit_gradients_are_judged_by_the_residual_that_takes_them() -> None:
    def work(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
        inner = torch.optim.SGD([parameter], lr=1e-4)
        optimizer = GTC(inner, comm, threshold=0.125, momentum=0.9)
        train(optimizer, parameter, torch.full_like(parameter, 2000.0), 3)
        assert optimizer.metrics()["skipped_nonfinite"] == 0
        assert (parameter < 0).all()
        train(optimizer, parameter, torch.full_like(parameter, math.inf))
        assert optimizer.metrics()["skipped_nonfinite"] == 1

    in_process(4, work)


@pytest.mark.parametrize("multi_quantum", [False, True])
def test_residuals_so_large_that_taking_quanta_out_of_them_rounds_are_told_once_and_counted(
    multi_quantum: bool,
) -> None:
    [comm] = in_process(1, lambda comm: comm)
    parameter = torch.nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([parameter], lr=1.0)
    optimizer = quiet_gtc(inner, comm, threshold=0.125, multi_quantum=multi_quantum)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, parameter, torch.tensor([0.124 * 2**20, 1.0, 0.0]))
    assert optimizer.metrics()["rounded"] == 0
    with pytest.warns(UserWarning, match="1 residuals are so many times the threshold.*largest_residual"):
        optimizer._residuals[0].zero_()
        train(optimizer, parameter, torch.tensor([0.126 * 2**20, 1.0, 0.0]))
    assert optimizer.metrics()["rounded"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, parameter, torch.zeros(3))
    assert optimizer.metrics()["rounded"] == (1 if multi_quantum else 2)


def test_float64_residuals_are_exact_far_beyond_that() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, torch.float64, threshold=0.125)
        worker.step(torch.full_like(worker.parameter, 0.124 * 2.0**49), rate=1.0)
        assert worker.optimizer.metrics()["rounded"] == 0

    in_process(2, work)


def test_clipping_keeps_its_direction_where_squares_are_beyond_float64() -> None:
    def work(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        inner = torch.optim.SGD([parameter], lr=1.0)
        optimizer = GTC(inner, comm, threshold=64.0, clip_norm=5.0)
        train(optimizer, parameter, torch.tensor([3e200, -4e200], dtype=torch.float64))
        held = torch.tensor([3.0, -4.0], dtype=torch.float64)
        torch.testing.assert_close(optimizer._residuals[0], held)

    in_process(2, work)


# ---- small rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rate"), [(torch.float16, 1e-6), (torch.bfloat16, 1e-40), (torch.float32, 1e-40)], ids=str
)
def test_at_a_rate_too_small_for_the_gradients_dtype_residuals_grow_and_nothing_is_sent(
    dtype: torch.dtype, rate: float, overlap: bool
) -> None:
    """τ/lr would be Inf. With a larger rate what has waited is sent."""
    [comm] = in_process(1, lambda comm: comm)
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    inner = torch.optim.SGD([parameter], lr=1.0)
    optimizer = quiet_gtc(inner, comm, threshold=0.125, overlap=overlap)

    def step(size: float) -> None:
        optimizer.zero_grad()
        if overlap:
            optimizer.begin_step()
        (parameter * size).sum().backward()
        optimizer.step()

    step(0.25)
    optimizer.param_groups[0]["lr"] = rate
    before = optimizer._residuals[0].clone()
    with pytest.warns(UserWarning, match=f"threshold 0.125 over lr {rate}"):
        step(2.0**14)
    grown = optimizer._residuals[0] - before
    assert torch.equal(optimizer._residuals[0], before + torch.tensor(rate) * 2.0**14)
    assert (grown > 0).all() or rate == 1e-40
    assert parameter.tolist() == [-0.125] * 4
    assert optimizer.metrics()["held_back"] == 1
    optimizer.param_groups[0]["lr"] = 1.0
    step(0.0)
    assert parameter.tolist() == [-0.25] * 4


def test_with_many_quanta_a_16_bit_gradient_gets_as_many_as_it_can_hold() -> None:
    def work(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
        inner = torch.optim.SGD([parameter], lr=2.0**-10)
        optimizer = GTC(inner, comm, threshold=0.125, multi_quantum=True)
        optimizer._residuals[0].fill_(100.0)
        train(optimizer, parameter, torch.zeros_like(parameter), 3)
        assert parameter.isfinite().all()
        moved = -float(parameter.detach()[0])
        assert 3 * 0.125 < moved < 100
        assert moved + float(optimizer._residuals[0][0]) == pytest.approx(100.0, rel=1e-2)

    in_process(2, work)


@pytest.mark.parametrize("multi_quantum", [False, True])
def test_a_delayed_update_whose_rate_has_become_too_small_returns_to_the_residual(
    multi_quantum: bool,
) -> None:
    def work(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
        inner = torch.optim.SGD([parameter], lr=1.0)
        optimizer = GTC(inner, comm, threshold=0.125, delay=True, multi_quantum=multi_quantum)
        train(optimizer, parameter, torch.full_like(parameter, 0.75))
        optimizer.param_groups[0]["lr"] = 1e-5 if multi_quantum else 1e-6
        optimizer.synchronize()
        assert parameter.tolist() == [0.0] * 4
        assert optimizer._residuals[0].tolist() == [0.75] * 4

    in_process(2, work)
