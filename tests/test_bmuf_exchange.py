"""How BMUF's updates travel: in fewer bits, in fragments, and while training goes on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bmuf import NUM_ELEMENTS, give_step, global_weights_of, gradient_of, make_parameter, quiet_bmuf
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from teacherstudent.distributed import BMUF, Communicator, block_exchange, in_process
from teacherstudent.distributed.block_exchange import CHUNK_ELEMENTS, WIRES, make_exchange

COMPRESSED = [name for name in WIRES if name != "full"]


# ---- fewer bits -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_workers=st.integers(2, 4),
    num_elements=st.integers(1, 700),
    exponent=st.integers(-12, 4),
    wire=st.sampled_from(COMPRESSED),
)
def test_what_is_delivered_and_what_is_kept_are_together_what_was_given(
    seed: int, num_workers: int, num_elements: int, exponent: int, wire: str
) -> None:
    def work(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        numbers = np.random.default_rng([seed, comm.rank])
        exchange = make_exchange(comm, [torch.zeros(num_elements, dtype=torch.float64)], wire)
        given, delivered = (torch.zeros(num_elements, dtype=torch.float64) for _ in range(2))
        for _ in range(4):
            share = float(numbers.integers(0, 3))
            update = torch.tensor(numbers.normal(size=num_elements) * 10.0**exponent)
            given += share * update
            if not share:
                update.fill_(float("nan"))
            exchange.average([update], share)
            assert all(torch.equal(update, other) for other in comm.all_gather(update))
            delivered += update
        state = exchange.state_dict()
        kept = state["residuals"][0] / comm.size
        slices = torch.cat(comm.all_gather(state["slice_residuals"][0]))
        return given / comm.size, delivered, torch.stack((kept, slices / comm.size))

    found = in_process(num_workers, work)
    total = sum(given for given, _, _ in found)
    accounted = found[0][1] + sum(kept.sum(0) for _, _, kept in found)
    assert bool(((total - accounted).abs() <= 1e-12 * 10.0**exponent).all())


@pytest.mark.parametrize(("wire", "error"), [("bf16", 2**-8), ("fp16", 2**-11), ("int8", 1 / 254)])
def test_one_exchange_is_within_two_roundings_of_the_mean(wire: str, error: float) -> None:
    def work(comm: Communicator, name: str) -> Tensor:
        update = torch.tensor(np.random.default_rng(comm.rank).uniform(-1, 1, size=1000), dtype=torch.float32)
        make_exchange(comm, [update], name).average([update], 1.0)
        return update

    differences = (
        in_process(3, lambda comm: work(comm, wire))[0] - in_process(3, lambda comm: work(comm, "full"))[0]
    )
    assert 0 < float(differences.abs().max()) <= 2 * error * 1.001


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_what_does_not_fit_arrives_later(wire: str) -> None:
    """Beyond the range of fp16, and below the resolution of int8 beside a large element."""

    def work(comm: Communicator) -> Tensor:
        update = torch.full((8,), 1e5 if wire == "fp16" else 1e-4)
        update[0] = 1.0
        exchange = make_exchange(comm, [update], wire)
        total = torch.zeros(8)
        for _ in range(200):
            exchange.average([update], 1.0)
            total += update
            update = torch.zeros(8)
        return total

    for total in in_process(2, work):
        assert float((total[1:] / (1e5 if wire == "fp16" else 1e-4) - 1).abs().max()) < 1e-6
        assert float(total[0]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("wire", "bytes_per_element"), [("full", 4), ("bf16", 2), ("fp16", 2), ("int8", 1 + 4 / 256)]
)
def test_an_element_travels_in_as_many_bytes_as_its_format_has(wire: str, bytes_per_element: float) -> None:
    num_elements = 40_960

    def work(comm: Communicator) -> float:
        parameter = torch.nn.Parameter(torch.zeros(num_elements))
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=1, wire=wire)
        before = optimizer.metrics()["bytes_sent"]
        parameter.grad = torch.ones(num_elements)
        optimizer.step()
        return optimizer.metrics()["bytes_sent"] - before

    ring = 2 * num_elements * 3 / 4 * bytes_per_element
    for num_bytes in in_process(4, work):
        assert ring <= num_bytes <= ring + 2000  # the agreement, and the headers of messages


@pytest.mark.parametrize("wire", COMPRESSED)
def test_training_in_fewer_bits_stays_near_plain_training(wire: str) -> None:
    def work(comm: Communicator, name: str) -> Tensor:
        parameter = make_parameter(torch.float32)
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3, wire=name)
        for step in range(60):
            give_step(optimizer, parameter, comm.rank, step, weight=(step + comm.rank) % 4)
        return global_weights_of(optimizer, parameter)

    plain, found = (in_process(3, lambda comm, name=name: work(comm, name)) for name in ("full", wire))
    assert all(torch.equal(other, found[0]) for other in found)
    way = float((plain[0] - make_parameter(torch.float32).detach()).norm())
    assert 0 < float((found[0] - plain[0]).norm()) < 0.02 * way


def test_one_worker_alone_rounds_nothing() -> None:
    def work(comm: Communicator, wire: str) -> Tensor:
        parameter = make_parameter(torch.float32)
        optimizer = quiet_bmuf(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3, wire=wire)
        for step in range(9):
            give_step(optimizer, parameter, 0, step)
        return parameter.detach()

    plain = in_process(1, lambda comm: work(comm, "full"))[0]
    assert torch.equal(in_process(1, lambda comm: work(comm, "int8"))[0], plain)


def test_a_buffer_is_exchanged_in_pieces_without_a_trace() -> None:
    num_elements = CHUNK_ELEMENTS + 17

    def work(comm: Communicator) -> None:
        update = torch.full((num_elements,), float(comm.rank + 1)) + torch.arange(num_elements) % 5
        make_exchange(comm, [update], "full").average([update], 1.0)
        assert torch.equal(update, 1.5 + torch.arange(num_elements) % 5)

    in_process(2, work)


class LiveBytes(TorchDispatchMode):
    """The most bytes at once in tensors other than `known` ones, on this thread."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {
            key: entry
            for key, entry in self._live.items()
            if key not in self._known and not entry[0].expired()
        }
        self.most = max(self.most, sum(num_bytes for _, num_bytes in self._live.values()))
        return result


