"""Communicators, in process; tests/test_launchers.py runs the same collectives on real processes."""

import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workers.collectives import check_collectives, values_of

from teacherstudent.distributed import Communicator, connect, in_process
from teacherstudent.distributed.communicators import reduce_in_order
from teacherstudent.distributed.launchers import can_use_nccl, first_host, read_launch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_collectives_do_what_they_say_with_any_number_of_workers(num_workers: int) -> None:
    in_process(num_workers, check_collectives)


def test_nothing_may_be_exchanged_whatever_the_stride_of_nothing() -> None:
    def work(comm: Communicator) -> None:
        nothing = torch.tensor(np.zeros(0))  # its stride is 0, as numpy has it
        assert nothing.stride() == (0,)
        gathered = comm.all_gather(nothing) + comm.all_to_all([nothing] * comm.size)
        assert [part.shape for part in gathered] == [(0,)] * (2 * comm.size)
        assert comm.all_reduce(nothing) is nothing and comm.broadcast(nothing) is nothing

    in_process(2, work)


def test_the_ordered_sum_does_not_depend_on_which_rank_holds_what() -> None:
    def total(comm: Communicator, order: list[int]) -> torch.Tensor:
        return comm.all_reduce(values_of(order[comm.rank], 4000, torch.float32))

    one = in_process(4, lambda comm: total(comm, [0, 1, 2, 3]))
    other = in_process(4, lambda comm: total(comm, [2, 0, 3, 1]))
    assert all(torch.equal(tensor, one[0]) for tensor in one + other)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**24), 2**24), min_size=1, max_size=9), st.integers(-30, 30))
def test_a_float32_sum_is_the_exact_sum_rounded_once(numbers: list[int], exponent: int) -> None:
    # Whole multiples of one power of two add up exactly in float64, so the law has an exact oracle here.
    parts = [torch.tensor([number * 2.0**exponent]) for number in numbers]
    exact = sum(Fraction(part.item()) for part in parts)
    assert reduce_in_order(parts, "sum").item() == torch.tensor(float(exact), dtype=torch.float32).item()


def test_an_integer_sum_that_does_not_fit_is_an_error_not_a_wrap() -> None:
    with pytest.raises(OverflowError, match="uint8"):
        in_process(3, lambda comm: comm.all_reduce(torch.tensor([100], dtype=torch.uint8)))


def test_bytes_sent_counts_the_payload_of_a_ring() -> None:
    def work(comm: Communicator) -> int:
        comm.all_reduce(torch.zeros(8000))
        return comm.bytes_sent

    assert in_process(4, work) == [2 * 3 * 2000 * 4] * 4


def test_results_come_in_rank_order_whoever_ends_first() -> None:
    last = threading.Event()

    def work(comm: Communicator) -> int:
        if comm.rank == 2:
            last.set()
        else:
            last.wait(10)
        return comm.rank

    assert in_process(3, work) == [0, 1, 2]


def test_an_exception_wakes_the_others_and_comes_out_with_its_rank() -> None:
    def work(comm: Communicator) -> None:
        if comm.rank == 2:
            raise KeyError("mine alone")
        comm.barrier()

    start = time.monotonic()
    with pytest.raises(KeyError, match="mine alone") as caught:
        in_process(4, work)
    assert time.monotonic() - start < 10
    assert caught.value.__notes__ == ["raised by rank 2 of 4 in-process workers"]


def test_the_error_of_the_lowest_rank_comes_out_when_all_fail_alike() -> None:
    def work(comm: Communicator) -> None:
        comm.barrier()
        raise ValueError(f"rank {comm.rank}")

    with pytest.raises(ValueError, match="rank 0"):
        in_process(3, work)


def test_a_deadline_names_the_late_ranks() -> None:
    release = threading.Event()

    def work(comm: Communicator) -> None:
        if comm.rank in (1, 3):
            release.wait(30)
        try:
            comm.all_reduce(torch.ones(2))
        finally:
            release.set()

    with pytest.raises(TimeoutError, match="waited for ranks 1, 3 until the deadline"):
        in_process(4, work, timeout_seconds=2)


def test_a_barrier_without_deadline_outlasts_the_timeout() -> None:
    never = threading.Event()

    def work(comm: Communicator) -> bool:
        if comm.rank == 1:
            never.wait(3 * comm.timeout_seconds)
        comm.barrier(timeout_seconds=float("inf"))
        return True

    assert in_process(2, work, timeout_seconds=0.1) == [True, True]


def test_ranks_that_call_with_different_sizes_get_an_error() -> None:
    with pytest.raises(ValueError, match="same size"):
        in_process(2, lambda comm: comm.all_reduce(torch.ones(2 + comm.rank)))
    with pytest.raises(ValueError, match="only the first dimension may differ"):
        in_process(2, lambda comm: comm.all_gather(torch.ones(2, 2 + comm.rank)))


