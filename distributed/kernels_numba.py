"""GTC's passes over memory compiled for the CPU, for float32 and float64: see kernels.py.

Both are bound by memory. `fire` reads r and g and writes r, 12 bytes an element in float32: its floor is one
a.add_(b). It tests BLOCK elements at a time, which keeps the loop that all of them go through free of branches and
thus vectorised, and looks at single elements only in blocks where one fires. `apply` clears, sums and scales a
segment of the gradients while it lies in the cache: its floor is writing them once.

Threads take runs of parts of about equal size. They are plain ones, started for the call, which takes a hundredth of
it: numba's own pool aborts after a fork, and when two workers of one process use it at once.
"""
# K elements that send, r residual, g gradient, held: where r stays, τ threshold

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

from teacherstudent.distributed.codec import Quanta
from teacherstudent.distributed.kernels import Part, spans

BLOCK = 64  # elements that are tested together
SEGMENT = 2**15  # elements of the gradients that are summed while in the cache
THREAD_ELEMENTS = 2**17  # fewer are not worth a thread
# Buffers for quanta hold this share of the elements; another is begun when one is full.
BUFFER_SHARE, LEAST_BUFFER = 2**-8, 2**10
INTO_RESIDUAL, INTO_GRADIENT, NOTHING = 0, 1, 2  # what is added where

Array = np.ndarray
Result = TypeVar("Result")
# Never fastmath: it fuses multiplications with additions.
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
_inlined = numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")


def fire(
    residual: Tensor, parts: Sequence[Part], threshold: float, share: float, most: int, commit: bool
) -> tuple[Tensor, Tensor]:
    def fire_run(run: list[Part]) -> list[tuple[Array, Array]]:
        sent = _Sent(sum(part.stop - part.start for part in run))
        for part in run:
            _fire_part(residual[part.start : part.stop], part, threshold, share, most, commit, sent)
        return [*sent.full, sent.last()]

    indices, counts = zip(*(chunk for chunks in _in_threads(fire_run, _cut(parts)) for chunk in chunks))
    return _join(indices), _join(counts)


def apply(
    parts: Sequence[Part], received: Sequence[Quanta], threshold: float, num_ranks: int, dtype: torch.dtype
) -> None:
    indices = _join(quanta.indices.cpu().numpy() for quanta in received)
    counts = _join(quanta.counts.cpu().numpy() for quanta in received)
    lengths = np.array([len(quanta) for quanta in received], np.int64)
    messages, offsets = indices.split(lengths.tolist()), np.cumsum(lengths) - lengths
    numbers = torch.empty(0, dtype=dtype).numpy().dtype.type

    def apply_run(run: list[Part]) -> None:
        ranges = np.array([spans(run, message) for message in messages], np.int64)
        ranges = ranges.reshape(len(messages), len(run), 2) + offsets.reshape(-1, 1, 1)
        for part, (begins, ends) in zip(run, ranges.transpose(1, 2, 0)):
            assert part.gradient is not None
            sums = _flat(part.gradient, dtype)
            within = indices.numpy(), counts.numpy(), begins.copy(), ends.copy()
            _sum(
                sums.numpy(), part.start, *within, numbers(threshold), numbers(num_ranks), numbers(part.rate)
            )
            _write_back(part.gradient, sums)

    _in_threads(apply_run, _cut(parts))


class _Sent:
    """The quanta of one thread: full buffers, and the one that is being filled."""

    def __init__(self, num_elements: int) -> None:
        self._size = max(LEAST_BUFFER, int(num_elements * BUFFER_SHARE)) + BLOCK
        self.full: list[tuple[Array, Array]] = []
        self.begin()

    def begin(self) -> None:
        self.indices, self.counts = np.empty(self._size, np.int64), np.empty(self._size, np.int64)
        self.length = 0

    def last(self) -> tuple[Array, Array]:
        return self.indices[: self.length], self.counts[: self.length]


def _fire_part(
    residual: Tensor, part: Part, threshold: float, share: float, most: int, commit: bool, sent: _Sent
) -> None:
    numbers = residual.numpy().dtype.type
    gradient = residual if part.gradient is None else _flat(part.gradient, residual.dtype)
    mode = INTO_RESIDUAL if commit else INTO_GRADIENT
    held = residual if commit else gradient
    if part.gradient is None or not share:
        mode = NOTHING
        if not commit:
            gradient.copy_(residual)
    scales = numbers(part.rate * share), numbers(threshold), numbers(most)
    position = 0
    while position < len(held):
        position, sent.length = _fire(
            mode, held.numpy(), residual.numpy(), gradient.numpy(), *scales, position, part.start,
            sent.indices, sent.counts, sent.length,
        )  # fmt: skip
        if position < len(held):
            sent.full.append(sent.last())
            sent.begin()
    if not commit:
        assert part.gradient is not None
        _write_back(part.gradient, gradient)


def _join(chunks: Iterable[Array]) -> Tensor:
    """By numpy, since torch would wake its own threads to copy so little."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *chunks]))


def _flat(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in one dimension and of this dtype: itself where it is so, a copy otherwise."""
    return gradient.detach().reshape(-1).to(dtype)


def _write_back(gradient: Tensor, flat: Tensor) -> None:
    if flat.data_ptr() != gradient.data_ptr():
        gradient.copy_(flat.view_as(gradient))


