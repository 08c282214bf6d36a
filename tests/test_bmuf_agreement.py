"""What the workers of BMUF decide together at a block's end: who counts, who is left out, what was requested."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bmuf import NUM_ELEMENTS, give_step, global_weights_of, gradient_of, make_parameter

from teacherstudent.distributed import BMUF, Communicator, in_process
from teacherstudent.distributed.block_agreement import find_outliers


def poison(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter[3] = float("nan")


# ---- who is left out -------------------------------------------------------------------------------------------------


def train_with_a_bad_rank(comm: Communicator, bad: int | None, absent: int | None, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """3 blocks of 3 steps; `bad` breaks its model in the second block, `absent` has no data in it."""
    parameter = make_parameter()
    optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3, block_momentum=0.5, **options)
    for step in range(9):
        in_second = 3 <= step < 6
        give_step(
            optimizer, parameter, comm.rank, step, 0 if comm.rank == absent and in_second else 1 + comm.rank
        )
        if comm.rank == bad and step == 4:
            poison(parameter)
    assert optimizer.metrics()["ranks_left_out"] == (bad is not None)
    return global_weights_of(optimizer, parameter)


def test_a_model_that_is_not_finite_counts_as_that_of_a_worker_without_data() -> None:
    with pytest.warns(
        UserWarning, match="block 1: rank 1 is left out of the average.*its model is not finite"
    ):
        found = in_process(3, lambda comm: train_with_a_bad_rank(comm, bad=1, absent=None))
    wanted = in_process(3, lambda comm: train_with_a_bad_rank(comm, bad=None, absent=1))
    for weights in found:
        assert torch.equal(weights, wanted[0])


def test_an_update_that_is_finite_until_it_is_weighed_counts_as_one_that_is_not() -> None:
    """A share is the number of workers at most: so many times as much must be a finite number."""

    def work(comm: Communicator) -> float:
        parameter = make_parameter(torch.float32)
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=2)
        give_step(optimizer, parameter, comm.rank, 0)
        if comm.rank == 1:
            parameter.detach().fill_(torch.finfo(torch.float32).max / 2)
        give_step(optimizer, parameter, comm.rank, 1, weight=1 + 100 * comm.rank)
        assert bool(global_weights_of(optimizer, parameter).isfinite().all())
        return optimizer.metrics()["ranks_left_out"]

    with pytest.warns(UserWarning, match="rank 1 is left out .* its model is not finite"):
        assert in_process(3, work) == [1] * 3


def test_every_worker_warns_of_the_one_that_is_left_out() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_process(3, lambda comm: train_with_a_bad_rank(comm, bad=2, absent=None))
    assert [str(one.message)[:50] for one in caught] == [
        "block 1: rank 2 is left out of the average, and st"
    ] * 3


@pytest.mark.filterwarnings("ignore:block")
@pytest.mark.parametrize("local_state", ["keep", "reset", "average"])
def test_a_worker_that_is_left_out_starts_again_from_the_common_model_without_a_state_of_its_own(
    local_state: str,
) -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        optimizer = BMUF(inner, comm, block_steps=3, local_state=local_state)
        for step in range(3):
            parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            if step == 2 and comm.rank == 1:
                poison(parameter)
                inner.state[parameter]["momentum_buffer"].fill_(math.inf)
            optimizer.step()
        starts = comm.all_gather(parameter.detach())
        assert torch.equal(starts[0], starts[1]) and bool(starts[0].isfinite().all())
        state = inner.state.get(parameter, {})
        if local_state == "average":
            other = comm.all_gather(state["momentum_buffer"])
            assert torch.equal(other[0], other[1]) and bool(other[0].isfinite().all())
        else:
            assert bool(state) == (local_state == "keep" and comm.rank == 0)

    in_process(2, work)


def test_where_no_worker_can_be_used_all_of_them_get_the_error() -> None:
    def work(comm: Communicator, weights: tuple[int, ...], bad: set[int]) -> None:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=1)
        parameter.grad = torch.ones_like(parameter)
        if comm.rank in bad:
            poison(parameter)
        with pytest.raises(
            FloatingPointError, match=r"nothing of this block can be used \(rank 0: its model is not"
        ):
            optimizer.step(weight=weights[comm.rank])

    in_process(2, lambda comm: work(comm, (1, 1), {0, 1}))
    in_process(2, lambda comm: work(comm, (1, 0), {0}))  # the other one has learnt nothing
    in_process(1, lambda comm: work_alone(comm, work))


def work_alone(comm: Communicator, work) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(UserWarning, match="BMUF with one worker"):
        work(comm, (1,), {0})


# ---- outliers --------------------------------------------------------------------------------------------------------


def train_with_losses(
    comm: Communicator, losses: list[float], weights: list[int], factor: float | None
) -> tuple[torch.Tensor, float]:
    parameter = make_parameter()
    optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=2, outlier_factor=factor)
    for step in range(2):
        optimizer.report_loss(torch.tensor(losses[comm.rank] + step))
        give_step(optimizer, parameter, comm.rank, step, weights[comm.rank])
    return global_weights_of(optimizer, parameter), optimizer.metrics()["ranks_left_out"]


def test_an_outlier_counts_as_a_worker_without_data() -> None:
    losses, weights = [2.0, 1.0, 9.0], [3, 1, 2]
    with pytest.warns(UserWarning, match="rank 2 is left out .*: its loss is 9.5, the median 2.5"):
        found = in_process(3, lambda comm: train_with_losses(comm, losses, weights, 3.0))
    wanted = in_process(3, lambda comm: train_with_losses(comm, losses, [3, 1, 0], None))
    for weights_found, num_left_out in found:
        assert torch.equal(weights_found, wanted[0][0])
        assert num_left_out == 1
    for _, num_left_out in in_process(3, lambda comm: train_with_losses(comm, losses, weights, 4.0)):
        assert num_left_out == 0  # 9.5 is not above 4 · 2.5


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 20), st.floats(0, 1e6), min_size=1),
    st.floats(1.01, 100),
    st.sets(st.integers(0, 20)),
)
def test_outliers_are_few_and_do_not_depend_on_the_unit_of_the_loss(
    losses: dict[int, float], factor: float, broken: set[int]
) -> None:
    outliers = set(find_outliers(losses, factor))
    assert len(outliers) <= len(losses) // 2  # never the median, nor what is below it
    assert set(find_outliers({rank: loss * 1024 for rank, loss in losses.items()}, factor)) == outliers
    with_nan = {**losses, **{rank + 100: math.nan for rank in broken}, 200: math.inf}
    assert set(find_outliers(with_nan, factor)) == outliers | {rank + 100 for rank in broken} | {200}


def test_a_loss_counts_by_its_weight_and_not_at_all_where_the_worker_has_not_trained() -> None:
    def work(comm: Communicator) -> float:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3, outlier_factor=2.0)
        # rank 1: (1·1 + 3·9)/10 would be 2.8 by weight, 1.1 on the wrong sides; the others have a loss of 1
        for step, (loss, weight) in enumerate([(9.0, 1), (1.0, 9), (1e9, 0)]):
            optimizer.report_loss(loss if comm.rank == 1 else 1.0)
            give_step(optimizer, parameter, comm.rank, step, weight)
        return optimizer.metrics()["ranks_left_out"]

    assert in_process(3, work) == [0, 0, 0]  # the mean of rank 1 is 1.8


def test_outliers_want_losses() -> None:
    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=1, outlier_factor=2.0)
        if comm.rank == 0:
            optimizer.report_loss(1.0)
        with pytest.raises(
            ValueError, match=r"rank 1 has reported no loss in this block; call optimizer\.report_loss"
        ):
            give_step(optimizer, parameter, comm.rank, 0)

    in_process(2, work)


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 12}], ids=["in blocks", "while warming up"])
def test_what_one_worker_requests_all_hear_of_at_the_blocks_end_and_for_one_block(
    options: dict[str, int],
) -> None:
    def work(comm: Communicator) -> list[tuple[bool, bool]]:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=4, **options)
        heard = []
        for step in range(12):
            if comm.rank == 1 and step == 1:
                optimizer.request("stop")
            if comm.rank == 2 and step == 5:
                optimizer.request("checkpoint")
            give_step(optimizer, parameter, comm.rank, step)
            heard.append((optimizer.agreed("stop"), optimizer.agreed("checkpoint")))
        return heard

    expected = [(False, False)] * 3 + [(True, False)] * 4 + [(False, True)] * 4 + [(False, False)]
    assert in_process(3, work) == [expected] * 3


def test_synchronize_hears_requests_too_whatever_the_number_of_fragments() -> None:
    def work(comm: Communicator) -> bool:
        parameters = [make_parameter(), make_parameter()]
        optimizer = BMUF(torch.optim.SGD(parameters, lr=0.1), comm, block_steps=4, fragments=2)
        if comm.rank == 1:
            optimizer.request("stop")
        optimizer.synchronize()
        return optimizer.agreed("stop")

    assert in_process(2, work) == [True, True]


def test_an_unknown_request_is_refused() -> None:
    def work(comm: Communicator) -> None:
        optimizer = BMUF(torch.optim.SGD([make_parameter()], lr=0.1), comm)
        for call in (optimizer.request, optimizer.agreed):
            with pytest.raises(ValueError, match=r"\('pause'\): choose one of \('stop', 'checkpoint'\)"):
                call("pause")

    in_process(2, work)


def test_the_agreement_of_a_block_costs_a_few_integers() -> None:
    def work(comm: Communicator) -> float:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=4)
        before = optimizer.metrics()["bytes_sent"]
        for step in range(4):
            give_step(optimizer, parameter, comm.rank, step)
        return optimizer.metrics()["bytes_sent"] - before

    assert (
        in_process(2, work) == [8 * NUM_ELEMENTS + 2 * 7 * 8] * 2
    )  # the updates, and 7 integers for each of 2 ranks


def test_where_half_of_the_workers_have_no_loss_at_all_nobody_is_an_outlier() -> None:
    assert find_outliers({0: 0.0, 1: 0.0, 2: 1e-9}, 3.0) == {}
    assert list(find_outliers({0: 0.0, 1: 0.0, 2: float("inf")}, 3.0)) == [2]


def test_a_request_in_the_warm_up_is_heard_when_the_workers_synchronize() -> None:
    def work(comm: Communicator) -> bool:
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=50, warmup_steps=9)
        parameter.grad = torch.ones(3)
        optimizer.step()
        if comm.rank == 1:
            optimizer.request("stop")
        optimizer.synchronize()
        return optimizer.agreed("stop")

    assert in_process(2, work) == [True, True]


def test_a_gradient_that_stays_on_its_worker_may_be_as_large_as_its_type_holds() -> None:
    def work(comm: Communicator) -> tuple[float, float]:
        parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
        optimizer = BMUF(torch.optim.SGD([parameter], lr=2.0**-15), comm, block_steps=50)
        parameter.grad = torch.full((3,), 40000.0, dtype=torch.float16)
        optimizer.step()
        return optimizer.metrics()["skipped_nonfinite"], round(parameter[0].item(), 2)

    assert in_process(2, work) == [(0, -1.22)] * 2
