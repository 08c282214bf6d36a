"""Gradient threshold compression: exact bookkeeping, whatever happens to the learning rate."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from gtc_worker import (
    ALL_AT_ONCE,
    NUM_ELEMENTS,
    RATES,
    WEIGHTS,
    Worker,
    counts_of,
    gradient_of,
    quiet_gtc,
)

from teacherstudent.distributed import GTC, Communicator, ExactAveraging, in_process

# ---- conservation ------------------------------------------------------------------------------------------


class Ledger:
    """What a worker must do with what it is given, in numpy, which rounds after every operation."""

    def __init__(self, dtype: type[np.floating[Any]], options: dict[str, Any]) -> None:
        self.dtype = dtype
        self.options = options
        self.residual = np.zeros(NUM_ELEMENTS, dtype)
        self.velocity = np.zeros(NUM_ELEMENTS, dtype)
        self.cursor = 0
        self.num_left = 0
        self.owed = [Fraction(0)] * NUM_ELEMENTS  # the sum of the increments as rounded, less what was sent

    def step(self, gradient: np.ndarray, rate: float, share: float, threshold: float) -> np.ndarray:
        """Counts (n) that are sent."""
        if not rate:
            return np.zeros(NUM_ELEMENTS, np.int64)
        before = self.residual
        self.residual = before + self._increment(gradient, rate, share)
        due = np.abs(self.residual) >= threshold
        whole = np.floor(np.abs(self.residual.astype(np.float64)) / threshold)
        if not self.options.get("multi_quantum"):
            whole = np.minimum(whole, 1)
        counts = np.where(self._choose(due), np.sign(self.residual) * whole, 0).astype(np.int64)
        sent = counts * np.float64(threshold)
        grown, kept = self.residual.astype(np.float64), self.residual.astype(np.float64) - sent
        self.residual = kept.astype(self.dtype)
        for index in range(0, NUM_ELEMENTS, 16):  # rational numbers are slow
            increment = Fraction(grown[index]) - Fraction(float(before[index]))
            self.owed[index] += increment - int(counts[index]) * Fraction(threshold)
        if self.options.get("momentum_masking", True):
            self.velocity[counts != 0] = 0
        return counts

    def _increment(self, gradient: np.ndarray, rate: float, share: float) -> np.ndarray:
        if "clip_norm" in self.options and share:
            norm = float(
                np.sqrt(self.dtype(sum(int(value) ** 2 for value in gradient)))
            )  # a sum without rounding
            share *= min(1.0, self.options["clip_norm"] / norm)
        if not self.options.get("momentum"):
            return gradient * self.dtype(rate * share)
        self.velocity = self.velocity * self.dtype(self.options["momentum"]) + gradient * self.dtype(share)
        return self.velocity * self.dtype(rate)

    def _choose(self, due: np.ndarray) -> np.ndarray:
        most = math.ceil(self.options.get("capacity", 1.0) * NUM_ELEMENTS)
        if due.sum() <= most:
            return due
        chosen = np.zeros_like(due)
        for index in (*range(self.cursor, NUM_ELEMENTS), *range(self.cursor)):
            if due[index] and chosen.sum() < most:
                chosen[index], last = True, index
        self.cursor = last + 1
        self.num_left += int(due.sum() - chosen.sum())
        return chosen


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.05},
        {"density": 0.4},
        {"threshold": 0.125},
        {"density": 0.05, "multi_quantum": True},
        {"threshold": 0.125, "multi_quantum": True},
        {"density": 0.05, "codec": "words"},
        {"density": 0.05, "codec": "rice", "multi_quantum": True},
        {"density": 0.05, "codec": "bitmap"},
        {"density": 0.05, "codec": "dense"},
        {"threshold": 0.125, "capacity": 0.1},
        {"threshold": 0.125, "capacity": 1e-3},
        {"threshold": 0.125, "capacity": 0.0139},
        {"density": 0.05, "momentum": 0.9},
        {"density": 0.05, "momentum": 0.9, "momentum_masking": False, "multi_quantum": True},
        {"density": 0.05, "clip_norm": 40.0},
        ALL_AT_ONCE,
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_step_conserves_every_element_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """fl(r + fl(lr·s·g)) = r′ + quanta·τ exactly, across changing rates, weights, thresholds, codecs and overflow.

    Hence Σ sent + residual is the sum of the increments as rounded, checked in rational numbers.
    """
    num_steps = 30

    def work(comm: Communicator) -> tuple[set[int], set[float]]:
        worker = Worker(comm, dtype, **options)
        ledger = Ledger(np.float32 if dtype == torch.float32 else np.float64, options)
        for step in range(num_steps):
            rate, weights = RATES[step % len(RATES)], WEIGHTS[step % len(WEIGHTS)]
            gradient = gradient_of(comm.rank, step, dtype)
            if "clip_norm" in options:
                gradient = (4 * gradient).round()
            worker.step(gradient, rate, weights[comm.rank])
            share = 3 * weights[comm.rank] / sum(weights)
            counts = ledger.step(gradient.numpy(), rate, share, worker.last_threshold)
            assert counts_of(worker.fired[-1].quanta).tolist() == counts.tolist()
            assert worker.residual.numpy().tobytes() == ledger.residual.tobytes()
            if "momentum" in options:
                assert np.array_equal(worker.velocity.numpy(), ledger.velocity)
        assert ledger.owed[::16] == [Fraction(float(value)) for value in ledger.residual[::16]]
        assert worker.optimizer.metrics()["carried_over"] == ledger.num_left
        assert bool(ledger.num_left) == ("capacity" in options)
        assert bool(worker.optimizer.metrics()["clipped"]) == ("clip_norm" in options)
        codecs = {int(messages[comm.rank][4]) for messages in worker.messages}
        return codecs, {fired.place.threshold for fired in worker.fired}

    seen = in_process(3, work)
    if options == {"density": 0.4}:
        assert all(len(codecs) > 1 for codecs, _ in seen)
    assert all(
        thresholds == seen[0][1] and (len(thresholds) > 1) == ("density" in options) for _, thresholds in seen
    )


def test_with_many_quanta_a_step_no_residual_outgrows_the_threshold_and_the_weights_follow_plain_sgd() -> (
    None
):
    """Where one quantum a step falls behind: gradients of a thousand thresholds, in a few elements."""

    def work(comm: Communicator, multi_quantum: bool) -> tuple[float, float]:
        worker = Worker(comm, threshold=0.125, multi_quantum=multi_quantum)
        followed = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        for step in range(30):
            gradients = [gradient_of(rank, step) for rank in range(comm.size)]
            for gradient in gradients:
                gradient[:5] += 1000.0
            worker.step(gradients[comm.rank], rate=0.5)
            followed -= 0.5 * torch.stack(gradients).double().mean(dim=0)
        behind = (worker.parameter.detach().double() - followed).abs().max()
        return float(behind), float(worker.residual.abs().max())

    for behind, residual in in_process(2, lambda comm: work(comm, True)):
        assert residual < 0.125
        assert behind < 0.125 + 0.01  # what all workers still hold, on average, and rounding
    for behind, residual in in_process(2, lambda comm: work(comm, False)):
        assert residual > 1000
        assert behind > 1000


@pytest.mark.parametrize("options", [{"density": 0.1}, ALL_AT_ONCE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_inner_optimizer_gets_the_quanta_of_all_workers_whatever_the_present_rate(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Bit for bit fl(τ·c)/N/lr, with c the sum of what every worker has sent."""

    def work(comm: Communicator) -> list[tuple[float, float, torch.Tensor, torch.Tensor | None]]:
        worker = Worker(comm, dtype, **options)
        steps = []
        for step in range(20):
            rate = RATES[step % len(RATES)]
            worker.step(gradient_of(comm.rank, step, dtype), rate)
            gradient = worker.parameter.grad
            counts = counts_of(worker.fired[-1].quanta)
            steps.append(
                (rate, worker.last_threshold, counts, gradient if gradient is None else gradient.clone())
            )
        return steps

    for ranks in zip(*in_process(3, work)):
        rate, threshold = ranks[0][:2]
        counts = torch.stack([counts for _, _, counts, _ in ranks]).sum(dim=0)
        for _, _, _, gradient in ranks:
            if not rate:
                assert gradient is None
                continue
            expected = counts.numpy().astype(gradient.numpy().dtype) * gradient.numpy().dtype.type(threshold)
            expected = expected / gradient.numpy().dtype.type(3) / gradient.numpy().dtype.type(rate)
            assert np.array_equal(gradient.numpy(), expected)


