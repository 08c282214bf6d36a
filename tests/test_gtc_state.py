"""Checkpoints of gradient threshold compression, also for another number of workers."""

import copy
import io
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from gtc_worker import NUM_ELEMENTS, RATES, Worker, assert_equal_states, gradient_of

from teacherstudent.distributed import (
    GTC,
    Communicator,
    ExactAveraging,
    fold_states,
    in_process,
    ranks_to_fold,
)

EVERY_OPTION: dict[str, Any] = {
    "density": 5e-3,
    "ramp_steps": 6,
    "capacity": 0.02,
    "multi_quantum": True,
    "warmup_steps": 3,
    "momentum": 0.75,
    "clip_norm": 20.0,
}
State = dict[str, Any]


def train(worker: Worker, steps: range, rate: float | None = None) -> None:
    for step in steps:
        weight = 1 + (step + worker.comm.rank) % 3
        gradient = gradient_of(worker.comm.rank, step, worker.parameter.dtype)
        worker.step(gradient, RATES[step % len(RATES)] if rate is None else rate, weight)


def state_of(worker: Worker) -> State:
    """Everything, also the weights, as torch.save would keep it."""
    file = io.BytesIO()
    torch.save({"optimizer": worker.optimizer.state_dict(), "weights": worker.parameter.detach()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(worker: Worker, state: State) -> None:
    worker.optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        worker.parameter.copy_(state["weights"])


@pytest.mark.parametrize(
    "options", [EVERY_OPTION, {"density": 0.05}, {"threshold": 0.125, "capacity": 0.1}], ids=str
)
def test_going_on_from_a_checkpoint_of_any_step_is_going_on(options: dict[str, Any]) -> None:
    num_steps = 14

    def work(comm: Communicator) -> None:
        whole, states = Worker(comm, **options), []
        for step in range(num_steps):
            states.append(state_of(whole))
            train(whole, range(step, step + 1))
        if "capacity" in options:
            assert whole.optimizer.metrics()["carried_over"] > 0
        for stop, state in enumerate(states):
            resumed = Worker(comm, **options)
            resume(resumed, state)
            train(resumed, range(stop, num_steps))
            end = state_of(resumed)
            for mine in (end, final := state_of(whole)):
                mine["optimizer"]["distributed"]["counters"].pop("bytes_sent")  # of the constructor, too
            assert_equal_states(end, final)

    in_process(2, work)


def test_every_rank_loads_its_own_state_and_that_of_the_same_model() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, density=0.1)
        train(worker, range(5))
        saved = copy.deepcopy(worker.optimizer.state_dict())
        fresh = Worker(comm, density=0.1)
        fresh.optimizer.load_state_dict(saved)
        assert torch.equal(fresh.residual, worker.residual)
        with pytest.raises(ValueError, match=r"momentum is 0\.5 now"):
            Worker(comm, density=0.1, momentum=0.5).optimizer.load_state_dict(saved)
        halved = copy.deepcopy(saved)
        halved["distributed"]["residuals"] = [saved["distributed"]["residuals"][0][:200]]
        with pytest.raises(ValueError, match="load the state of the same model"):
            fresh.optimizer.load_state_dict(halved)
        saved["distributed"]["rank"] = 1 - comm.rank
        with pytest.raises(ValueError, match="every rank loads its own"):
            fresh.optimizer.load_state_dict(saved)

    in_process(2, work)


def test_a_threshold_that_is_asked_for_holds_against_that_of_the_state() -> None:
    [comm] = in_process(1, lambda comm: comm)
    worker = Worker(comm, threshold=0.25)
    train(worker, range(3))
    other = Worker(comm, threshold=0.5)
    with pytest.warns(
        UserWarning, match="in this state is 0.25; training goes on with threshold=0.5, as asked"
    ):
        other.optimizer.load_state_dict(worker.optimizer.state_dict())
    assert other.optimizer.metrics()["threshold"] == 0.5
    held = Worker(comm, density=0.1)
    held.optimizer.load_state_dict(worker.optimizer.state_dict())
    assert held.optimizer.metrics()["threshold"] == 0.25
    train(held, range(3, 30))
    assert held.optimizer.metrics()["threshold"] != 0.25


# ---- another number of workers ---------------------------------------------------------------------------------


def save_states(num_ranks: int, dtype: torch.dtype = torch.float32, **options: Any) -> list[State]:
    def work(comm: Communicator) -> State:
        worker = Worker(comm, dtype, **options)
        train(worker, range(8))
        return state_of(worker)

    return in_process(num_ranks, work)


def fold(states: list[State], rank: int, size: int) -> State:
    needed = ranks_to_fold(rank, size, len(states))
    folded = fold_states([states[old]["optimizer"] for old in needed], rank, size)
    return {"optimizer": folded, "weights": states[needed[0]]["weights"]}


def total_of(states: list[State], name: str) -> list[Fraction]:
    """The mean over the ranks of what a residual, or a velocity, holds."""
    parts = [state["optimizer"]["distributed"][name][0].double().tolist() for state in states]
    return [sum(map(Fraction, column)) / len(states) for column in zip(*parts)]


@pytest.mark.parametrize("saved_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_another_number_of_workers_keeps_the_mean_of_what_waits(saved_size: int, size: int) -> None:
    saved = save_states(saved_size, **EVERY_OPTION)
    before = copy.deepcopy(saved)
    folded = [fold(saved, rank, size) for rank in range(size)]
    assert_equal_states(saved, before)
    for name in ("residuals", "velocities"):
        sums = [
            sum(state["optimizer"]["distributed"][name][0].abs().double() for state in states) / len(states)
            for states in (saved, folded)
        ]
        rounding = [float(total) * 2.0**-24 for total in sums[0]]
        assert float(sums[0].max()) > 0
        for was, now, most in zip(total_of(saved, name), total_of(folded, name), rounding):
            assert abs(was - now) <= most * 1.001
        if size in (saved_size, 2 * saved_size):  # then every number is only doubled, or not even that
            assert total_of(saved, name) == total_of(folded, name)
    for name in ("quanta_sent", "carried_over", "clipped", "bytes_sent", "steps"):
        was, now = (
            [state["optimizer"]["distributed"]["counters"][name] for state in states]
            for states in (saved, folded)
        )
        assert now == was[:1] * size if name == "steps" else sum(now) == sum(was)


@pytest.mark.parametrize(("saved_size", "size"), [(4, 2), (3, 2), (2, 3)])
def test_training_goes_on_with_another_number_of_workers_and_loses_nothing(
    saved_size: int, size: int
) -> None:
    """Weights − mean residual = −Σ of all mean updates in float64, across the change; and no warning."""
    saved = save_states(saved_size, torch.float64, density=0.05)

    def work(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        worker = Worker(comm, torch.float64, density=0.05)
        resume(worker, fold(saved, comm.rank, comm.size))
        train(worker, range(8, 20), rate=0.2)
        return worker.parameter.detach(), worker.residual

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights, residuals = (torch.stack(column) for column in zip(*in_process(size, work)))
    assert all(torch.equal(weights[0], other) for other in weights)
    expected = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    for step in range(20):
        num_ranks, rate = (saved_size, RATES[step % len(RATES)]) if step < 8 else (size, 0.2)
        shares = [1 + (step + rank) % 3 for rank in range(num_ranks)]
        for rank, share in enumerate(shares):
            expected -= rate * share / sum(shares) * gradient_of(rank, step, torch.float64)
    assert float(residuals.abs().max()) > 1e-3
    assert float((weights[0] - residuals.mean(dim=0) - expected).abs().max()) < 1e-12


def test_without_folding_another_number_of_workers_is_a_warning_that_says_how() -> None:
    states = save_states(3, density=0.1)

    def load(comm: Communicator) -> float:
        worker = Worker(comm, density=0.1)
        worker.optimizer.load_state_dict(states[comm.rank]["optimizer"])
        assert not worker.residual.any()
        train(worker, range(8, 9))
        return worker.optimizer.metrics()["threshold"]

    with pytest.warns(
        UserWarning, match="saved by 3 workers and is loaded by 2: all .* is lost; fold_states keeps it"
    ):
        assert len(set(in_process(2, load))) == 1


def test_each_state_is_needed_once() -> None:
    for saved_size in range(1, 9):
        for size in range(1, 9):
            needed = [
                old for rank in range(min(size, saved_size)) for old in ranks_to_fold(rank, size, saved_size)
            ]
            assert sorted(needed) == list(range(saved_size))
            assert all(len(ranks_to_fold(rank, size, saved_size)) == 1 for rank in range(saved_size, size))


def without(states: list[State], key: str) -> list[State]:
    return [{name: value for name, value in state.items() if name != key} for state in states]


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda states: [], "one or more"),
        (lambda states: without(states[:1], "distributed"), "needs states of GTC"),
        (
            lambda states: states[:2],
            r"needs the states of ranks \[0, 2\] of 3, and got those of ranks \[0, 1\]",
        ),
        (lambda states: states[:1], r"got those of ranks \[0\]"),
        (lambda states: [states[0], states[2], states[2]], r"got those of ranks \[0, 2, 2\]"),
    ],
)
def test_other_states_than_those_needed_are_refused(
    pick: Callable[[list[State]], list[State]], message: str
) -> None:
    states = [state["optimizer"] for state in save_states(3, density=0.1)]
    with pytest.raises(ValueError, match=message):
        fold_states(pick(states), 0, 2)


