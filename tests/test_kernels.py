"""Firing and applying quanta: the same bits from every variant, and those of plain arithmetic."""

import importlib
import math
import multiprocessing
import sys
import threading
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacherstudent.distributed import kernels, kernels_numba
from teacherstudent.distributed.codec import Quanta
from teacherstudent.distributed.kernels import Part
from teacherstudent.distributed.thresholds import threshold_at

VARIANTS = ("numba", "torch")
DTYPES = (torch.float32, torch.float64)
THRESHOLD = threshold_at(-27)  # 13/16
SMALLEST = float(np.float32(2.0**-149))
SPECIAL = [0.0, -0.0, SMALLEST, -SMALLEST, 2.0**-126, THRESHOLD, -THRESHOLD, 2 * THRESHOLD, -5 * THRESHOLD,
           float(np.nextafter(np.float32(THRESHOLD), np.float32(0))), 3e37, -3e37, 2.0**19]  # fmt: skip
VALUES = st.sampled_from(SPECIAL) | st.floats(-8, 8, width=32)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return request.param


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"teacherstudent.distributed.kernels_{name}")
    monkeypatch.setattr(kernels, "_variant", lambda residual: module)


def bits(tensor: Tensor) -> Tensor:
    """To compare with: −0.0 and 0.0 differ."""
    return tensor.reshape(-1).view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


def assert_same(left: Quanta, right: Quanta) -> None:
    assert torch.equal(left.indices, right.indices)
    assert torch.equal(left.counts, right.counts)
    assert left.indices.dtype == left.counts.dtype == torch.int64


def fire_one_by_one(residual: Tensor, parts: list[Part], threshold: float, share: float, most: int) -> Quanta:
    """The oracle: numpy scalars, element by element, and whole quanta counted by exact fractions."""
    number = residual.numpy().dtype.type
    sent = {}
    for part in parts:
        gradient = None if part.gradient is None else part.gradient.reshape(-1).to(residual.dtype).numpy()
        for place in range(part.start, part.stop if part.rate else part.start):
            value = number(residual[place].item())
            if gradient is not None and share:
                value = number(value + number(number(part.rate * share) * gradient[place - part.start]))
            if abs(value) >= threshold:
                count = min(math.floor(abs(Fraction(float(value))) / Fraction(threshold)), most)
                sent[place] = count if value > 0 else -count
                value = number(value - number(sent[place]) * number(threshold))
            residual[place] = float(value)
    places = torch.tensor(sorted(sent), dtype=torch.int64)
    return Quanta(places, torch.tensor([sent[int(place)] for place in places], dtype=torch.int64))


def make_parts(
    gradients: list[Tensor | None], sizes: list[int], rates: list[float] | None = None
) -> list[Part]:
    starts = np.cumsum([0, *sizes]).tolist()
    rates = rates or [0.25] * len(sizes)
    return [Part(*place) for place in zip(starts, starts[1:], gradients, rates)]


