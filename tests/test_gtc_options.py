"""Options of gradient threshold compression that are out of range."""

from typing import Any

import pytest
import torch

from teacherstudent.distributed import GTC, Communicator, in_process, rice


def refuse(message: str, inner: dict[str, Any] | None = None, **options: Any) -> None:
    """Every worker raises a ValueError that says `message`, and none hangs."""

    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            GTC(
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], **{"lr": 1.0, **(inner or {})}),
                comm,
                **options,
            )

    in_process(2, work, timeout_seconds=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.0}, "density is 1.0"),
        ({"density": float("nan")}, "density is nan"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"threshold": 1.0, "density": 0.1}, "density or threshold, not both"),
        ({"codec": "gzip"}, "codec is 'gzip'; choose one of auto, words"),
        ({"capacity": 0.0}, "capacity is 0.0"),
        ({"capacity": 1.5}, "capacity is 1.5"),
        ({"capacity": float("nan")}, "capacity is nan"),
        ({"capacity": 1e-3}, "too near to the density to hold"),
        ({"capacity": 1.2e-2, "ramp_steps": 10}, r"too near to the density to hold \(0.01\)"),
        ({"ramp_steps": -1}, "ramp_steps is -1"),
        ({"ramp_steps": 1.5}, "ramp_steps is 1.5"),
        ({"ramp_steps": 10, "threshold": 1.0}, "give a density with it, not a threshold"),
        ({"ramp_steps": 10, "density": 0.02}, "goes down from a density of 0.01 to 0.02"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": True}, "warmup_steps is True"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": float("nan")}, "momentum is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"clip_norm": float("inf")}, "clip_norm is inf"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_an_error_on_every_worker(options: dict[str, Any], message: str) -> None:
    refuse(message, **options)


def test_momentum_correction_with_momentum_inside_is_an_error_on_every_worker() -> None:
    refuse("count it twice", {"momentum": 0.9}, momentum=0.9)

    def adam(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="count it twice"):
            GTC(torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))]), comm, momentum=0.9)

    in_process(2, adam, timeout_seconds=10)


@pytest.mark.parametrize(
    "option",
    [
        "multi_quantum",
        "codec",
        "capacity",
        "ramp_steps",
        "warmup_steps",
        "momentum",
        "momentum_masking",
        "clip_norm",
    ],
)
def test_an_option_that_differs_between_workers_is_an_error_on_every_worker(option: str) -> None:
    values = {
        "multi_quantum": True,
        "codec": "words",
        "capacity": 0.5,
        "ramp_steps": 10,
        "warmup_steps": 10,
        "momentum": 0.5,
        "momentum_masking": False,
        "clip_norm": 1.0,
    }

    def work(comm: Communicator) -> None:
        options: dict[str, Any] = {option: values[option]} if comm.rank == 1 else {}
        with pytest.raises(ValueError, match="the settings differ between ranks"):
            GTC(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0), comm, **options)

    in_process(2, work, timeout_seconds=10)


@pytest.mark.parametrize("options", [{"capacity": 0.0}, {"momentum": 0.9}], ids=str)
def test_a_problem_of_one_worker_is_an_error_on_every_worker(options: dict[str, Any]) -> None:
    def work(comm: Communicator) -> None:
        inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0, momentum=0.9)
        with pytest.raises(ValueError, match="rank 1: "):
            GTC(inner, comm, **(options if comm.rank == 1 else {}))

    in_process(3, work, timeout_seconds=10)


@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ({}, 1),
        ({"codec": "rice"}, 1),
        ({"codec": "words"}, 0),
        ({"codec": "words", "multi_quantum": True}, 1),
    ],
    ids=str,
)
def test_what_steps_need_is_compiled_at_construction(options: dict[str, Any], loads: int) -> None:
    rice.load_kernels.cache_clear()
    in_process(
        2, lambda comm: GTC(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1), comm, **options)
    )
    assert rice.load_kernels.cache_info().currsize == loads
    rice.load_kernels()
