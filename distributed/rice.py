"""Golomb–Rice streams of whole numbers, and sets as bitmaps.

A stream of the values v with the parameter p (S. W. Golomb, "Run-length encodings", 1966; R. F. Rice, "Some practical
universal noiseless coding techniques", 1979) is two runs of bits, each filled up with zeros to whole bytes:

    low        the p lowest bits of each value, its lowest first
    quotients  for each value, v >> p zeros and a one

Bits fill a byte from its lowest on. A stream of known count and parameter ends with the byte that holds its last one,
and needs no length. Compiled by numba where that is installed; the same bytes come from numpy, some ten times slower.
"""
# K values of a stream, p its parameter

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.int64]
Bytes = NDArray[np.uint8]

LIMIT = 2**31  # of values: 0 ≤ v < LIMIT
MOST_PARAMETER = 31  # leaves no quotient
_SPARE = 8  # a reader looks at whole bytes, and may find more ones in the last than there are values


class Kernels(NamedTuple):
    """write(values, p, low bytes, stream of zeros) fills the stream; read(stream, p, low bytes, values with _SPARE
    more) fills the values and returns the bytes that it read, −1 where they are no such stream."""

    write: Callable[[Values, int, int, Bytes], None]
    read: Callable[[Bytes, int, int, Values], int]


class Layout(NamedTuple):
    """How a stream is written, and its size."""

    parameter: int
    num_bytes: int


def choose_layout(values: Values) -> Layout:
    """The one of the fewest bits for `values` (K)."""
    likely = (
        int(values.mean() * np.log(2)) if values.size else 0
    )  # the best 2^p if values fall off geometrically
    best = max(likely.bit_length() - 1, 0)
    fewest = _count_bits(values, best)
    for direction in (-1, 1):  # bits are convex in p, so downhill leads to the lowest
        while 0 <= best + direction <= MOST_PARAMETER:
            bits = _count_bits(values, best + direction)
            if bits >= fewest:
                break
            best, fewest = best + direction, bits
    num_low_bits = values.size * best
    return Layout(best, to_bytes(num_low_bits) + to_bytes(fewest - num_low_bits))


def encode(values: Values, layout: Layout) -> Bytes:
    """The stream of `values` (K), 0 ≤ v < LIMIT, in a layout of theirs."""
    stream = np.zeros(layout.num_bytes, np.uint8)
    load_kernels().write(values, layout.parameter, to_bytes(values.size * layout.parameter), stream)
    return stream


def decode(stream: Bytes, count: int, parameter: int) -> tuple[Values, int]:
    """The `count` values of the stream with which these bytes begin, and its size.

    Raises ValueError where they do not begin with one, before it takes memory for more values than they can hold.
    """
    num_low_bytes = to_bytes(count * parameter)
    if parameter > MOST_PARAMETER or num_low_bytes + to_bytes(count) > stream.size:
        raise ValueError(f"{count} values with {parameter} low bits do not fit into its {stream.size} bytes")
    values = np.empty(count + _SPARE, np.int64)
    num_bytes = load_kernels().read(stream, parameter, num_low_bytes, values)
    values = values[:count]
    if num_bytes < 0 or values.max(initial=0) >= LIMIT:
        raise ValueError(f"its bytes are no Rice stream of {count} values with {parameter} low bits")
    return values, num_bytes


def set_bits(places: Values, num_bits: int) -> Bytes:
    """A bitmap with ones at `places`."""
    bits = np.zeros(num_bits, bool)
    bits[places] = True
    return np.packbits(bits, bitorder="little")


def find_bits(bitmap: Bytes) -> Values:
    """The places of the ones of a bitmap, rising."""
    return np.flatnonzero(np.unpackbits(bitmap, bitorder="little").view(bool))