def test_a_residual_earned_at_one_rate_is_never_applied_at_another() -> None:
    """Weights + residuals = −Σ lr·s·g / N in float64, though the rate moves by three orders of magnitude."""

    def work(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        worker = Worker(comm, torch.float64, density=0.05)
        earned = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        for step in range(200):
            rate, weights = RATES[step % len(RATES)] * 0.99**step, WEIGHTS[step % len(WEIGHTS)]
            gradient = gradient_of(comm.rank, step, torch.float64)
            worker.step(gradient, rate, weights[comm.rank])
            earned += rate * weights[comm.rank] / sum(weights) * gradient
        return worker.parameter.detach(), worker.residual, earned

    weights, residuals, earned = (torch.stack(column) for column in zip(*in_process(3, work)))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert float(residuals.abs().max()) > 1e-3
    error = weights[0] - residuals.sum(0) / 3 + earned.sum(0)
    assert float(error.abs().max()) < 1e-12


def test_a_rate_of_0_sends_nothing_keeps_the_residual_and_leaves_momentum_alone() -> None:
    def work(comm: Communicator) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(NUM_ELEMENTS)) for _ in range(2)]
        groups = [{"params": [parameter], "lr": 0.1} for parameter in parameters]
        optimizer = quiet_gtc(torch.optim.SGD(groups, momentum=0.9), comm, density=0.1)

        def step(number: int) -> None:
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, number)
            optimizer.step()

        for number in range(5):
            step(number)
        optimizer.param_groups[0]["lr"] = 0.0
        still = slice(0, NUM_ELEMENTS)
        residual = optimizer._residuals[0][still].clone()
        buffer = optimizer.state[parameters[0]]["momentum_buffer"].clone()
        weights = parameters[0].detach().clone()
        other = parameters[1].detach().clone()
        optimizer._controller.level -= 8  # type: ignore[operator]  # halved: much would be due
        for number in range(5, 8):
            step(number)
        assert torch.equal(optimizer._residuals[0][still], residual)
        assert torch.equal(optimizer.state[parameters[0]]["momentum_buffer"], buffer)
        assert torch.equal(parameters[0], weights)
        assert not torch.equal(parameters[1], other)
        optimizer.param_groups[1]["lr"] = 0.0
        quanta = optimizer.metrics()["quanta_sent"]
        step(8)
        assert optimizer.metrics()["quanta_sent"] == quanta

    in_process(2, work)


