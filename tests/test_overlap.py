"""Exchanging during backward changes nothing but the time."""

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from workers.overlapping import SMALL_BUCKETS, Net, Trainee, assert_equal

from teacherstudent.distributed import GTC, Communicator, in_process
from teacherstudent.distributed.flat import make_buckets
from teacherstudent.distributed.overlap import cut_buckets

NUM_STEPS = 14
WEIGHTS = [(1, 1, 1), (2, 5, 1), (0, 3, 3), (4, 0, 0), (0, 0, 0), (1, 1, 2)]


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.1},
        {"density": 0.1, "momentum": 0.5},
        {"density": 0.1, "dtype": torch.float64, "delay": True},
        {"density": 0.1, "dtype": torch.bfloat16},
        {"threshold": 2**-6, "multi_quantum": True, "warmup_steps": 2},
        {"threshold": 2**-8, "capacity": 0.05},
    ],
    ids=str,
)
def test_overlap_changes_no_bit(options: dict[str, Any]) -> None:
    """Over groups with their own moving rates, weights of 0, unused parameters, skipped steps, several buckets."""

    def work(comm: Communicator) -> None:
        plain, overlapped = (
            Trainee(comm, overlap=overlap, bucket_bytes=SMALL_BUCKETS, **options) for overlap in (False, True)
        )
        assert len(plain.optimizer._buckets) > 3
        for step in range(NUM_STEPS):
            weight = WEIGHTS[step % len(WEIGHTS)][comm.rank]
            ways = [(0, 1), (comm.rank % 2,), (1,)][step % 3]  # used by all ranks, by some, by none
            factor = math.nan if weight == 0 else 1.0  # which counts for nothing
            if step == 8 and comm.rank == 2:
                factor = math.inf  # on one rank, in the bucket that leaves last
            for trainee in (plain, overlapped):
                trainee.step(step, weight, ways, factor)
                for group in trainee.optimizer.param_groups:
                    group["lr"] *= (0.5, 3.0, 0.6)[step % 3]
                if step == 9:
                    trainee.optimizer.param_groups[1]["lr"] = 0.0
                if step == 11:
                    trainee.optimizer.param_groups[1]["lr"] = 0.05
            assert_equal(plain.snapshot(), overlapped.snapshot())
            assert plain.counts() == overlapped.counts()
        assert plain.counts()["skipped_nonfinite"] == 1 and plain.counts()["skipped_empty"] == 2
        assert plain.counts()["quanta_sent"] > 0
        assert ("capacity" in options) == (plain.counts()["carried_over"] > 0)

    in_process(3, work)


def test_buckets_are_exchanged_before_step_is_called() -> None:
    def work(comm: Communicator) -> None:
        trainee = Trainee(comm, threshold=2**-6, overlap=True, bucket_bytes=SMALL_BUCKETS)
        trainee.optimizer.begin_step()
        trainee.loss(0).backward()
        departures = trainee.optimizer._overlap._departures  # type: ignore[union-attr]
        assert len(departures) == len(trainee.optimizer._buckets) > 3
        for departure in departures:
            assert len(departure.exchange.handle.wait()) == comm.size
        comm.barrier()  # all ranks have come so far, none has called step()
        trainee.optimizer.step()

    in_process(3, work)


def test_buckets_that_are_complete_in_another_order_on_every_rank_leave_in_the_same() -> None:
    def work(comm: Communicator) -> tuple[list[list[float]], float]:
        parameters = [torch.nn.Parameter(torch.full((8,), 1.0 + number)) for number in range(4)]
        optimizer = GTC(
            torch.optim.SGD(parameters, lr=0.1),
            comm,
            threshold=2**-4,
            multi_quantum=True,
            overlap=True,
            bucket_bytes=32,
        )
        assert len(optimizer._buckets) == 4
        for step in range(5):
            order = np.random.default_rng([comm.rank, step]).permutation(4)
            value = torch.ones(8)
            for number in order:
                value = torch.sin(value * parameters[number])
            optimizer.zero_grad()
            optimizer.begin_step()
            value.sum().backward()
            comm.all_reduce(torch.zeros(()))  # what the caller exchanges meanwhile does not come between
            optimizer.step()
        return [parameter.tolist() for parameter in parameters], optimizer.metrics()["quanta_sent"]

    results = in_process(4, work, timeout_seconds=20)
    assert all(weights == results[0][0] for weights, _ in results)
    assert all(num_quanta > 0 for _, num_quanta in results)


def test_gradients_of_several_passes_may_be_accumulated_before_the_step_begins() -> None:
    def work(comm: Communicator) -> None:
        plain, overlapped = (
            Trainee(comm, threshold=2**-6, overlap=overlap, bucket_bytes=SMALL_BUCKETS)
            for overlap in (False, True)
        )
        for step in range(4):
            for trainee in (plain, overlapped):
                trainee.optimizer.zero_grad()
                trainee.loss(step).backward()
                if trainee.overlaps:
                    trainee.optimizer.begin_step()
                trainee.loss(step + 100).backward()
                trainee.optimizer.step()
            assert_equal(plain.snapshot(), overlapped.snapshot())

    in_process(2, work)