def test_the_plain_way_holds_two_buffers_of_the_models_size_and_a_few_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W and Δ; a reduction's pieces, and one parameter's start and update."""
    num_elements, largest, chunk = 16 * 4096, 4096, 2048
    monkeypatch.setattr(block_exchange, "CHUNK_ELEMENTS", chunk)

    def work(comm: Communicator) -> float:
        parameters = [torch.nn.Parameter(torch.ones(largest)) for _ in range(num_elements // largest)]
        inner = torch.optim.SGD(parameters, lr=0.1)
        for parameter in parameters:
            parameter.grad = torch.ones(largest)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        with LiveBytes(known=[*parameters, *gradients]) as live:
            optimizer = BMUF(inner, comm, block_steps=2)
            live.most = 0  # the initial weights are broadcast whole
            for _ in range(6):
                optimizer.step()
        return live.most / 4  # elements

    for most in in_process(2, work):
        assert 2 * num_elements <= most <= 2 * num_elements + 2 * largest + 8 * chunk


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12))
def test_tensors_are_cut_as_if_they_lay_end_to_end(sizes: list[int], num_elements: int) -> None:
    flat = torch.arange(sum(sizes))
    chunks = [torch.cat(chunk) for chunk in block_exchange.cut(flat.split(sizes), num_elements)]
    wanted = list(flat.split(num_elements)) if sum(sizes) else []
    assert len(chunks) == len(wanted)
    assert all(torch.equal(*pair) for pair in zip(chunks, wanted))


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
def test_parameters_that_are_laid_out_otherwise_are_filtered_alike(nesterov: bool) -> None:
    """They cannot lend their memory to the exchange."""

    def train(comm: Communicator, values: Tensor) -> Tensor:
        parameter = torch.nn.Parameter(values)
        inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        optimizer = BMUF(inner, comm, block_steps=3, nesterov=nesterov)
        for step in range(10):
            parameter.grad = gradient_of(comm.rank, step, parameter.detach().reshape(-1)).view(5, 6)
            optimizer.step(weight=1 + comm.rank)
        return parameter.detach().clone(memory_format=torch.contiguous_format)

    initial = make_parameter().detach().view(5, 6)
    plain = in_process(3, lambda comm: train(comm, initial.clone()))
    turned = in_process(3, lambda comm: train(comm, initial.t().contiguous().t()))
    assert all(torch.equal(*pair) for pair in zip(plain, turned, strict=True))


def test_after_an_exchange_that_failed_the_model_is_at_the_block_s_start_and_the_filter_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_exchange, "CHUNK_ELEMENTS", 8)

    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=3, nesterov=False)
        for step in range(3):
            give_step(optimizer, parameter, comm.rank, step)
        start, reduce = parameter.detach().clone(), comm.all_reduce

        def fail_in_the_second_chunk(tensor: Tensor, *options: str) -> Tensor:
            if tensor.dtype == torch.float64 and bool(started):
                raise TimeoutError("rank 1 is late")
            started.extend([True] * (tensor.dtype == torch.float64))
            return reduce(tensor, *options)

        started: list[bool] = []
        comm.all_reduce = fail_in_the_second_chunk  # type: ignore[method-assign]
        with pytest.raises(TimeoutError, match="rank 1 is late"):
            for step in range(3, 6):
                give_step(optimizer, parameter, comm.rank, step)
        assert started
        assert torch.equal(parameter, start)
        assert torch.equal(global_weights_of(optimizer, parameter), start)

    in_process(2, work)


# ---- fragments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
def test_each_fragment_is_filtered_as_a_model_of_its_own(nesterov: bool) -> None:
    """Three parameters with gradients of their own: the last fragment's blocks are those of plain BMUF. The others'
    first blocks are shorter, as if they had been closed by `synchronize`, which only the classical filter starts
    from as from any block's end."""

    def fragments(comm: Communicator) -> list[Tensor]:
        parameters = [make_parameter() for _ in range(3)]
        optimizer = BMUF(
            torch.optim.SGD(parameters, lr=0.1), comm, block_steps=6, fragments=3, nesterov=nesterov
        )
        for step in range(20):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.step(weight=(step + comm.rank) % 3)
        assert optimizer.metrics()["blocks"] == 4 + 3 + 3
        with optimizer.global_weights():
            return [parameter.detach().clone() for parameter in parameters]

    def alone(comm: Communicator, first: int) -> Tensor:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, block_steps=6, nesterov=nesterov)
        for step in range(20):
            if step == first:
                optimizer.synchronize()
            give_step(optimizer, parameter, comm.rank, step, weight=(step + comm.rank) % 3)
        return global_weights_of(optimizer, parameter)

    found = in_process(2, fragments)
    for number, first in enumerate((2, 4, -1)):
        if nesterov and first > 0:
            continue
        for weights, wanted in zip(found, in_process(2, lambda comm, first=first: alone(comm, first))):
            assert torch.equal(weights[number], wanted)