def to_bytes(num_bits: int) -> int:
    return -(-num_bits // 8)


@cache
def load_kernels() -> Kernels:
    """Compiled at the first call, which takes seconds where no other process has left the machine code behind."""
    try:
        import numba
    except ImportError:
        warnings.warn(
            "numba is not installed: GTC's Rice streams are written and read by numpy, the same bytes in ten times "
            "as long; install numba, or give codec='words'",
            stacklevel=2,
        )
        return Kernels(write_by_numpy, read_by_numpy)
    values, stream = numba.int64[::1], numba.uint8[::1]
    given = numba.types.Array(numba.uint8, 1, "C", readonly=True)
    given_values = numba.types.Array(numba.int64, 1, "C", readonly=True)
    signatures = {
        _write: numba.void(given_values, numba.int64, numba.int64, stream),
        _read: numba.int64(given, numba.int64, numba.int64, values),
    }

    def compile_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signatures[kernel], nogil=True, cache=True)(kernel)
        except RuntimeError:  # there is no folder in which numba could keep it
            return numba.njit(signatures[kernel], nogil=True)(kernel)

    return Kernels(compile_kernel(_write), compile_kernel(_read))


def _count_bits(values: Values, parameter: int) -> int:
    return values.size * (parameter + 1) + int((values >> parameter).sum())


# ---- by numpy -------------------------------------------------------------------------------------------------


def write_by_numpy(values: Values, parameter: int, num_low_bytes: int, stream: Bytes) -> None:
    low = (values[:, None] >> np.arange(parameter) & 1).astype(np.uint8)
    stream[:num_low_bytes] = np.packbits(low, bitorder="little")
    ones = np.cumsum((values >> parameter) + 1) - 1
    stream[num_low_bytes:] = set_bits(ones, 8 * (stream.size - num_low_bytes))


def read_by_numpy(stream: Bytes, parameter: int, num_low_bytes: int, values: Values) -> int:
    count = values.size - _SPARE
    ones = find_bits(stream[num_low_bytes:])
    num_bytes = to_bytes(int(ones[count - 1]) + 1) if 0 < count <= ones.size else 0
    low = np.unpackbits(stream[:num_low_bytes], bitorder="little")
    if np.searchsorted(ones, 8 * num_bytes) != count or low[count * parameter :].any():
        return -1
    quotients = np.diff(ones[:count], prepend=-1) - 1
    if quotients.max(initial=0) >= LIMIT:
        return -1
    digits = low[: count * parameter].reshape(count, parameter)
    values[:count] = (quotients << parameter) + digits @ np.left_shift(1, np.arange(parameter))
    return num_low_bytes + num_bytes


# ---- by numba: plain Python as well, all of it in int64 --------------------------------------------------------


def _write(values, parameter, num_low_bytes, stream):  # type: ignore[no-untyped-def]
    pending, num_pending, low, place = np.int64(0), 0, 0, 8 * num_low_bytes
    mask = (1 << parameter) - 1
    for value in values:
        pending |= (value & mask) << num_pending
        num_pending += parameter
        while num_pending >= 8:
            stream[low] = pending & 255
            low += 1
            pending >>= 8
            num_pending -= 8
        place += value >> parameter
        stream[place >> 3] |= np.uint8(1 << (place & 7))
        place += 1
    if num_pending:
        stream[low] = pending


def _read(stream, parameter, num_low_bytes, values):  # type: ignore[no-untyped-def]
    count = values.size - _SPARE
    found, zeros, byte = np.int64(0), np.int64(0), num_low_bytes
    while found < count:
        if byte == stream.size or zeros << parameter >= LIMIT:
            return -1
        bits = np.int64(stream[byte])
        byte += 1
        if bits == 0:
            zeros += 8
            continue
        for place in range(8):  # without a branch, which a processor could only guess
            one = bits >> place & 1
            values[found] = zeros
            found += one
            zeros = (zeros + 1) & (one - 1)
    pending, num_pending, low = np.int64(0), 0, 0
    mask = (1 << parameter) - 1
    for number in range(count):
        while num_pending < parameter:
            pending |= np.int64(stream[low]) << num_pending
            low += 1
            num_pending += 8
        values[number] = values[number] << parameter | pending & mask
        pending >>= parameter
        num_pending -= parameter
    return byte if found == count and pending == 0 else -1
