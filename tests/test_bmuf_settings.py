"""Going on with other settings: allowed where it is right, and an error that names the setting where it is not."""

import copy

import pytest
import torch
from tiny_bmuf import gradient_of, make_parameter
from torch import Tensor

from teacherstudent.distributed import BMUF, Communicator, in_process
from teacherstudent.distributed.block_exchange import WIRES, make_exchange
from teacherstudent.distributed.block_settings import SETTINGS


def build(comm: Communicator, options: dict) -> tuple[list[torch.nn.Parameter], BMUF]:
    parameters = [make_parameter(torch.float32), make_parameter(torch.float32)]
    settings = {"block_steps": 4, **options}
    return parameters, BMUF(torch.optim.Adam(parameters, lr=0.05), comm, **settings)


def train(comm: Communicator, parameters: list[torch.nn.Parameter], optimizer: BMUF, steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(parameters):
            parameter.grad = gradient_of(comm.rank, 100 * number + step, parameter.detach())
        optimizer.report_loss(1.0)
        optimizer.step()


def change(
    before: dict, after: dict, num_steps: int, ends: bool = False
) -> list[tuple[Tensor, dict[str, float]]]:
    """Train, save, load with other settings, train for 12 steps; W, and the counts."""

    def work(comm: Communicator) -> tuple[Tensor, dict[str, float]]:
        parameters, optimizer = build(comm, before)
        train(comm, parameters, optimizer, range(num_steps))
        if ends:
            optimizer.synchronize()
        state = copy.deepcopy(optimizer.state_dict())
        parameters, optimizer = build(comm, after)
        optimizer.load_state_dict(state)
        with optimizer.global_weights():
            start = torch.cat([parameter.detach().clone() for parameter in parameters])
        assert all(torch.equal(start, other) for other in comm.all_gather(start))
        train(comm, parameters, optimizer, range(num_steps, num_steps + 12))
        with optimizer.global_weights():
            weights = torch.cat([parameter.detach().clone() for parameter in parameters])
        assert all(torch.equal(weights, other) for other in comm.all_gather(weights))
        return weights, optimizer.metrics()

    return in_process(2, work, timeout_seconds=10)


REFUSED: dict[str, tuple[dict, dict, int]] = {
    "block_steps=4, and is loaded with 6: a block is under way": ({}, {"block_steps": 6}, 6),
    "fragments=1, and is loaded with 2": ({}, {"fragments": 2}, 4),
    "warmup_steps=0, and is loaded with 9: the warm-up is over, 5": ({}, {"warmup_steps": 9}, 5),
    "wire='int8', and is loaded with 'full': what rounding": ({"wire": "int8"}, {}, 4),
    "wire='full', and is loaded with 'bf16': an exchange is under way": (
        {"delay_steps": 2}, {"wire": "bf16", "delay_steps": 2}, 5,
    ),
    "local_state='keep', and is loaded with 'adam'": ({"local_state": "keep"}, {"local_state": "adam"}, 4),
    "local_state='average', and is loaded with 'adam'": ({"local_state": "average"}, {"local_state": "adam"}, 5),
    "block_momentum=0.5, and is loaded with 0.25: a block that started": ({}, {"block_momentum": 0.25}, 6),
}  # fmt: skip


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=REFUSED.keys())
def test_what_would_go_on_wrongly_is_refused(message: str, case: tuple[dict, dict, int]) -> None:
    with pytest.raises(ValueError, match=f"was saved with {message}"):
        change(*case)


ALLOWED: dict[str, tuple[dict, dict, int, bool]] = {
    "block_steps at a block's end": ({}, {"block_steps": 6}, 8, False),
    "block_steps of fragments": ({"fragments": 2}, {"fragments": 2, "block_steps": 6}, 7, True),
    "a shorter warm-up": ({"warmup_steps": 9}, {"warmup_steps": 2, "local_state": "adam"}, 5, False),
    "a longer warm-up": ({"warmup_steps": 9, "wire": "int8"}, {"warmup_steps": 12}, 5, False),
    "a finer wire": ({"wire": "int8"}, {"wire": "bf16"}, 6, False),
    "a wire of fewer bits": ({}, {"wire": "int8"}, 6, False),
    "local_state": ({"local_state": "adam"}, {"local_state": "average"}, 6, False),
    "adam from a common state": ({"local_state": "average"}, {"local_state": "adam"}, 4, False),
    "block_momentum at a block's end": ({}, {"block_momentum": 0.25}, 8, False),
    "block_momentum without a look-ahead": ({"nesterov": False}, {"nesterov": False, "block_momentum": 0.25}, 6, False),
    "no delay": ({"delay_steps": 3}, {}, 6, False),
    "a shorter delay": ({"delay_steps": 3}, {"delay_steps": 1}, 6, False),
    "a longer delay": ({"delay_steps": 1}, {"delay_steps": 3}, 4, False),
    "losses": ({}, {"outlier_factor": 3.0, "block_lr": 0.5}, 6, False),
}  # fmt: skip


@pytest.mark.parametrize("case", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_goes_on_as_well_is_allowed(case: tuple[dict, dict, int, bool]) -> None:
    before, after, num_steps, ends = case
    block_steps = after.get("block_steps", 4)
    warmup = max(0, after.get("warmup_steps", 0) - num_steps)
    in_block = 0 if ends or num_steps < before.get("warmup_steps", 0) else num_steps % 4
    for weights, metrics in change(*case):
        assert bool(weights.isfinite().all())
        if "fragments" not in before:
            assert metrics["steps_in_block"] == (in_block + 12 - warmup) % block_steps


def test_an_exchange_that_a_shorter_delay_has_missed_is_merged_at_once() -> None:
    def work(comm: Communicator) -> None:
        parameters, optimizer = build(comm, {"delay_steps": 3})
        train(comm, parameters, optimizer, range(6))  # two steps after the block's end
        state = copy.deepcopy(optimizer.state_dict())
        parameters, other = build(comm, {"delay_steps": 1})
        other.load_state_dict(state)
        assert other._fragments[0].own is not None
        train(comm, parameters, other, range(6, 7))
        assert other._fragments[0].own is None

    in_process(2, work)


def test_a_state_holds_every_setting() -> None:
    def work(comm: Communicator) -> None:
        _, optimizer = build(comm, {"outlier_factor": 3.0})
        settings = optimizer.state_dict()["distributed"]["settings"]
        assert set(settings) == set(SETTINGS)
        assert settings["block_momentum"] == 0.5 and settings["outlier_factor"] == 3.0

    in_process(2, work)


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_under_way_is_sent_from_the_device_of_its_parameters(wire: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Checkpoints are read into host memory; here every other buffer belongs elsewhere."""

    def work(comm: Communicator) -> None:
        buffers = [torch.ones(6), torch.ones(4)]
        exchange = make_exchange(comm, buffers, wire)
        exchange.start([buffer.clone() for buffer in buffers], 1.0)
        state = copy.deepcopy(exchange.state_dict())
        sent: list[Tensor] = []
        loaded = make_exchange(comm, buffers, wire)
        loaded._send = sent.extend  # type: ignore[method-assign, assignment]
        loaded.load_state_dict(state, [torch.device("cpu"), torch.device("meta")])
        num_parts = len(sent) // 2
        assert [tensor.device.type for tensor in sent] == ["cpu"] * num_parts + ["meta"] * num_parts
        assert num_parts == (1 if wire == "full" else 2)

    in_process(2, work)
