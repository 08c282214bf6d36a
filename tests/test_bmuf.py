"""Blockwise model-update filtering, against torch's SGD on the pseudo-gradient."""

import copy
import threading

import numpy as np
import pytest
import torch
from tiny_bmuf import NUM_ELEMENTS, give_step, global_weights_of, gradient_of, make_parameter, quiet_bmuf

from teacherstudent.distributed import BMUF, Communicator, in_process

WEIGHTS = [(1, 1, 1), (2, 5, 1), (0, 3, 3), (4, 0, 0), (1, 1, 2)]


# ---- the filter ------------------------------------------------------------------------------------------------


def filter_by_torch(
    num_workers: int, num_blocks: int, block_steps: int, momentum: float, lr: float, nesterov: bool
) -> list[torch.Tensor]:
    """What the workers' models hold at each block's start, by torch.optim.SGD on W_start − Σ w·W_rank / Σ w."""
    outer = make_parameter()
    filtering = torch.optim.SGD([outer], lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)
    inner_states = [None] * num_workers
    starts = []
    for block in range(num_blocks):
        weighted, total = torch.zeros(NUM_ELEMENTS, dtype=torch.float64), 0
        for rank in range(num_workers):
            parameter = torch.nn.Parameter(outer.detach().clone())
            inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
            if inner_states[rank]:
                inner.load_state_dict(inner_states[rank])  # type: ignore[arg-type]
            block_weight = 0
            for step in range(block * block_steps, (block + 1) * block_steps):
                weight = WEIGHTS[step % len(WEIGHTS)][rank]
                parameter.grad = gradient_of(rank, step, parameter.detach())
                if weight:
                    inner.step()
                block_weight += weight
            weighted += block_weight * parameter.detach()
            total += block_weight
            inner_states[rank] = inner.state_dict()  # type: ignore[call-overload]
        outer.grad = outer.detach() - weighted / total
        filtering.step()
        starts.append(outer.detach().clone())
    return starts


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
@pytest.mark.parametrize(("momentum", "lr"), [(0.0, 1.0), (0.6, 1.0), (0.9, 0.7)])
def test_the_filter_is_torchs_sgd_on_the_pseudo_gradient(nesterov: bool, momentum: float, lr: float) -> None:
    num_blocks, block_steps = 12, 4

    def work(comm: Communicator) -> list[torch.Tensor]:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
        optimizer = BMUF(
            inner,
            comm,
            block_steps=block_steps,
            block_momentum=momentum,
            block_lr=lr,
            nesterov=nesterov,
            local_state="keep",
        )
        starts = []
        for step in range(num_blocks * block_steps):
            give_step(optimizer, parameter, comm.rank, step, WEIGHTS[step % len(WEIGHTS)][comm.rank])
            if (step + 1) % block_steps == 0:
                starts.append(parameter.detach().clone())
        return starts

    expected = filter_by_torch(3, num_blocks, block_steps, momentum, lr, nesterov)
    for starts in in_process(3, work):
        for found, wanted in zip(starts, expected, strict=True):
            assert float((found - wanted).abs().max()) < 1e-12