def test_fragments_spread_the_exchange_over_the_block() -> None:
    def work(comm: Communicator) -> list[int]:
        parameters = [make_parameter() for _ in range(4)]
        optimizer = BMUF(torch.optim.SGD(parameters, lr=0.1), comm, block_steps=8, fragments=4)
        sent, sizes = optimizer.metrics()["bytes_sent"], []
        for step in range(16):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.step()
            now = optimizer.metrics()["bytes_sent"]
            sizes.append(round(now - sent))
            sent = now
        return sizes

    for sizes in in_process(2, work):
        assert sizes == [0, sizes[1]] * 8


@pytest.mark.filterwarnings("ignore:block")
def test_a_worker_that_is_left_out_starts_again_in_all_fragments() -> None:
    def work(comm: Communicator) -> None:
        parameters = [make_parameter() for _ in range(2)]
        optimizer = BMUF(torch.optim.SGD(parameters, lr=0.1), comm, block_steps=4, fragments=2)
        for step in range(6):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            if step == 1 and comm.rank == 1:
                for parameter in parameters:
                    parameter.grad.fill_(1e300)  # type: ignore[union-attr]
                    parameter.data.fill_(1e308)
                optimizer.param_groups[0]["lr"] = 1e10
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1
            if step == 1:
                assert all(bool(parameter.isfinite().all()) for parameter in parameters)
        assert (
            optimizer.metrics()["ranks_left_out"] == 1
        )  # by the first fragment; the second found it healthy
        assert optimizer.metrics()["blocks"] == 3

    in_process(2, work)


