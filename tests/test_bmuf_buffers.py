"""Buffers and frozen parameters: equal at the start, and brought together with the weights."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging, TwoTier, in_process
from teacherstudent.distributed.optimizers import DistributedOptimizer

BLOCKS = {"block_steps": 3, "block_momentum": 0.5}
METHODS: dict[str, Callable[..., DistributedOptimizer]] = {
    "exact": ExactAveraging,
    "gtc": lambda inner, comm, **options: GTC(inner, comm, density=0.1, **options),
    "gtc with delay": lambda inner, comm, **options: GTC(inner, comm, density=0.1, delay=True, **options),
    "bmuf": lambda inner, comm, **options: BMUF(inner, comm, **BLOCKS, **options),
    "bmuf, every option": lambda inner, comm, **options: BMUF(
        inner, comm, **BLOCKS, warmup_steps=2, wire="int8", fragments=2, delay_steps=1, **options
    ),
    "two tiers": lambda inner, comm, **options: TwoTier(
        inner, comm, group_size=2, inner_options={"density": 0.1}, **BLOCKS, **options
    ),
    "one group": lambda inner, comm, **options: TwoTier(
        inner, comm, group_size=4, inner="exact", block_steps=3, **options
    ),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


class Network(torch.nn.Module):
    """BatchNorm's statistics and counts, a frozen layer, a mask of infinities, and a buffer that is replaced."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.norm, self.last = (
            torch.nn.Linear(6, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Linear(8, 3),
        )
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan]))
        self.register_buffer("phases", torch.ones(2, dtype=torch.complex64) * (1 + seed))
        self.register_buffer("norm_of_outputs", torch.zeros(()), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.norm.running_mean.fill_(seed)  # type: ignore[union-attr]

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.frozen(self.last(torch.tanh(self.norm(self.first(inputs)))))
        self.norm_of_outputs = outputs.detach().norm() * 0.5 + self.norm_of_outputs * 0.5
        return outputs


def build(
    make: Callable[..., DistributedOptimizer], comm: Communicator
) -> tuple[Network, DistributedOptimizer]:
    model = Network(seed=comm.rank)
    return model, make(torch.optim.SGD(model.parameters(), lr=0.05), comm, model=model)


def train(comm: Communicator, model: Network, optimizer: DistributedOptimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + comm.rank)
    optimizer.zero_grad()
    model(torch.randn(5, 6, generator=generator)).square().mean().backward()
    optimizer.step(weight=(step + comm.rank) % 4)


def contents(model: torch.nn.Module) -> Tensor:
    """All bits of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return torch.cat([each.detach().contiguous().reshape(-1).view(torch.uint8) for each in tensors])


def is_common(comm: Communicator, model: torch.nn.Module) -> bool:
    return all(torch.equal(contents(model), other) for other in comm.all_gather(contents(model)))


@every_method
def test_replicas_start_from_the_whole_model_of_rank_0(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        model, _ = build(make, comm)
        assert torch.equal(contents(model), contents(Network(seed=0)))

    in_process(4, work)


@every_method
def test_replicas_are_equal_whenever_the_workers_have_come_together(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        model, optimizer = build(make, comm)
        num_apart = 0
        for step in range(10):
            train(comm, model, optimizer, step)
            num_apart += not is_common(comm, model)
            if "blocks" in optimizer.metrics() and step >= getattr(optimizer, "warmup_steps", 0):
                with optimizer.global_weights():
                    assert is_common(comm, model)
        assert num_apart > 4
        own = contents(model)
        with optimizer.global_weights():
            pass
        assert torch.equal(contents(model), own)
        optimizer.synchronize()
        assert is_common(comm, model)
        assert model.mask.tolist()[:2] == [0.0, -torch.inf]  # type: ignore[operator]

    in_process(4, work)


def test_floating_buffers_become_the_mean_by_data_and_counts_the_largest() -> None:
    weights = [[3, 1, 0], [1, 3, 0]]  # of each block

    def work(comm: Communicator) -> tuple[list[float], float]:
        model = torch.nn.BatchNorm1d(2).double()
        optimizer = BMUF(torch.optim.SGD(model.parameters(), lr=0.1), comm, block_steps=2, model=model)
        found = []
        for block in range(2):
            for _ in range(2):
                with torch.no_grad():
                    model.running_mean += comm.rank + 1.0  # type: ignore[operator]
                    model.num_batches_tracked += 1 + 5 * comm.rank  # type: ignore[operator]
                optimizer.zero_grad()
                optimizer.step(weight=weights[block][comm.rank])
            found.append(model.running_mean[0].item())  # type: ignore[index]
        return found, model.num_batches_tracked.item()  # type: ignore[operator]

    for found, count in in_process(3, work):
        assert found == pytest.approx([2 * 5 / 4, 2 * 5 / 4 + 2 * 7 / 4], abs=1e-15)  # (3·1 + 1·2)/4 a step
        assert count == 24  # of rank 1: rank 2 has seen no data


def test_what_nobody_has_changed_keeps_its_bits_and_is_not_sent() -> None:
    def work(comm: Communicator) -> float:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("table", torch.rand(5000, generator=torch.Generator().manual_seed(1)))
        before = model.table.clone()  # type: ignore[operator]
        optimizer = BMUF(torch.optim.SGD(model.parameters(), lr=0.1), comm, block_steps=1, model=model)
        sent = optimizer.metrics()["bytes_sent"]
        for step in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step(weight=1 + step * (1 + comm.rank))
        assert torch.equal(model.table, before)  # type: ignore[arg-type]
        return optimizer.metrics()["bytes_sent"] - sent

    assert max(in_process(3, work)) < 5000


@every_method
def test_going_on_from_a_checkpoint_is_going_on_buffers_included(make: Callable[..., Any]) -> None:
    def work(comm: Communicator, stop: int) -> None:
        model, optimizer = build(make, comm)
        for step in range(stop):
            train(comm, model, optimizer, step)
        with optimizer.global_weights():
            saved = copy.deepcopy(optimizer.state_dict())
        weights = copy.deepcopy(model.state_dict())
        for step in range(stop, 9):
            train(comm, model, optimizer, step)
        optimizer.synchronize()
        other, resumed = build(make, comm)
        other.load_state_dict(weights)
        with torch.no_grad():
            other.norm.running_var.fill_(7.0)  # type: ignore[union-attr]
        resumed.load_state_dict(saved)
        for step in range(stop, 9):
            train(comm, other, resumed, step)
        resumed.synchronize()
        assert torch.equal(contents(model), contents(other))

    for stop in (1, 4, 6):
        in_process(4, lambda comm, stop=stop: work(comm, stop))


@every_method
def test_a_frozen_parameter_or_a_buffer_that_differs_is_found_by_its_hash(make: Callable[..., Any]) -> None:
    def work(comm: Communicator, name: str) -> None:
        model = Network(seed=0)
        tensor = dict(model.named_parameters(), **dict(model.named_buffers()))[name]
        with torch.no_grad():
            tensor.add_(comm.rank == 2)
        with pytest.raises(ValueError, match="the initial weights of rank 2 differ from those of rank 0"):
            make(torch.optim.SGD(model.parameters(), lr=0.1), comm, model=model, initial_weights="check")

    for name in ("frozen.weight", "norm.num_batches_tracked", "phases"):
        in_process(4, lambda comm, name=name: work(comm, name), timeout_seconds=10)


@every_method
def test_models_whose_buffers_differ_are_an_error_on_every_worker(make: Callable[..., Any]) -> None:
    def work(comm: Communicator) -> None:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("table", torch.zeros(3 + comm.rank // 3))
        with pytest.raises(ValueError, match=r"the buffers differ .* rank 3 has buffer 'table' \(4,\)"):
            make(torch.optim.SGD(model.parameters(), lr=0.1), comm, model=model)
        with pytest.raises(ValueError, match="model holds none of the optimizer's parameters"):
            make(torch.optim.SGD(model.parameters(), lr=0.1), comm, model=torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"model is 3; give the torch\.nn\.Module"):
            make(torch.optim.SGD(model.parameters(), lr=0.1), comm, model=3)

    in_process(4, work, timeout_seconds=10)


@pytest.mark.parametrize("name", ["exact", "bmuf", "two tiers"])
def test_a_buffer_that_changes_its_shape_is_an_error_on_every_worker(name: str) -> None:
    def work(comm: Communicator) -> None:
        model, optimizer = build(METHODS[name], comm)
        train(comm, model, optimizer, 0)
        if comm.rank == 1:
            model.norm_of_outputs = torch.zeros(2)
        with pytest.raises(ValueError, match=r"rank 1: the buffer 'norm_of_outputs' has become \(2,\) torch"):
            optimizer.synchronize()

    in_process(4, work, timeout_seconds=10)


@pytest.mark.parametrize("name", ["bmuf", "two tiers"])
def test_a_worker_whose_buffers_are_not_finite_is_left_out_by_all(name: str) -> None:
    def work(comm: Communicator) -> float:
        model, optimizer = build(METHODS[name], comm)
        for step in range(3):
            if step == 2 and comm.rank == 1:
                model.norm.running_var[0] = torch.inf  # type: ignore[index]
            train(comm, model, optimizer, step)
        assert bool(model.norm.running_var.isfinite().all())  # type: ignore[union-attr,operator]
        with optimizer.global_weights():
            assert is_common(comm, model)
        return optimizer.metrics()["ranks_left_out"]

    member = {"bmuf": "rank 1", "two tiers": "group 0"}[name]
    with pytest.warns(UserWarning, match=f"{member} is left out .* its buffers are not finite"):
        assert in_process(4, work) == [1] * 4


def test_the_buffers_of_a_worker_that_is_left_out_do_not_count() -> None:
    def work(comm: Communicator) -> float:
        model = torch.nn.BatchNorm1d(2).double()
        optimizer = BMUF(torch.optim.SGD(model.parameters(), lr=0.1), comm, block_steps=2, model=model)
        for step in range(2):
            with torch.no_grad():
                model.running_mean += comm.rank + 1.0  # type: ignore[operator]
                if (comm.rank, step) == (1, 1):
                    model.weight[0] = torch.inf
            optimizer.zero_grad()
            optimizer.step()
        return model.running_mean[0].item()  # type: ignore[index]

    with pytest.warns(UserWarning, match="rank 1 is left out .* its model is not finite"):
        assert in_process(3, work) == [2 * (1 + 3) / 2] * 3


def test_exact_averaging_leaves_buffers_that_are_not_finite_out_and_says_so() -> None:
    def work(comm: Communicator) -> float:
        model, optimizer = build(ExactAveraging, comm)
        train(comm, model, optimizer, 1)
        if comm.rank == 1:
            model.norm.running_var[0] = torch.nan  # type: ignore[index]
        optimizer.synchronize()
        assert is_common(comm, model)
        assert bool(model.norm.running_var.isfinite().all())  # type: ignore[union-attr,operator]
        return optimizer.metrics()["buffers_left_out"]

    with pytest.warns(UserWarning, match="the buffers of rank 1 are not finite: left out of their mean"):
        assert in_process(2, work) == [1, 1]


def test_a_state_with_other_buffers_is_refused() -> None:
    def work(comm: Communicator) -> None:
        _, optimizer = build(METHODS["bmuf"], comm)
        state = optimizer.state_dict()
        plain = METHODS["bmuf"](torch.optim.SGD(Network(0).parameters(), lr=0.05), comm)
        with pytest.raises(
            ValueError, match=r"saved with the buffers \[\('mask', \(3,\)\).* those of no model"
        ):
            plain.load_state_dict(state)

    in_process(2, work)


def test_buffers_go_on_with_another_number_of_workers_from_the_last_common_ones() -> None:
    def save(comm: Communicator) -> tuple[dict, Tensor]:
        model, optimizer = build(METHODS["bmuf"], comm)
        for step in range(4):
            train(comm, model, optimizer, step)
        state = copy.deepcopy(optimizer.state_dict())
        with optimizer.global_weights():
            return state, contents(model)

    states, common = zip(*in_process(4, save))

    def load(comm: Communicator) -> None:
        model, optimizer = build(METHODS["bmuf"], comm)
        optimizer.load_state_dicts([states[rank] for rank in optimizer.ranks_to_load(4)])
        with optimizer.global_weights():
            assert torch.equal(contents(model), common[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_process(2, load)