def test_global_weights_are_the_look_ahead_less_the_filtered_update() -> None:
    """W, Δ and W + ηΔ are three things: recomputed here from what the model shows, block by block."""
    momentum, lr = 0.75, 0.8

    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=0.1)
        optimizer = BMUF(inner, comm, block_steps=3, block_momentum=momentum, block_lr=lr)
        common, update = parameter.detach().clone(), torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        start = common
        for block in range(8):
            for step in range(3):
                if step == 2:  # the last step of the block, taken here instead of there
                    own = parameter.detach() - 0.1 * gradient_of(comm.rank, 3 * block + 2, parameter.detach())
                give_step(optimizer, parameter, comm.rank, 3 * block + step)
            mean = torch.stack(comm.all_gather(own)).mean(0) - start
            update = momentum * update + lr * mean
            common = common + update
            start = common + momentum * update
            assert float((global_weights_of(optimizer, parameter) - common).abs().max()) < 1e-12
            assert float((parameter.detach() - start).abs().max()) < 1e-12

    in_process(2, work)


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
def test_without_momentum_it_is_model_averaging(nesterov: bool) -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=0.1)
        optimizer = BMUF(inner, comm, block_steps=1, block_momentum=0.0, nesterov=nesterov)
        for step in range(10):
            own = parameter.detach() - 0.1 * gradient_of(comm.rank, step, parameter.detach())
            mean = torch.stack(comm.all_gather(own)).mean(0)
            give_step(optimizer, parameter, comm.rank, step)
            assert float((parameter.detach() - mean).abs().max()) < 1e-14

    in_process(3, work)


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
def test_a_quadratic_follows_its_closed_form(nesterov: bool) -> None:
    """On h·x²/2 a block is a linear map of (W, Δ), whose powers are the training."""
    curvature, rate, block_steps, momentum, lr, num_blocks = 0.7, 0.2, 3, 0.8, 0.9, 25
    shrinking = (
        1 - rate * curvature
    ) ** block_steps - 1  # what a block's local steps add to the start, per unit of it
    ahead = momentum * nesterov
    block = np.array(
        [
            [1 + lr * shrinking, momentum + lr * shrinking * ahead],
            [lr * shrinking, momentum + lr * shrinking * ahead],
        ]
    )
    expected = np.linalg.matrix_power(block, num_blocks) @ [2.0, 0.0]

    def work(comm: Communicator) -> float:
        parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        inner = torch.optim.SGD([parameter], lr=rate)
        optimizer = BMUF(
            inner, comm, block_steps=block_steps, block_momentum=momentum, block_lr=lr, nesterov=nesterov
        )
        for _ in range(num_blocks * block_steps):
            parameter.grad = curvature * parameter.detach()
            optimizer.step()
        return float(global_weights_of(optimizer, parameter))

    assert in_process(2, work) == pytest.approx([expected[0]] * 2, abs=1e-12)


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
def test_constant_updates_move_the_model_by_their_sum_over_all_blocks(nesterov: bool) -> None:
    """The velocity is ζd/(1−η) in both forms; counting the look-ahead twice would change it."""
    momentum, lr, distance = 0.75, 0.5, 0.2

    def work(comm: Communicator) -> torch.Tensor:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=1.0)
        optimizer = BMUF(inner, comm, block_steps=1, block_momentum=momentum, block_lr=lr, nesterov=nesterov)
        for _ in range(200):
            before = global_weights_of(optimizer, parameter)
            parameter.grad = torch.full_like(parameter, -distance)
            optimizer.step()
        return global_weights_of(optimizer, parameter) - before

    velocity = in_process(2, work)[0]
    assert float((velocity - lr * distance / (1 - momentum)).abs().max()) < 1e-12


def test_the_block_momentum_follows_the_number_of_workers() -> None:
    def work(comm: Communicator) -> float:
        return quiet_bmuf(torch.optim.SGD([make_parameter()], lr=0.1), comm).block_momentum

    assert [in_process(size, work)[0] for size in (1, 2, 4, 8)] == [0.0, 0.5, 0.75, 0.875]


def test_one_worker_is_the_inner_optimizer_within_a_rounding_a_block_and_says_so() -> None:
    [comm] = in_process(1, lambda comm: comm)
    parameter, plain = make_parameter(torch.float32), make_parameter(torch.float32)
    alone = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="BMUF with one worker: block momentum is 0"):
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1, momentum=0.9), comm, block_steps=5)
    for step in range(20):
        give_step(optimizer, parameter, 0, step)
        plain.grad = gradient_of(0, step, plain.detach())
        alone.step()
    largest = float(plain.detach().abs().max())
    assert float((parameter - plain).detach().abs().max()) <= 8 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 0.0)], ids=str)
