"""Rice streams: every bit where it belongs, from numba and from numpy."""

import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.distributed import rice

NUMPY = rice.Kernels(rice.write_by_numpy, rice.read_by_numpy)
NUMBA = rice.load_kernels()
VALUES = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 5000), st.integers(0, 2**31 - 1)), max_size=60)
BOTH = pytest.mark.parametrize("kernels", [NUMPY, NUMBA], ids=["numpy", "numba"])


@contextmanager
def using(kernels: rice.Kernels) -> Iterator[None]:
    with patch.object(rice, "load_kernels", lambda: kernels):
        yield


def bits_of(data: np.ndarray) -> str:
    return "".join(f"{byte:08b}"[::-1] for byte in data.tolist())


def filled_up(bits: str) -> str:
    return bits + "0" * (-len(bits) % 8)


def stream_by_hand(values: list[int], parameter: int) -> str:
    low = "".join(str(value >> bit & 1) for value in values for bit in range(parameter))
    return filled_up(low) + filled_up("".join("0" * (value >> parameter) + "1" for value in values))


def cost(values: list[int], parameter: int) -> int:
    return sum(parameter + (value >> parameter) + 1 for value in values)


def layout_of(values: list[int], parameter: int) -> rice.Layout:
    low = parameter * len(values)
    return rice.Layout(parameter, -(-low // 8) + -(-(cost(values, parameter) - low) // 8))


@BOTH
@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 31).flatmap(
        lambda p: st.tuples(st.just(p), st.lists(st.integers(0, min(2**31, 40 << p) - 1), max_size=40))
    ),
    st.binary(max_size=20),
)
def test_a_stream_is_written_bit_by_bit_and_read_back_up_to_its_end(
    kernels: rice.Kernels, drawn: tuple[int, list[int]], rest: bytes
) -> None:
    parameter, values = drawn
    with using(kernels):
        stream = rice.encode(np.array(values, np.int64), layout_of(values, parameter))
        assert bits_of(stream) == stream_by_hand(values, parameter)
        followed = np.concatenate([stream, np.frombuffer(rest, np.uint8)])
        decoded, num_bytes = rice.decode(followed, len(values), parameter)
    assert decoded.tolist() == values
    assert num_bytes == stream.size


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_no_other_parameter_takes_fewer_bits_and_the_size_is_known_beforehand(values: list[int]) -> None:
    layout = rice.choose_layout(np.array(values, np.int64))
    assert cost(values, layout.parameter) == min(cost(values, parameter) for parameter in range(32))
    assert layout == layout_of(values, layout.parameter)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=24), st.integers(0, 40), st.integers(0, 40))
def test_whatever_the_bytes_both_readers_agree_and_accept_only_what_is_written_just_so(
    data: bytes, count: int, parameter: int
) -> None:
    stream, results = np.frombuffer(data, np.uint8), []
    for kernels in (NUMPY, NUMBA):
        with using(kernels):
            try:
                values, num_bytes = rice.decode(stream, count, parameter)
                results.append((values.tolist(), num_bytes))
            except ValueError:
                results.append(None)
    assert results[0] == results[1]
    if results[0] is not None:
        values, num_bytes = results[0]
        assert len(values) == count
        assert bits_of(stream[:num_bytes]) == stream_by_hand(values, parameter)


@BOTH
@pytest.mark.parametrize("value", [0, 1, 2**31 - 2, 2**31 - 1])
def test_the_largest_value_comes_back_and_one_beyond_it_is_refused(kernels: rice.Kernels, value: int) -> None:
    with using(kernels):
        stream = rice.encode(np.array([value]), layout_of([value], 31))
        assert rice.decode(stream, 1, 31)[0].tolist() == [value]
        with pytest.raises(ValueError):
            rice.decode(np.array([0, 0, 0, 0, 2], np.uint8), 1, 31)  # 2³¹
        with pytest.raises(ValueError):
            rice.decode(np.array([0] * 14 + [1], np.uint8), 1, 26)  # 80·2²⁶


@BOTH
def test_a_count_that_its_bytes_cannot_hold_takes_no_memory(kernels: rice.Kernels) -> None:
    stream = np.full(100, 255, np.uint8)
    with using(kernels):
        rice.decode(stream[:1], 8, 0)
        tracemalloc.start()
        for count, parameter in [(2**32 - 1, 0), (2**32 - 1, 31), (801, 0), (26, 31), (1, 255)]:
            with pytest.raises(ValueError):
                rice.decode(stream, count, parameter)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50_000


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 199)), st.integers(200, 220))
def test_a_bitmap_has_its_ones_where_they_were_set(places: set[int], num_bits: int) -> None:
    bitmap = rice.set_bits(np.array(sorted(places), np.int64), num_bits)
    expected = "".join("1" if place in places else "0" for place in range(num_bits))
    assert bits_of(bitmap) == filled_up(expected)
    assert rice.find_bits(bitmap).tolist() == sorted(places)


@pytest.mark.parametrize("mean", [0, 0.3, 10, 1000, 1e6])
def test_numba_and_numpy_write_the_same_bytes_of_many_values(mean: float) -> None:
    values = np.random.default_rng(5).geometric(1 / (1 + mean), 3000) - 1
    layout = rice.choose_layout(values)
    streams = []
    for kernels in (NUMPY, NUMBA):
        with using(kernels):
            streams.append(rice.encode(values, layout))
            assert np.array_equal(rice.decode(streams[-1], 3000, layout.parameter)[0], values)
    assert np.array_equal(*streams)


def test_numpy_serves_where_numba_is_not_installed_and_says_so() -> None:
    assert NUMBA != NUMPY
    with patch.dict(sys.modules, {"numba": None}), pytest.warns(UserWarning, match="install numba"):
        assert rice.load_kernels.__wrapped__() == NUMPY