def test_overlap_under_a_grad_scaler_is_plain_gtc_under_it() -> None:
    def work(comm: Communicator) -> None:
        plain, overlapped = (
            Trainee(comm, density=0.1, overlap=overlap, bucket_bytes=SMALL_BUCKETS)
            for overlap in (False, True)
        )
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
        scales = set()
        for step in range(10):
            spoilt = step in (4, 8) and comm.rank == 1
            for trainee, scaler in zip((plain, overlapped), scalers):
                trainee.optimizer.zero_grad()
                if trainee.overlaps:
                    trainee.optimizer.begin_step(scaler=scaler)
                scaler.scale(trainee.loss(step) * (math.inf if spoilt else 1.0)).backward()
                scaler.step(trainee.optimizer)
                scaler.update()
            assert scalers[0].get_scale() == scalers[1].get_scale()
            scales.add(scalers[0].get_scale())
            assert_equal(plain.snapshot(), overlapped.snapshot())
        assert plain.counts()["skipped_nonfinite"] == 2
        assert len(scales) > 1

    in_process(2, work)


def test_a_step_that_was_not_finite_leaves_no_gradients_to_add_to() -> None:
    def work(comm: Communicator) -> None:
        trainee = Trainee(comm, threshold=2**-6, overlap=True, bucket_bytes=SMALL_BUCKETS)
        trainee.step(0)
        before = trainee.snapshot()
        trainee.step(1, factor=math.nan if comm.rank else 1.0)
        assert all(parameter.grad is None for parameter in trainee.net.parameters())
        assert_equal(before, trainee.snapshot())

    in_process(2, work)


@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("stage", ["before backward", "in it", "behind it"])
def test_a_step_that_one_rank_cannot_go_on_with_is_abandoned_by_all_and_leaves_no_trace(
    stage: str, delay: bool
) -> None:
    def fail(gradient: torch.Tensor) -> None:
        raise MemoryError

    def work(comm: Communicator) -> None:
        whole, other = (
            Trainee(comm, threshold=2**-6, overlap=True, delay=delay, bucket_bytes=SMALL_BUCKETS)
            for _ in range(2)
        )
        for step in range(6):
            whole.step(step)
            if step == 3:
                other.optimizer.zero_grad()
                other.optimizer.begin_step()
                hook = other.net.first.weight.register_hook(fail)  # when most buckets have left
                if comm.rank == 0 or stage == "behind it":
                    hook.remove()
                    other.loss(100).backward()
                elif stage == "in it":
                    with pytest.raises(MemoryError):
                        other.loss(100).backward()
                hook.remove()
                other.optimizer.abandon_step()
                assert all(parameter.grad is None for parameter in other.net.parameters())
            other.step(step)
            assert_equal(whole.snapshot(), other.snapshot())
        assert whole.counts() == other.counts()

    in_process(2, work, timeout_seconds=20)


def test_a_step_without_a_threshold_yet_is_abandoned_too() -> None:
    def work(comm: Communicator) -> None:
        trainee = Trainee(comm, density=0.1, overlap=True)
        trainee.optimizer.begin_step()
        trainee.loss(0).backward()
        trainee.optimizer.abandon_step()
        trainee.step(0)
        assert trainee.counts()["steps"] == 1
        with pytest.raises(ValueError, match=r"abandon_step\(\) came without begin_step\(\)"):
            trainee.optimizer.abandon_step()
        with pytest.raises(ValueError, match=r"abandon_step\(\) belongs to overlap=True"):
            Trainee(comm, density=0.1).optimizer.abandon_step()

    in_process(2, work)