def test_permuting_the_workers_changes_nothing(dtype: torch.dtype, tolerance: float) -> None:
    def work(comm: Communicator, order: list[int]) -> torch.Tensor:
        parameter = make_parameter(dtype)
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3)
        for step in range(15):
            give_step(
                optimizer, parameter, order[comm.rank], step, WEIGHTS[step % len(WEIGHTS)][order[comm.rank]]
            )
        return global_weights_of(optimizer, parameter)

    one = in_process(3, lambda comm: work(comm, [0, 1, 2]))[0]
    other = in_process(3, lambda comm: work(comm, [2, 0, 1]))[0]
    assert float((one - other).abs().max()) <= tolerance


def test_learning_rates_may_change_inside_a_block() -> None:
    """Given gradients: the mean update of a block is the mean of Σ lr·g."""
    rates = [0.1, 0.3, 0.0, 0.02]

    def work(comm: Communicator) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(NUM_ELEMENTS, dtype=torch.float64))
        optimizer = BMUF(torch.optim.SGD([parameter], lr=1.0), comm, block_steps=4, block_momentum=0.0)
        for step, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.full_like(parameter, comm.rank + step)
            optimizer.step()
        return parameter.detach()

    expected = -sum(rate * (0.5 + step) for step, rate in enumerate(rates))
    assert float((in_process(2, work)[0] - expected).abs().max()) < 1e-15


# ---- what the model holds ----------------------------------------------------------------------------------------


def test_global_weights_show_w_and_give_the_own_weights_back_untouched() -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter(torch.float32)
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=4)
        for step in range(10):  # ends inside a block
            give_step(optimizer, parameter, comm.rank, step)
        place, own = parameter.data_ptr(), parameter.detach().clone()
        with optimizer.global_weights():
            shown = parameter.detach().clone()
            with optimizer.global_weights():
                assert torch.equal(parameter, shown)
            assert torch.equal(parameter, shown)
            for call in (optimizer.step, optimizer.synchronize):
                with pytest.raises(RuntimeError, match="the model holds W"):
                    call()
        assert torch.equal(parameter, own) and parameter.data_ptr() == place
        assert not torch.equal(shown, own)
        assert torch.equal(*comm.all_gather(shown))
        with pytest.raises(KeyError), optimizer.global_weights():
            raise KeyError
        assert torch.equal(parameter, own)

    in_process(2, work)


def test_synchronize_closes_a_partial_block_and_leaves_w_in_the_model() -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=4, block_momentum=0.5)
        for step in range(6):
            give_step(optimizer, parameter, comm.rank, step)
        update = optimizer._fragments[0].filter.update[0].clone()
        common = global_weights_of(optimizer, parameter)
        mean = torch.stack(comm.all_gather(parameter.detach())).mean(0) - (common + 0.5 * update)
        optimizer.synchronize()
        assert float((parameter.detach() - (common + 0.5 * update + mean)).abs().max()) < 1e-12
        assert torch.equal(global_weights_of(optimizer, parameter), parameter)
        assert optimizer.metrics()["steps_in_block"] == 0
        closed = parameter.detach().clone()
        optimizer.synchronize()  # again: nothing left to do
        assert torch.equal(parameter, closed)
        for step in range(4):  # and training goes on from W
            give_step(optimizer, parameter, comm.rank, step)
        assert optimizer.metrics()["blocks"] == 3

    in_process(2, work)


# ---- blocks that do not go to plan ---------------------------------------------------------------------------------


def test_a_worker_without_data_takes_part_and_weighs_nothing() -> None:
    def work(comm: Communicator) -> torch.Tensor:
        parameter = make_parameter()
        optimizer = quiet_bmuf(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3, block_momentum=0.5)
        for step in range(9):
            give_step(optimizer, parameter, comm.rank, step, weight=0 if comm.rank else 4)
        return global_weights_of(optimizer, parameter)

    one, other = in_process(2, work)
    assert torch.equal(one, other)
    assert float((one - in_process(1, work)[0]).abs().max()) < 1e-12


