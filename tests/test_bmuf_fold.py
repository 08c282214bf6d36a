"""Going on with another number of workers: what waits to be sent is handed on, or its loss is reported."""

import copy
import warnings

import pytest
import torch
from tiny_bmuf import gradient_of, make_parameter
from torch import Tensor

from teacherstudent.distributed import BMUF, Communicator, TwoTier, in_process
from teacherstudent.distributed.block_exchange import CompressedExchange
from teacherstudent.distributed.optimizers import STATE_KEY, DistributedOptimizer

GTC_OPTIONS = {"density": 0.1}


def build(comm: Communicator, tiers: bool) -> tuple[torch.nn.Parameter, DistributedOptimizer]:
    parameter = make_parameter()
    inner = torch.optim.SGD([parameter], lr=0.1)
    options = {"block_steps": 4, "wire": "int8"}
    if tiers:
        return parameter, TwoTier(inner, comm, group_size=2, inner_options=GTC_OPTIONS, **options)
    return parameter, BMUF(inner, comm, **options)  # type: ignore[arg-type]


def waiting(optimizer: DistributedOptimizer, comm: Communicator) -> list[Tensor]:
    """The mean of what waits over all ranks: in the wire, and in GTC's residuals."""
    blocks = optimizer if isinstance(optimizer, BMUF) else optimizer._across  # type: ignore[attr-defined]
    exchange = blocks._fragments[0].exchange
    own = torch.zeros(30, dtype=torch.float64)
    if isinstance(exchange, CompressedExchange):
        size = blocks.comm.size
        own += exchange._residuals[0] / size
        start = 30 * blocks.comm.rank // size
        own[start : start + exchange._slice_residuals[0].numel()] += exchange._slice_residuals[0]
    hidden = optimizer.state_dict()[STATE_KEY].get("tiers", {}).get("inside", {"residuals": []})
    inside = [residual / comm.size for residual in hidden["residuals"]]
    return [comm.all_reduce(part.clone()) for part in (own / comm.size * blocks.comm.size, *inside)]


def save(comm: Communicator, tiers: bool) -> tuple[dict, list[Tensor]]:
    parameter, optimizer = build(comm, tiers)
    for step in range(8):
        parameter.grad = gradient_of(comm.rank, step, parameter.detach())
        optimizer.step(weight=1 + (step + comm.rank) % 2)
    return copy.deepcopy(optimizer.state_dict()), waiting(optimizer, comm)


@pytest.mark.parametrize("tiers", [False, True], ids=["bmuf", "two tiers"])
@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (8, 4), (4, 4)], ids=str)
def test_what_waits_stays_the_same_on_average(sizes: tuple[int, int], tiers: bool) -> None:
    states, before = zip(*in_process(sizes[0], lambda comm: save(comm, tiers)))

    def load(comm: Communicator) -> tuple[list[Tensor], float]:
        parameter, optimizer = build(comm, tiers)
        optimizer.load_state_dicts([states[rank] for rank in optimizer.ranks_to_load(sizes[0])])
        found = waiting(optimizer, comm)
        for step in range(8, 13):
            parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.step()
        return found, optimizer.metrics()["residuals_lost"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = in_process(sizes[1], load)
    for found, num_lost in loaded:
        assert num_lost == 0
        for part, wanted in zip(found, before[0], strict=True):
            assert bool(wanted.any()) and float((part - wanted).abs().max()) < 1e-13


@pytest.mark.parametrize("tiers", [False, True], ids=["bmuf", "two tiers"])
def test_where_one_state_only_is_loaded_the_loss_is_reported_and_counted(tiers: bool) -> None:
    states, _ = zip(*in_process(6, lambda comm: save(comm, tiers)))

    def load(comm: Communicator) -> float:
        _, optimizer = build(comm, tiers)
        optimizer.load_state_dict(states[comm.rank])
        assert not any(bool(part.any()) for part in waiting(optimizer, comm))
        return optimizer.metrics()["residuals_lost"]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert min(in_process(4, load)) > 20
    told = {str(each.message).split(":")[0] for each in caught}
    assert told == ({"wire='int8'", "inner='gtc'"} if tiers else {"wire='int8'"})


def test_one_worker_has_nobody_to_send_to_later_and_says_what_is_lost() -> None:
    states, _ = zip(*in_process(2, lambda comm: save(comm, tiers=False)))

    def load(comm: Communicator) -> float:
        _, optimizer = build(comm, tiers=False)
        optimizer.load_state_dicts([states[rank] for rank in optimizer.ranks_to_load(2)])
        return optimizer.metrics()["residuals_lost"]

    with pytest.warns(UserWarning, match="wire='int8': what the loaded state had kept back .*, is lost"):
        assert in_process(1, load)[0] > 20


def test_states_of_other_ranks_are_refused() -> None:
    states, _ = zip(*in_process(4, lambda comm: save(comm, tiers=False)))

    def load(comm: Communicator) -> None:
        _, optimizer = build(comm, tiers=False)
        with pytest.raises(ValueError, match=rf"rank {comm.rank} of 2 needs the states of ranks .* of 4"):
            optimizer.load_state_dicts([states[comm.rank]])

    in_process(2, load)