def test_training_may_begin_at_a_rate_of_0() -> None:
    def work(comm: Communicator) -> float:
        worker = Worker(comm, density=0.1)
        for step in range(6):
            worker.step(gradient_of(comm.rank, step), rate=0.01 * max(0, step - 1))
        assert "threshold" in worker.optimizer.metrics()
        return worker.optimizer.metrics()["quanta_sent"]

    assert all(num_quanta > 0 for num_quanta in in_process(2, work))


def test_groups_with_their_own_rates_each_conserve_what_they_earned() -> None:
    def work(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.zeros(NUM_ELEMENTS, dtype=torch.float64)) for _ in range(2)]
        groups = [{"params": [parameters[0]], "lr": 0.5}, {"params": [parameters[1]], "lr": 0.01}]
        optimizer = quiet_gtc(torch.optim.SGD(groups), comm, density=0.1)
        earned = torch.zeros(2 * NUM_ELEMENTS, dtype=torch.float64)
        for step in range(100):
            gradient = gradient_of(comm.rank, step, torch.float64)
            earned += torch.cat([group["lr"] * gradient for group in optimizer.param_groups])
            for parameter in parameters:
                parameter.grad = gradient.clone()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.98
        assert all(float(parameter.detach().abs().max()) > 0.1 for parameter in parameters)
        return torch.cat([parameter.detach() for parameter in parameters]), optimizer._residuals[0] - earned

    (weights, one), (_, other) = in_process(2, work)
    assert float((weights - (one + other) / 2).abs().max()) < 1e-12