def test_states_of_different_steps_or_methods_are_refused() -> None:
    states = [state["optimizer"] for state in save_states(2, density=0.1)]
    states[1]["distributed"]["counters"]["steps"] += 1
    with pytest.raises(ValueError, match="from different steps"):
        fold_states(states, 0, 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ranks_to_fold(2, 2, 3)
    [comm] = in_process(1, lambda comm: comm)
    exact = ExactAveraging(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0), comm)
    with pytest.raises(ValueError, match="needs states of GTC"):
        fold_states([exact.state_dict()], 0, 1)


def test_a_state_does_not_depend_on_how_parameters_are_laid_out() -> None:
    """It lists residuals by parameter, also where several dtypes make several buckets."""

    def work(comm: Communicator) -> None:
        dtypes = (torch.float32, torch.float64, torch.float32, torch.bfloat16)
        parameters = [
            torch.nn.Parameter(torch.zeros(2, index + 1, dtype=dtype)) for index, dtype in enumerate(dtypes)
        ]
        optimizer = GTC(torch.optim.SGD(parameters, lr=1.0), comm, threshold=8.0)
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, index + 1)
        optimizer.step()
        residuals = optimizer.state_dict()["distributed"]["residuals"]
        assert [tuple(residual.shape) for residual in residuals] == [(2, 1), (2, 2), (2, 3), (2, 4)]
        assert [residual.unique().tolist() for residual in residuals] == [[1.0], [2.0], [3.0], [4.0]]
        assert residuals[3].dtype == torch.float32

    in_process(2, work)


def test_a_delayed_step_must_be_applied_before_the_number_of_workers_changes() -> None:
    def work(comm: Communicator) -> State:
        worker = Worker(comm, torch.float64, threshold=0.125, delay=True)
        train(worker, range(5))
        with pytest.raises(ValueError, match=r"call synchronize\(\) before saving"):
            fold_states([worker.optimizer.state_dict()], comm.rank, 3)
        worker.optimizer.synchronize()
        return state_of(worker)

    states = in_process(2, work)
    folded = [fold(states, rank, 3) for rank in range(3)]
    before, after = (total_of(found, "residuals") for found in (states, folded))
    assert all(abs(one - other) < 1e-12 for one, other in zip(before, after))