def test_a_gradient_that_is_not_finite_is_left_out_on_its_worker_alone() -> None:
    def work(comm: Communicator) -> tuple[torch.Tensor, float]:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1, momentum=0.9), comm, block_steps=3)
        for step in range(9):
            parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            if comm.rank == 1 and step == 4:
                parameter.grad[3] = float("nan")
            optimizer.step()
        return global_weights_of(optimizer, parameter), optimizer.metrics()["skipped_nonfinite"]

    (one, none), (other, skipped) = in_process(2, work)
    assert torch.equal(one, other) and bool(one.isfinite().all())
    assert (none, skipped) == (0, 1)


def test_workers_that_meet_at_different_steps_get_an_error_that_says_where_they_are() -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=10)
        for step in range(3 + comm.rank):
            give_step(optimizer, parameter, comm.rank, step)
        with pytest.raises(ValueError, match=r"different steps of their blocks: \{0: 3, 1: 4\}"):
            optimizer.synchronize()

    in_process(2, work)


def test_a_worker_that_never_reaches_the_blocks_end_is_named() -> None:
    release = threading.Event()

    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=2)
        comm.timeout_seconds = 2
        try:
            for step in range(2):
                if comm.rank == 1 and step == 1:
                    release.wait(30)
                give_step(optimizer, parameter, comm.rank, step)
        finally:
            release.set()

    with pytest.raises(TimeoutError, match="waited for rank 1 until the deadline"):
        in_process(3, work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_steps": 0}, "block_steps is 0"),
        ({"block_steps": 2.5}, "block_steps is 2.5"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"fragments": 0}, "fragments is 0"),
        ({"fragments": 51}, "fragments is 51, more than the 50 steps"),
        ({"fragments": 2}, "1 of them would be filled"),
        ({"delay_steps": 50}, "delay_steps is 50; give fewer than the 50"),
        ({"delay_steps": 1, "local_state": "average"}, "which delay_steps is to hide"),
        ({"local_state": "forget"}, "local_state is 'forget'; choose one of keep, reset, average, adam"),
        ({"local_state": "adam"}, "re-estimates the moments of Adam"),
        ({"wire": "int4"}, "wire is 'int4'; choose one of full, bf16, fp16, int8"),
        ({"outlier_factor": 1.0}, "outlier_factor is 1.0"),
        ({"block_momentum": 1.0}, "block_momentum is 1.0"),
        ({"block_momentum": -0.1}, "block_momentum is -0.1"),
        ({"block_lr": 0.0}, "block_lr is 0.0"),
        ({"block_lr": float("nan")}, "block_lr is nan"),
    ],
)
def test_a_setting_out_of_range_is_an_error_on_every_worker(options: dict[str, object], message: str) -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            BMUF(torch.optim.SGD([make_parameter()], lr=0.1), comm, **options)  # type: ignore[arg-type]

    in_process(2, work)


# ---- checkpoints (bit-identical resumption is tested for all methods in test_exact.py) -------------------------------


def test_a_checkpoint_goes_on_with_another_number_of_workers() -> None:
    def save(comm: Communicator) -> tuple[dict, torch.Tensor, torch.Tensor]:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=4)
        for step in range(8):
            give_step(optimizer, parameter, comm.rank, step)
        boundary = parameter.detach().clone()
        give_step(optimizer, parameter, comm.rank, 8)
        return copy.deepcopy(optimizer.state_dict()), global_weights_of(optimizer, parameter), boundary

    states, weights, _ = zip(*in_process(4, save))

    def load(comm: Communicator) -> float:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=4)
        optimizer.load_state_dict(states[comm.rank])
        assert torch.equal(global_weights_of(optimizer, parameter), weights[0])
        # the look-ahead is that of the new block momentum
        ahead = weights[0] + optimizer.block_momentum * optimizer._fragments[0].filter.update[0]
        assert float((parameter.detach() - ahead).abs().max()) < 1e-12
        for step in range(9, 13):
            give_step(optimizer, parameter, comm.rank, step)
        return optimizer.metrics()["blocks"]

    with pytest.warns(UserWarning, match="saved by 4 workers inside a block and is loaded by 2: the 1 steps"):
        assert in_process(2, load) == [3, 3]