def test_where_every_gradient_is_one_quantum_it_is_exact_averaging_also_with_momentum() -> None:
    """Then the residual stays empty, and the momentum buffer sees what exact averaging shows it."""

    def work(comm: Communicator, exact: bool) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(NUM_ELEMENTS))
        inner = torch.optim.SGD([parameter], lr=0.25, momentum=0.5, nesterov=True, weight_decay=0.125)
        optimizer = ExactAveraging(inner, comm) if exact else quiet_gtc(inner, comm, threshold=0.25)
        for step in range(20):
            rate = 0.25 if step % 3 else 0.5
            signs = torch.from_numpy(np.random.default_rng([comm.rank, step]).integers(-1, 2, NUM_ELEMENTS))
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = signs.float() * 0.25 / rate
            optimizer.step()
        return parameter.detach()

    exact = in_process(2, lambda comm: work(comm, True))[0]
    assert all(torch.equal(weights, exact) for weights in in_process(2, lambda comm: work(comm, False)))


def test_a_worker_with_weight_0_still_sends_what_it_owes() -> None:
    def work(comm: Communicator) -> list[float]:
        worker = Worker(comm, threshold=1.0)
        worker.step(torch.full((NUM_ELEMENTS,), 25.0))  # 2.5 in update units: one quantum now, one later
        worker.step(torch.full((NUM_ELEMENTS,), 0.0 if comm.rank else float("nan")), weight=comm.rank)
        return [worker.parameter[0].item(), worker.residual[0].item()]

    assert in_process(2, work) == [[-2.0, 0.5]] * 2


# ---- thresholds ----------------------------------------------------------------------------------------------


def test_a_fixed_threshold_is_moved_to_the_nearest_with_a_message() -> None:
    [comm] = in_process(1, lambda comm: comm)
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning) as warned:
        optimizer = GTC(torch.optim.SGD([parameter], lr=1.0), comm, threshold=0.3)
    assert any("threshold=0.3 is moved to 0.3125" in str(warning.message) for warning in warned)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() == [-0.3125] * 3
    assert optimizer.metrics()["threshold"] == 0.3125


def test_one_worker_applies_its_threshold_and_says_so() -> None:
    [comm] = in_process(1, lambda comm: comm)
    with pytest.warns(UserWarning, match="GTC with one worker"):
        GTC(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0), comm)


# ---- messages ------------------------------------------------------------------------------------------------


def test_a_damaged_message_is_an_error_that_names_its_sender() -> None:
    def work(comm: Communicator) -> str:
        worker = Worker(comm, threshold=0.5)
        start = comm.start_all_gather
        if comm.rank == 1:
            comm.start_all_gather = lambda tensor: start(torch.cat((tensor[:-1], tensor[-1:] ^ 1)))  # type: ignore[method-assign]
        with pytest.raises(ValueError) as caught:
            worker.step(gradient_of(comm.rank, 0))
        assert torch.equal(worker.parameter, torch.zeros(NUM_ELEMENTS))
        return str(caught.value)

    assert all(
        "the GTC message of rank 1 cannot be used: its checksum" in message for message in in_process(3, work)
    )


def test_learning_rates_that_differ_between_workers_are_an_error() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, threshold=0.5)
        with pytest.raises(ValueError, match="differ in learning rate"):
            worker.step(gradient_of(comm.rank, 0), rate=0.1 + comm.rank)

    in_process(2, work)