def test_gradients_that_are_cleared_after_a_step_are_freed() -> None:
    [comm] = in_process(1, lambda comm: comm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainee = Trainee(comm, threshold=2**-6, overlap=True, bucket_bytes=SMALL_BUCKETS)
    trainee.step(0)
    gradients = [weakref.ref(parameter.grad) for parameter in trainee.net.parameters()]
    trainee.optimizer.zero_grad()
    assert all(gradient() is None for gradient in gradients)


def weight_differs(trainee: Trainee) -> None:
    trainee.optimizer.begin_step(weight=2)
    trainee.loss(0).backward()
    trainee.optimizer.step(weight=3 if trainee.comm.rank else 2)


def no_begin(trainee: Trainee) -> None:
    trainee.loss(0).backward()
    trainee.optimizer.step()


def two_begins(trainee: Trainee) -> None:
    trainee.optimizer.begin_step()
    trainee.optimizer.begin_step()


def second_backward(trainee: Trainee) -> None:
    trainee.optimizer.begin_step()
    trainee.loss(0).backward()
    trainee.loss(1).backward()


def clipped(trainee: Trainee) -> None:
    trainee.optimizer.begin_step()
    trainee.loss(0).backward()
    torch.nn.utils.clip_grad_norm_(trainee.net.parameters(), 1e-3)
    trainee.optimizer.step()


def zeroed(trainee: Trainee) -> None:
    trainee.optimizer.begin_step()
    trainee.loss(0).backward()
    trainee.optimizer.zero_grad()
    trainee.optimizer.step()


def rate_changed(trainee: Trainee) -> None:
    trainee.optimizer.begin_step()
    trainee.loss(0).backward()
    trainee.optimizer.param_groups[0]["lr"] *= 2
    trainee.optimizer.step()


def scaler_unannounced(trainee: Trainee) -> None:
    scaler = torch.amp.GradScaler("cpu")
    trainee.optimizer.begin_step()
    scaler.scale(trainee.loss(0)).backward()
    scaler.step(trainee.optimizer)


def unscaled_by_hand(trainee: Trainee) -> None:
    scaler = torch.amp.GradScaler("cpu")
    trainee.optimizer.begin_step(scaler=scaler)
    scaler.scale(trainee.loss(0)).backward()
    scaler.unscale_(trainee.optimizer)
    scaler.step(trainee.optimizer)


def saved_in_between(trainee: Trainee) -> None:
    trainee.optimizer.begin_step()
    trainee.optimizer.state_dict()


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (weight_differs, r"rank 1: begin_step\(\) has weight=2, and step\(\) has weight=3"),
        (no_begin, r"step\(\) came without begin_step\(\)"),
        (two_begins, r"begin_step\(\) came twice.* abandon_step\(\) on every rank"),
        (second_backward, r"a second backward\(\) came after begin_step\(\)"),
        (clipped, r"gradients changed between backward\(\) and step\(\), as by clipping"),
        (zeroed, r"gradients changed between backward\(\) and step\(\)"),
        (rate_changed, r"the learning rate changed between begin_step\(\) and step\(\)"),
        (scaler_unannounced, r"give the GradScaler to begin_step\(scaler=…\)"),
        (unscaled_by_hand, r"leave unscaling to step\(\)"),
        (saved_in_between, r"save and load after step\(\)"),
    ],
)
def test_misuse_is_an_error_on_every_worker_and_changes_nothing(
    misuse: Callable[[Trainee], None], message: str
) -> None:
    def work(comm: Communicator) -> None:
        trainee = Trainee(comm, threshold=2**-6, overlap=True, bucket_bytes=SMALL_BUCKETS)
        before = [*trainee.net.parameters(), *trainee.optimizer._residuals]
        copies = [tensor.detach().clone() for tensor in before]
        with pytest.raises(ValueError, match=message):
            misuse(trainee)
        assert_equal([tensor.detach() for tensor in before], copies)

    in_process(2, work, timeout_seconds=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": True, "clip_norm": 1.0}, "clip_norm=1.0 needs all gradients before the first is sent"),
        ({"overlap": True, "momentum": 0.9}, "momentum=0.9 changes velocities"),
        ({"bucket_bytes": 0}, "bucket_bytes is 0"),
    ],
)
def test_options_that_do_not_go_together_are_an_error_on_every_worker(
    options: dict[str, Any], message: str
) -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            GTC(torch.optim.SGD(Net().parameters(), lr=0.1), comm, **options)

    in_process(2, work)


def test_begin_step_without_overlap_is_an_error() -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=r"begin_step\(\) belongs to overlap=True"):
            Trainee(comm, density=0.1).optimizer.begin_step()

    in_process(2, work)


def test_an_optimizer_that_is_gone_does_not_live_on_in_the_hooks_of_its_model() -> None:
    def work(comm: Communicator) -> None:
        trainee = Trainee(comm, density=0.1, overlap=True)
        optimizer = weakref.ref(trainee.optimizer)
        del trainee.optimizer
        for rank in range(comm.size):  # only one thread can collect at a time
            if rank == comm.rank:
                gc.collect()
            comm.barrier()
        assert optimizer() is None
        trainee.loss(0).backward()

    in_process(2, work)


def test_buckets_hold_every_parameter_once_from_the_last_to_the_first() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 100, 7, 5, 20)]
    parameters.insert(2, torch.nn.Parameter(torch.zeros(9, dtype=torch.float64)))
    buckets = cut_buckets(make_buckets([{"params": parameters}]), bucket_bytes=100)
    sizes = [[piece.stop - piece.start for piece in bucket.pieces] for bucket in buckets]
    assert sizes == [[20, 5], [7], [9], [100], [3]]
    indices = [piece.index for bucket in buckets for piece in bucket.pieces]
    assert indices == [5, 4, 3, 2, 1, 0]
    for bucket in buckets:
        assert [piece.start for piece in bucket.pieces] == [0, *(piece.stop for piece in bucket.pieces)][:-1]
