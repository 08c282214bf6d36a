"""What an exchange costs a batch, and for how many workers: the arithmetic behind `make bench`'s section bmuf."""

import importlib.util
from types import ModuleType

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st


def load_exchange_cost() -> ModuleType:
    path = ROOT / "benchmarks" / "exchange_cost.py"
    spec = importlib.util.spec_from_file_location("exchange_cost", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cost = load_exchange_cost()
NOTHING = cost.Line(0.0, 0.0)


def make_cost(**changes: object) -> object:
    terms = {
        "traffic": cost.count_others,
        "bytes_per_traffic": 97_200.0,
        "processor_seconds": NOTHING,
        "num_collectives": 0,
        "latency_seconds": NOTHING,
        "num_batches": 1,
        "bookkeeping_seconds": 0.0,
    }
    return cost.Cost(**(terms | changes))


def test_of_single_steps_all_is_exchange_and_the_median_counts() -> None:
    assert cost.split_seconds([3.0, 1.0, 2.0], 1) == (2.0, 0.0)


def test_an_exchange_is_what_a_block_takes_beyond_its_bookkeeping() -> None:
    quiet = [0.5] * 9
    exchange, bookkeeping = cost.split_seconds([*quiet, 4.5, *quiet, 2.5, *quiet, 8.5], 10)
    assert (exchange, bookkeeping) == (pytest.approx(0.4), 0.5)


def test_an_exchange_counts_wherever_it_lies_in_the_block_and_behind_the_last_one() -> None:
    late = [
        0.5,
        2.5,
        0.5,
        0.5,
        1.5,
        0.5,
        0.5,
        0.5,
        0.5,
        0.5,
        0.5,
        1.5,
    ]  # a block of ten, merged two steps late
    assert cost.split_seconds(late, 10) == (pytest.approx(0.4), 0.5)


def test_a_line_goes_through_its_points() -> None:
    line = cost.Line.through({0.75: 5.0, 0.5: 4.0})
    assert (line.at(0.5), line.at(0.75), line.at(1.0)) == pytest.approx((4.0, 5.0, 6.0))


def test_a_cost_that_seems_to_fall_with_more_workers_is_taken_for_constant() -> None:
    line = cost.Line.through({1: 5.0, 3: 4.0})
    assert (line.start, line.slope) == (4.5, 0.0)


def test_a_thousandth_of_the_model_in_words_serves_as_many_workers_as_arithmetic_says() -> None:
    # 24.3 M elements at density 1e-3, 32 bits each: T = (N - 1) * 97,200 * 8 / 10**10 <= 0.1 / 0.9 - 0.1
    number = cost.count_workers(lambda n: make_cost().wire_seconds(n, 1e10), 0.1 / 0.9 - 0.1)
    assert number == 1 + int((0.1 / 9) * 1e10 / (97_200 * 8))


def test_every_term_of_the_cost_is_charged_once_and_shared_by_the_batches_served() -> None:
    # N = 5: bytes 40 at 8 bits a byte and 80 bits a second: 4 s; processor 1 + 2*4; 3 collectives of 0.5 + 0.25*4
    whole = make_cost(
        bytes_per_traffic=10.0,
        processor_seconds=cost.Line(1.0, 2.0),
        num_collectives=3,
        latency_seconds=cost.Line(0.5, 0.25),
        num_batches=10,
        bookkeeping_seconds=7.0,
    )
    assert whole.wire_seconds(5, 80.0) == pytest.approx(0.4)
    assert whole.seconds(5, 80.0) == pytest.approx(0.4 + 0.9 + 0.45 + 7.0)


def test_slices_are_bounded_and_messages_of_others_are_not() -> None:
    assert (cost.count_slices(2), cost.count_slices(4), cost.count_others(4)) == (0.5, 0.75, 3)


@settings(max_examples=50)
@given(slope=st.floats(1e-7, 1.0), allowed=st.floats(1e-3, 1.0))
def test_the_count_is_the_largest_that_is_allowed(slope: float, allowed: float) -> None:
    number = cost.count_workers(lambda n: slope * (n - 1), allowed)
    assert slope * (number - 1) <= allowed
    assert number == cost.MOST_WORKERS or slope * number > allowed


def test_where_two_workers_cost_too_much_one_is_left_and_where_none_does_the_most_there_is() -> None:
    assert cost.count_workers(lambda n: 1.0, 0.5) == 1
    assert cost.count_workers(lambda n: 0.5, 0.5) == cost.MOST_WORKERS