# ---- delayed merge --------------------------------------------------------------------------------------------------


def delayed_by_hand(
    num_workers: int, num_steps: int, block_steps: int, delay_steps: int, momentum: float, nesterov: bool
) -> list[Tensor]:
    """The ranks' weights after `num_steps`: float64, and nothing but the definition."""
    common, velocity = make_parameter().detach().clone(), torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    start = common.clone()
    own = [common.clone() for _ in range(num_workers)]
    at_end: list[Tensor] = []
    for step in range(num_steps):
        own = [weights - 0.1 * gradient_of(rank, step, weights) for rank, weights in enumerate(own)]
        if step >= block_steps and (step + 1) % block_steps == delay_steps:
            mean = torch.stack(at_end).mean(0) - start
            velocity = momentum * velocity + mean
            common = common + velocity
            start = common + momentum * velocity if nesterov else common
            own = [start + (now - then) for now, then in zip(own, at_end)]
        if (step + 1) % block_steps == 0:
            at_end = own
    return own


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
def test_with_a_delay_what_was_learnt_meanwhile_stays_on_top(nesterov: bool) -> None:
    def work(comm: Communicator, num_steps: int) -> Tensor:
        parameter = make_parameter()
        optimizer = BMUF(
            torch.optim.SGD([parameter], lr=0.1),
            comm,
            block_steps=5,
            block_momentum=0.6,
            nesterov=nesterov,
            delay_steps=2,
        )
        for step in range(num_steps):
            give_step(optimizer, parameter, comm.rank, step)
        return parameter.detach()

    for num_steps in (5, 6, 7, 21, 23):
        found = in_process(3, lambda comm, num_steps=num_steps: work(comm, num_steps))
        for weights, wanted in zip(found, delayed_by_hand(3, num_steps, 5, 2, 0.6, nesterov), strict=True):
            assert float((weights - wanted).abs().max()) < 1e-12


def test_with_given_gradients_a_delay_loses_nothing() -> None:
    """Without momentum W is the start plus all workers' mean updates, whatever the delay."""

    def work(comm: Communicator, delay_steps: int) -> Tensor:
        parameter = make_parameter()
        optimizer = BMUF(
            torch.optim.SGD([parameter], lr=0.1),
            comm,
            block_steps=4,
            block_momentum=0.0,
            delay_steps=delay_steps,
        )
        for step in range(18):
            parameter.grad = gradient_of(comm.rank, step, torch.full_like(parameter, 3.0))
            optimizer.step()
        optimizer.synchronize()
        return parameter.detach()

    plain = in_process(3, lambda comm: work(comm, 0))
    for delay_steps in (1, 3):
        for weights in in_process(3, lambda comm, delay_steps=delay_steps: work(comm, delay_steps)):
            assert float((weights - plain[0]).abs().max()) < 1e-12