def draw(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


def copy_parts(parts: list[Part]) -> list[Part]:
    """With gradients of the same strides."""
    return [
        part if part.gradient is None else part._replace(gradient=part.gradient.clone()) for part in parts
    ]


def drawn_case(values: list[tuple[float, float]], dtype: torch.dtype) -> tuple[Tensor, list[Part]]:
    """A residual and three parts with gradients, of which one may be empty; the values fill several blocks."""
    table = torch.tensor(values * 5, dtype=dtype)
    first = len(values)
    sizes = [first, len(table) - first - 1, 1]
    gradients: list[Tensor | None] = [*table[:, 1].clone().split(sizes)]
    return table[:, 0].clone(), make_parts(gradients, sizes, [0.25, 1.0, 3.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=40),
    st.sampled_from([1, 3, 2**20]),
    st.sampled_from([1.0, 0.37, 0.0]),
)
def test_every_variant_fires_what_plain_arithmetic_gives_bit_for_bit(
    name: str, dtype: torch.dtype, values: list[tuple[float, float]], most: int, share: float
) -> None:
    residual, parts = drawn_case(values, dtype)
    expected_residual = residual.clone()
    expected = fire_one_by_one(expected_residual, parts, THRESHOLD, share, most)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(name, monkeypatch)
        uncommitted = copy_parts(parts)
        before = residual.clone()
        assert_same(
            kernels.fire(residual, uncommitted, THRESHOLD, share=share, most=most, commit=False), expected
        )
        assert torch.equal(bits(residual), bits(before))
        held = torch.cat([part.gradient for part in uncommitted if part.gradient is not None])
        assert torch.equal(bits(held), bits(expected_residual))
        assert_same(kernels.fire(residual, parts, THRESHOLD, share=share, most=most), expected)
        assert torch.equal(bits(residual), bits(expected_residual))


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize("commit", [True, False])
def test_a_single_element_at_the_threshold_is_found_wherever_it_is(
    variant: str, share: float, commit: bool
) -> None:
    for place in [0, 1, 63, 64, 100, 127, 128, 140]:
        residual = torch.zeros(141)
        residual[place] = -THRESHOLD
        quanta = kernels.fire(
            residual, [Part(0, 141, torch.zeros(141), 1.0)], THRESHOLD, share=share, commit=commit
        )
        assert (quanta.indices.tolist(), quanta.counts.tolist()) == ([place], [-1])


@settings(max_examples=100, deadline=None)
@given(st.integers(-50, 50), st.integers(1, 2**20), st.sampled_from(VARIANTS))
def test_whole_quanta_are_counted_exactly_on_both_sides_of_every_multiple(
    level: int, count: int, name: str
) -> None:
    threshold = threshold_at(level)
    multiple = np.float32(count * threshold)
    residual = torch.tensor([np.nextafter(multiple, np.float32(0)), multiple])
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(name, monkeypatch)
        quanta = kernels.fire(residual, [Part(0, 2, None, 1.0)], threshold, most=2**20)
    assert quanta.counts.tolist() == ([count - 1, count] if count > 1 else [count])


def test_a_product_is_rounded_before_it_is_added(variant: str) -> None:
    factor, exact = 1 + 2.0**-12, 1 + 2.0**-11 + 2.0**-24
    residual = torch.full((200,), -float(np.float32(exact)))
    kernels.fire(residual, [Part(0, 200, torch.full((200,), factor), factor)], THRESHOLD)
    assert not residual.any()  # one rounding would leave 2^-24


@pytest.mark.parametrize("most", [1, 2**20])
def test_what_was_sent_and_what_is_kept_add_up_to_what_was_there(variant: str, most: int) -> None:
    residual, gradient = draw(5000, 5000, seed=1)
    residual *= 50
    grown = residual + 0.25 * gradient
    quanta = kernels.fire(residual, [Part(0, 5000, gradient, 0.25)], THRESHOLD, most=most)
    sums = residual.double().index_add(0, quanta.indices, quanta.counts.double() * THRESHOLD)
    assert torch.equal(sums, grown.double())
    assert len(quanta) == int((grown.abs() >= THRESHOLD).sum())


def test_a_part_at_rate_0_is_left_alone_and_one_without_gradient_sends_what_it_holds(variant: str) -> None:
    residual = torch.full((300,), 2.0)
    ones = torch.ones(100)
    parts = make_parts([ones, None, ones.clone()], [100, 100, 100], [0.0, 0.5, 0.5])
    quanta = kernels.fire(residual, parts, 1.0, share=2.0)
    assert torch.equal(quanta.indices, torch.arange(100, 300))
    assert residual.view(3, 100).unique(dim=1).view(-1).tolist() == [2.0, 1.0, 2.0]


def test_an_infinite_threshold_accumulates_and_sends_nothing(variant: str) -> None:
    residual = torch.zeros(100)
    assert len(kernels.fire(residual, [Part(0, 100, torch.ones(100), 0.5)], math.inf)) == 0
    assert residual.unique().tolist() == [0.5]


@pytest.mark.parametrize("commit", [True, False])
def test_quanta_that_are_put_back_leave_no_trace(variant: str, commit: bool) -> None:
    residual, first, second = draw(900, 500, 400, seed=2)
    residual *= 4
    parts = make_parts([first.view(20, 25).T, second], [500, 400])
    grown = residual + 0.25 * torch.cat([parts[0].gradient.reshape(-1), second])  # type: ignore[union-attr]
    quanta = kernels.fire(residual, parts, THRESHOLD, most=9, commit=commit)
    assert len(quanta) > 100
    returned = Quanta(quanta.indices[::2], quanta.counts[::2])
    kernels.put_back(residual, returned, THRESHOLD, None if commit else parts)
    held = residual if commit else torch.cat([part.gradient.reshape(-1) for part in parts])  # type: ignore[union-attr]
    grown[quanta.indices[1::2]] -= quanta.counts[1::2] * THRESHOLD
    assert torch.equal(bits(held), bits(grown))


def apply_densely(
    parts: list[Part], received: list[Quanta], threshold: float, num_ranks: int, dtype: torch.dtype
) -> list[Tensor]:
    """The oracle: a buffer for the whole bucket, every element of it scaled."""
    aggregate = torch.zeros(parts[-1].stop, dtype=dtype)
    for quanta in received:
        aggregate.index_add_(0, quanta.indices, quanta.counts.to(dtype))
    aggregate.mul_(threshold).div_(num_ranks)
    return [aggregate[part.start : part.stop].div(part.rate) for part in parts]


def some_quanta(num_elements: int, num_sent: int, seed: int) -> Quanta:
    random = np.random.default_rng(seed)
    indices = np.sort(random.choice(num_elements, num_sent, replace=False))
    counts = random.integers(1, 1000, num_sent) * random.choice([-1, 1], num_sent)
    return Quanta(torch.from_numpy(indices), torch.from_numpy(counts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_sent", [0, 1, 3000, 50_000])
def test_applying_writes_the_scaled_sum_of_all_ranks_counts(
    variant: str, dtype: torch.dtype, num_sent: int
) -> None:
    sizes, rates = [3, 0, 40_000, 9_997], [0.3, 0.1, 0.007, 1.7]
    gradients: list[Tensor | None] = [*draw(*sizes, dtype=dtype)]
    parts = make_parts(gradients, sizes, rates)
    received = [some_quanta(sum(sizes), num_sent, seed) for seed in range(3)]
    received[1] = Quanta(received[0].indices, -received[0].counts)  # cancels
    received[2] = Quanta(received[2].indices.to(torch.int32), received[2].counts.to(torch.int32))
    kernels.apply(parts, received, THRESHOLD, 3, dtype)
    for part, expected in zip(parts, apply_densely(parts, received, THRESHOLD, 3, dtype)):
        assert torch.equal(bits(part.gradient), bits(expected))  # type: ignore[arg-type]


def test_applying_nothing_clears_the_gradients(variant: str) -> None:
    gradient = torch.ones(70)
    kernels.apply([Part(0, 70, gradient, 0.1)], [], THRESHOLD, 2, torch.float32)
    assert not gradient.any()


def test_quanta_of_parameters_that_take_no_part_are_left_out(variant: str) -> None:
    gradient = torch.ones(10)
    quanta = Quanta(torch.tensor([0, 10, 19, 20]), torch.tensor([1, 2, 3, 4]))
    kernels.apply([Part(10, 20, gradient, 1.0)], [quanta], 1.0, 1, torch.float32)
    assert gradient.tolist() == [2.0, *[0.0] * 8, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_16_bit_and_in_pieces_are_as_good_as_any(variant: str, dtype: torch.dtype) -> None:
    first, second = (gradient.to(dtype) for gradient in draw(1200, 800))
    parts = make_parts([first.view(30, 40).T, second], [1200, 800], [0.3, 0.7])
    copies = make_parts([first.view(30, 40).T.float().reshape(-1), second.float()], [1200, 800], [0.3, 0.7])
    residual, other = torch.zeros(2000), torch.zeros(2000)
    quanta = kernels.fire(residual, parts, 0.5, most=7)
    assert_same(quanta, kernels.fire(other, copies, 0.5, most=7))
    assert torch.equal(bits(residual), bits(other))
    kernels.apply(parts, [quanta, quanta], 0.5, 3, torch.float32)
    for part, expected in zip(parts, apply_densely(parts, [quanta, quanta], 0.5, 3, torch.float32)):
        assert torch.equal(part.gradient.reshape(-1), expected.to(dtype))  # type: ignore[union-attr]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0], ids=["few", "many", "all"])
def test_threads_and_full_buffers_change_nothing(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, scale: float
) -> None:
    monkeypatch.setattr(kernels_numba, "THREAD_ELEMENTS", 100)
    monkeypatch.setattr(kernels_numba, "LEAST_BUFFER", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    sizes = [700, 0, 3_000, 64, 1, 2_001]
    gradients: list[Tensor | None] = [*draw(*sizes)]
    gradients[2] = gradients[2].view(50, 60).T  # type: ignore[union-attr]
    parts = make_parts(gradients, sizes)
    results = []
    for name in VARIANTS:
        with monkeypatch.context() as inside:
            use(name, inside)
            copies = copy_parts(parts)
            held = torch.full((sum(sizes),), 0.1)
            early = kernels.fire(held, copies, THRESHOLD, share=scale, most=5, commit=False)
            first = [part.gradient.clone() for part in copies]  # type: ignore[union-attr]
            quanta = kernels.fire(held, parts, THRESHOLD, share=scale, most=5)
            kernels.apply(copies, [early, quanta], THRESHOLD, 2, torch.float32)
            results.append((early, quanta, [held, *first, *(part.gradient for part in copies)]))
    (early, quanta, tensors), (other_early, other, others) = results
    assert_same(early, other_early)
    assert_same(quanta, other)
    assert all(torch.equal(bits(left), bits(right)) for left, right in zip(tensors, others, strict=True))


def fire_in_threads() -> Quanta:
    residual, gradient = draw(300_000, 300_000, seed=3)
    return kernels.fire(residual, [Part(0, 300_000, gradient, 1.0)], THRESHOLD)


def test_workers_of_one_process_and_forked_ones_fire_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = fire_in_threads()
    found: list[Quanta] = []
    workers = [threading.Thread(target=lambda: found.append(fire_in_threads())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for quanta in found:
        assert_same(quanta, expected)
    child = multiprocessing.get_context("fork").Process(target=fire_in_threads)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_missing_numba_is_told_once_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    residual, gradient = draw(1000, 1000)
    other = residual.clone()
    part = Part(0, 1000, gradient, 1.0)
    expected = kernels.fire(residual, [part], THRESHOLD)
    kernels._load.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "teacherstudent.distributed.kernels_numba")
    try:
        with pytest.warns(UserWarning, match="numba"):
            found = kernels.fire(other, [part], THRESHOLD)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.fire(other.clone(), [part], THRESHOLD)
    finally:
        kernels._load.cache_clear()
    assert_same(found, expected)
    assert torch.equal(bits(other), bits(residual))


def test_each_kind_of_residual_has_its_variant() -> None:
    for dtype in DTYPES:
        kernels.compile_for(torch.device("cpu"), dtype)
        assert kernels._variant(torch.empty(0, dtype=dtype)) is kernels_numba
    assert kernels._variant(torch.empty(0, device="meta")).__name__.endswith("kernels_torch")


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_parts_are_cut_only_where_a_threads_share_ends(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of small parts would otherwise cost a view each. What is cut tiles what was there."""
    monkeypatch.setattr(kernels_numba, "THREAD_ELEMENTS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    sizes = [3, 10, 1, 1, 30, 7, 2, 2, 11, 40, 5, 1]
    stops = np.cumsum(sizes).tolist()
    values = torch.arange(float(sum(sizes)))
    parts = [
        Part(stop - size, stop, None if number == 5 else values[stop - size : stop], 1.0)
        for number, (size, stop) in enumerate(zip(sizes, stops))
    ]
    runs = kernels_numba._cut(parts)
    pieces = [piece for run in runs for piece in run]
    assert len(runs) == num_threads
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces)][:-1]
    assert pieces[-1].stop == len(values)
    for piece in pieces:
        assert piece.gradient is None or torch.equal(piece.gradient, values[piece.start : piece.stop])
    assert sum(not any(piece is part for part in parts) for piece in pieces) <= 2 * (num_threads - 1)