def test_a_sender_may_overwrite_its_tensor_once_the_collective_is_over() -> None:
    def work(comm: Communicator) -> list[float]:
        tensor = torch.full((3,), float(comm.rank))
        gathered = comm.all_gather(tensor)
        tensor.fill_(-1)
        for part in gathered:
            part.add_(10)
        comm.barrier()
        return torch.cat(gathered).tolist()

    assert in_process(2, work) == [[10.0] * 3 + [11.0] * 3] * 2


def test_worker_threads_compute_alone_and_leave_the_callers_setting() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert in_process(2, lambda comm: torch.get_num_threads()) == [1, 1]
        assert torch.get_num_threads() == 2
        inside_new_thread: list[int] = []
        thread = threading.Thread(target=lambda: inside_new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert inside_new_thread == [2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 0}, "at least 1"),
        ({"num_workers": 64, "worker_bytes": 2**50}, "64 in-process workers of 1073741824 MiB each need"),
        ({"num_workers": 1, "timeout_seconds": 0}, "above 0"),
    ],
)
def test_in_process_refuses_what_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_process(function=lambda comm: None, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda comm: comm.all_reduce(torch.ones(1), op="mean"), "choose one of sum, max"),
        (lambda comm: comm.all_reduce(torch.ones(1), reduction="ring"), "choose one of ordered, native"),
        (lambda comm: comm.all_reduce(torch.ones(1), reduction="native"), "use reduction='ordered'"),
        (lambda comm: comm.all_reduce(torch.ones(1, dtype=torch.bool)), "cannot sum-reduce torch.bool"),
        (lambda comm: comm.all_to_all([torch.ones(1)]), "1 tensors for 2 ranks"),
        (lambda comm: comm.broadcast(torch.ones(1), root=2), "ranks go from 0 to 1"),
    ],
)
def test_a_wrong_call_says_what_is_needed(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        in_process(2, call)


# ---- launchers -------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-005]", "SLURM_JOB_ID": "77",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77"}


def test_rank_and_size_come_from_the_innermost_launcher() -> None:
    for environ, expected in (
        (TORCHRUN, ("torchrun", 3, 8, 1)),
        (MPIRUN, ("mpirun", 2, 4, 0)),
        (SRUN, ("srun", 5, 6, 1)),
        ({**SRUN, **MPIRUN}, ("mpirun", 2, 4, 0)),
        ({**SRUN, **TORCHRUN}, ("torchrun", 3, 8, 1)),
        (BATCH_SCRIPT, ("single", 0, 1, 0)),
        ({}, ("single", 0, 1, 0)),
    ):
        launch = read_launch(environ)
        assert (launch.launcher, launch.rank, launch.size, launch.local_rank) == expected
    assert read_launch(SRUN).address == "gpu003"
    assert read_launch({**SRUN, "MASTER_ADDR": "gpu009"}).address == "gpu009"
    assert read_launch(SRUN).port != read_launch({**SRUN, "SLURM_JOB_ID": "78"}).port


@pytest.mark.parametrize("variables", [TORCHRUN, MPIRUN, SRUN])
def test_half_set_launcher_variables_are_an_error_that_lists_what_is_missing(
    variables: dict[str, str],
) -> None:
    for name in variables:
        rest = {other: value for other, value in variables.items() if other != name}
        if name == "SLURM_STEP_NUM_TASKS":
            continue  # without it this is no step of srun
        with pytest.raises(ValueError, match=f"half set: .* set, {name} missing"):
            read_launch(rest)
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT missing"):
        read_launch({"MASTER_ADDR": "gpu01"})


def test_a_rank_beyond_the_size_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 8 of 8"):
        read_launch({**TORCHRUN, "RANK": "8"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu[003-007,12],cpu1", "gpu003"), ("a1,b2", "a1"), ("rack[2,4]-ib", "rack2-ib")],
)
def test_the_first_host_of_a_slurm_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_nccl_is_used_only_where_every_worker_has_a_gpu_of_its_own() -> None:
    assert can_use_nccl(["host GPU-1", "host GPU-2"])
    assert not can_use_nccl(["host GPU-1", ""])
    with pytest.warns(UserWarning, match="2 workers share 1 GPUs"):
        assert not can_use_nccl(["host GPU-1", "host GPU-1"])


def test_without_a_launcher_connect_gives_a_single_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, *MPIRUN, *SRUN]:
        monkeypatch.delenv(name, raising=False)
    with connect() as comm:
        assert (comm.rank, comm.size) == (0, 1)
        check_collectives(comm)


def test_the_package_refuses_to_be_imported_under_a_bare_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import distributed"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode != 0
    assert "from teacherstudent.distributed import" in done.stderr