def _cut(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts in as many runs of about equal size as there are threads; a gradient in pieces is not cut."""
    num_elements = sum(part.stop - part.start for part in parts)
    num_runs = max(1, min(torch.get_num_threads(), num_elements // THREAD_ELEMENTS))
    size = -(-num_elements // num_runs)
    runs: list[list[Part]] = [[]]
    room = size
    for part in parts:
        start = part.start
        while start < part.stop:
            if room <= 0:
                runs.append([])
                room = size
            fits = start == part.start and part.stop <= start + room
            if fits or (part.gradient is not None and not part.gradient.is_contiguous()):
                stop, cut = part.stop, part
            else:
                stop = min(part.stop, start + room)
                within = slice(start - part.start, stop - part.start)
                gradient = None if part.gradient is None else part.gradient.view(-1)[within]
                cut = Part(start, stop, gradient, part.rate)
            runs[-1].append(cut)
            room -= stop - start
            start = stop
    return runs


def _in_threads(function: Callable[[list[Part]], Result], runs: list[list[Part]]) -> list[Result]:
    if len(runs) == 1:
        return [function(runs[0])]
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(function, runs))


@_compiled
def _fire(
    mode: int, held: Array, residual: Array, gradient: Array, scale: float, threshold: float, most: float,
    position: int, first: int, indices: Array, counts: Array, length: int,
) -> tuple[int, int]:  # fmt: skip
    """Go on from `position` until the end or until the buffers may be full: where that is, and their length."""
    whole_blocks = held.size - held.size % BLOCK
    for start in range(position, whole_blocks, BLOCK):
        if length > indices.size - BLOCK:
            return start, length
        stop = start + BLOCK
        block = held[start:stop]
        if mode == INTO_RESIDUAL:
            fires = _add_to_residual(block, gradient[start:stop], scale, threshold)
        elif mode == INTO_GRADIENT:
            fires = _add_to_gradient(residual[start:stop], block, scale, threshold)
        else:
            fires = _test(block, threshold)
        if fires:
            length = _take(block, BLOCK, threshold, most, first + start, indices, counts, length)
    if length > indices.size - BLOCK:
        return whole_blocks, length
    if mode != NOTHING:
        for i in range(whole_blocks, held.size):
            held[i] = residual[i] + scale * gradient[i]
    rest = held[whole_blocks:]
    length = _take(rest, rest.size, threshold, most, first + whole_blocks, indices, counts, length)
    return held.size, length


@_inlined
def _add_to_residual(residual: Array, gradient: Array, scale: float, threshold: float) -> bool:
    fires = np.int32(0)
    for i in range(BLOCK):
        value = residual[i] + scale * gradient[i]
        residual[i] = value
        fires |= np.int32(abs(value) >= threshold)
    return fires != 0


@_inlined
def _add_to_gradient(residual: Array, gradient: Array, scale: float, threshold: float) -> bool:
    fires = np.int32(0)
    for i in range(BLOCK):
        value = residual[i] + scale * gradient[i]
        gradient[i] = value
        fires |= np.int32(abs(value) >= threshold)
    return fires != 0


@_inlined
def _test(held: Array, threshold: float) -> bool:
    fires = np.int32(0)
    for i in range(BLOCK):
        fires |= np.int32(abs(held[i]) >= threshold)
    return fires != 0


@_inlined
def _take(
    held: Array,
    size: int,
    threshold: float,
    most: float,
    first: int,
    indices: Array,
    counts: Array,
    length: int,
) -> int:
    """Take the quanta out of a block, append them to the buffers, and return the new length of these."""
    begin = length
    for i in range(size):  # without a branch: where it goes cannot be predicted
        indices[length] = i
        length += int(abs(held[i]) >= threshold)
    for k in range(begin, length):
        i = indices[k]
        count = np.copysign(min(np.floor(abs(held[i]) / threshold), most), held[i])
        held[i] -= count * threshold
        indices[k] = first + i
        counts[k] = np.int64(count)
    return length


@_compiled
def _sum(
    sums: Array, first: int, indices: Array, counts: Array, begins: Array, ends: Array,
    threshold: float, num_ranks: float, rate: float,
) -> None:  # fmt: skip
    """fl(τ·c)/N/lr of one part; indices and counts of rank k lie from begins[k] (which moves) to ends[k]."""
    stops, values = begins.copy(), sums[:0]
    for start in range(0, sums.size, SEGMENT):
        segment = sums[start : start + SEGMENT]
        segment[:] = 0
        place = first + start
        for rank in range(begins.size):
            k = begins[rank]
            while k < ends[rank] and indices[k] - place < segment.size:
                segment[indices[k] - place] += counts[k]
                k += 1
            stops[rank] = k
        length = (stops - begins).sum()
        if length > values.size:
            values = np.empty(2 * length, sums.dtype)
        # What several ranks sent is read several times before it is first overwritten.
        length = 0
        for rank in range(begins.size):
            for k in range(begins[rank], stops[rank]):
                values[length] = segment[indices[k] - place] * threshold / num_ranks / rate
                length += 1
        length = 0
        for rank in range(begins.size):
            for k in range(begins[rank], stops[rank]):
                segment[indices[k] - place] = values[length]
                length += 1
            begins[rank] = stops[rank]
