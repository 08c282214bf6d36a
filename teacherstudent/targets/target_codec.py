"""The compact coding of targets: one record an utterance, about 32 bytes a frame at 20 of 3,000 senones.

Half of a frame's senones were among those of the frame before: they are named by their place there, in 5 bits
instead of 12. Log-posteriors fall with the rank, so only the small steps from rank to rank are written, in
sixteenths of a nat, each in a Rice code (R. F. Rice, "Some Practical Universal Noiseless Coding Techniques", 1979).
docs/store.md describes a record bit by bit; the kernels here are compiled when they are first called.
"""
# T frames, S senones, K kept

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

LEVELS_PER_NAT = 16  # a level is 1/16 nat below the highest log-posterior of the frame
IMPOSSIBLE = 2047  # the level of posterior zero; 128 nats below the highest, float32 knows no difference
MAX_LEVEL_ERROR_NATS = 1 / (2 * LEVELS_PER_NAT)  # of a log-posterior relative to the frame's highest
DROPPED_STEPS = 255  # the dropped mass is written as the nearest (code / 255)²
# halfway between two codes c and c + 1, the squares are apart by no more than this
MAX_DROPPED_ERROR = 1 - (1 - 0.5 / DROPPED_STEPS) ** 2

_HEAD_BYTES = 8
_NUM_FRAMES_BYTES = 4
_PARAMETER_BITS = 4
_MAX_PARAMETER = 10
_ESCAPE_ZEROS = 10  # so many zeros, and the step follows as it is
_LEVEL_BITS = 11
_STEP_BITS = _ESCAPE_ZEROS + _LEVEL_BITS  # no step takes more
_PEEKED_BYTES = 8
_PEEKED_BITS = 57  # of theirs: the first one may be anywhere in its byte

# by level: log-posterior and posterior, relative to the highest
_NATS = (-np.arange(IMPOSSIBLE + 1) / LEVELS_PER_NAT).astype(np.float32)
_NATS[IMPOSSIBLE] = -np.inf
_RELATIVE = np.exp(_NATS.astype(np.float64))
_DROPPED = ((np.arange(DROPPED_STEPS + 1) / DROPPED_STEPS) ** 2).astype(np.float32)  # by code


class Decoded(NamedTuple):
    """The targets of frames, the most probable senone first; of equals the lower one."""

    ids: NDArray[np.int32]  # (T, K)
    log_posteriors: NDArray[np.float32]  # (T, K), renormalised
    dropped: NDArray[np.float32]  # (T,)

    def frames(self, start: int, stop: int) -> "Decoded":
        """A part of them, in the same memory."""
        return Decoded(self.ids[start:stop], self.log_posteriors[start:stop], self.dropped[start:stop])


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By numba, at the first call; the machine code is kept between processes where a folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no such folder
        return numba.njit(nogil=True)(function)


def encode(
    ids: NDArray[Any], log_posteriors: NDArray[np.float32], dropped: NDArray[np.float32], num_senones: int
) -> NDArray[np.uint8]:
    """The record of an utterance: ids and log_posteriors (T, K) by falling posterior, dropped (T,) in [0, 1].

    A log-posterior more than 127.9 nats below the highest of its frame is written as -inf.
    """
    num_frames, k = ids.shape
    levels = _quantise(log_posteriors)
    order = np.argsort(levels.astype(np.int64) << 32 | ids, axis=1)  # rounding makes equals: by senone again
    ids = np.take_along_axis(ids, order, axis=1).astype(np.int64)
    levels = np.take_along_axis(levels, order, axis=1)
    id_bits, rank_bits = _bits(num_senones), _bits(k)
    flags = np.zeros((max(num_frames - 1, 0), k), bool)
    id_words = np.zeros(num_frames * k * max(id_bits, rank_bits) // 64 + 2, np.uint64)
    step_words = np.zeros((_PARAMETER_BITS * k + num_frames * k * _STEP_BITS) // 64 + 2, np.uint64)
    last_rank = np.zeros(num_senones, np.int64)
    num_id_bits = _encode_ids(ids, id_bits, rank_bits, last_rank, flags, id_words)
    num_step_bits = _encode_steps(np.diff(levels, axis=1), step_words)
    names = _as_bytes(id_words, num_id_bits)
    sizes = np.array([num_frames, len(names)], "<u4")
    codes = np.rint(np.sqrt(np.clip(dropped, 0, 1)) * DROPPED_STEPS).astype(np.uint8)
    known = np.packbits(flags, bitorder="little")
    return np.concatenate([sizes.view(np.uint8), codes, known, names, _as_bytes(step_words, num_step_bits)])


def decode(
    records: NDArray[np.uint8], offsets: NDArray[np.int64], k: int, num_senones: int
) -> tuple[Decoded, NDArray[np.int64]]:
    """The frames of N records end to end, and where each record's begin (N + 1,); record n lies at offsets[n] to
    offsets[n + 1].

    Raises ValueError if one of them is no record of k of num_senones senones, without reading beyond it or taking
    more memory than records of that length can need.
    """
    frames = np.zeros(len(offsets), np.int64)
    if _count_frames(records, offsets, frames) >= 0:
        raise ValueError("it is too short for the frames that it announces")
    total = int(frames[-1])
    id_bits, rank_bits = _bits(num_senones), _bits(k)
    # the kernel looks where it is after each frame: one more than there is must not lead beyond the end
    widest = max(id_bits, rank_bits, _ESCAPE_ZEROS + 2**_PARAMETER_BITS) + _PARAMETER_BITS
    spare = -(-k * widest // 8) + _PEEKED_BYTES
    data = np.concatenate([records, np.zeros(spare, np.uint8)])
    decoded = Decoded(
        np.empty((total, k), np.int32), np.empty((total, k), np.float32), np.empty(total, np.float32)
    )
    sizes = (id_bits, rank_bits, num_senones)
    wrong = _decode(data, offsets, frames, sizes, (_NATS, _RELATIVE), _DROPPED, *decoded)
    if wrong >= 0:
        num_frames, num_bytes = frames[wrong + 1] - frames[wrong], offsets[wrong + 1] - offsets[wrong]
        raise ValueError(f"its {num_bytes} bytes are not {num_frames} frames of {k} of {num_senones} senones")
    return decoded, frames


def _quantise(log_posteriors: NDArray[np.float32]) -> NDArray[np.int64]:
    """(T, K) levels below the highest of each frame."""
    below = (log_posteriors[:, :1].astype(np.float64) - log_posteriors) * LEVELS_PER_NAT
    levels = np.rint(np.minimum(below, IMPOSSIBLE))
    return levels.astype(np.int64)


def _bits(count: int) -> int:
    """So many bits tell `count` things apart."""
    return (count - 1).bit_length()


def _as_bytes(words: NDArray[np.uint64], num_bits: int) -> NDArray[np.uint8]:
    return words.astype("<u8").view(np.uint8)[: -(-int(num_bits) // 8)]


# ---- kernels. Everything is uint64: numba makes a float of uint64 with int64.


@intrinsic
def _count_zeros(typing_context: Any, word: Any) -> Any:
    """Zeros below the lowest one of a uint64 that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return numba.uint64(numba.uint64), generate


@intrinsic
def _load(typing_context: Any, data: Any, place: Any) -> Any:
    """The uint64 of the 8 bytes from a place in uint8 data on, the lowest first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.gep(array.data, [arguments[1]])
        return builder.load(builder.bitcast(pointer, ir.IntType(64).as_pointer()), align=1)

    return numba.uint64(data, numba.uint64), generate


@_compiled
def _peek(data, position):  # type: ignore[no-untyped-def]
    """At least 57 bits from a position on."""
    word: Any = _load(data, position >> np.uint64(3))  # type: ignore[call-arg]
    return word >> (position & np.uint64(7))


@_compiled
def _put(words, position, value, width):  # type: ignore[no-untyped-def]
    """Write `width` bits, at most 64, and return the position after them."""
    word, shift = position >> np.uint64(6), position & np.uint64(63)
    words[word] |= value << shift
    if shift + width > np.uint64(64):
        words[word + np.uint64(1)] |= value >> (np.uint64(64) - shift)
    return position + width


@_compiled
def _best_parameter(steps):  # type: ignore[no-untyped-def]
    """The Rice parameter under which these steps take the fewest bits; of equals the lower one."""
    best, fewest = 0, -1
    for parameter in range(_MAX_PARAMETER + 1):
        bits = 0
        for step in steps:
            zeros = step >> parameter
            bits += zeros + 1 + parameter if zeros < _ESCAPE_ZEROS else _STEP_BITS
        if fewest < 0 or bits < fewest:
            best, fewest = parameter, bits
    return best


@_compiled
def _encode_ids(ids, id_bits, rank_bits, last_rank, flags, words):  # type: ignore[no-untyped-def]
    """ids (T, K), flags (T - 1, K); returns the number of bits. `last_rank` (S,) is scratch: 1 + the rank that a senone
    had in the frame before, 0 if it was not among its K.
    """
    num_frames, k = ids.shape
    position, id_width, rank_width = np.uint64(0), np.uint64(id_bits), np.uint64(rank_bits)
    for frame in range(num_frames):
        for rank in range(k):
            senone = np.int64(ids[frame, rank])
            known = last_rank[senone] > 0
            if frame:
                flags[frame - 1, rank] = known
            if known:
                position = _put(words, position, np.uint64(last_rank[senone] - 1), rank_width)
            else:
                position = _put(words, position, np.uint64(senone), id_width)
        if frame:
            for rank in range(k):
                last_rank[np.int64(ids[frame - 1, rank])] = 0
        for rank in range(k):
            last_rank[np.int64(ids[frame, rank])] = rank + 1
    return position


@_compiled
def _encode_steps(steps, words):  # type: ignore[no-untyped-def]
    """Steps (T, K - 1) from rank to rank; returns the number of bits."""
    num_frames, num_steps = steps.shape
    position, one = np.uint64(0), np.uint64(1)
    parameters = np.zeros(num_steps, np.uint64)
    for rank in range(num_steps):
        parameters[rank] = np.uint64(_best_parameter(steps[:, rank]))
        position = _put(words, position, parameters[rank], np.uint64(_PARAMETER_BITS))
    for frame in range(num_frames):
        for rank in range(num_steps):
            step, parameter = np.uint64(steps[frame, rank]), parameters[rank]
            zeros = step >> parameter
            if zeros < np.uint64(_ESCAPE_ZEROS):
                position = _put(words, position + zeros, one, one)
                position = _put(words, position, step & ((one << parameter) - one), parameter)
            else:
                position = _put(words, position + np.uint64(_ESCAPE_ZEROS), step, np.uint64(_LEVEL_BITS))
    return position


@_compiled
def _count_frames(records, offsets, frames):  # type: ignore[no-untyped-def]
    """Fills frames (N + 1,), where each record's begin; returns the first record that cannot be one, or -1."""
    for number in range(len(frames) - 1):
        start, stop = offsets[number], offsets[number + 1]
        if stop - start < _HEAD_BYTES:
            return number
        count = _read_size(records, start)
        if count > stop - start - _HEAD_BYTES:  # a frame has a byte of dropped mass at least
            return number
        frames[number + 1] = frames[number] + count
    return -1


@_compiled
def _read_size(records, place):  # type: ignore[no-untyped-def]
    size = np.int64(0)
    for byte in range(_NUM_FRAMES_BYTES):
        size |= np.int64(records[place + byte]) << (8 * byte)
    return size


@_compiled
def _decode(data, offsets, frames, sizes, tables, dropped_of, ids, log_posteriors, dropped):  # type: ignore[no-untyped-def]
    """Fills ids, log_posteriors and dropped; returns the first record that is none, or -1."""
    k = ids.shape[1]
    for number in range(len(frames) - 1):
        start, stop = offsets[number], offsets[number + 1]
        first, last = frames[number], frames[number + 1]
        count = last - first
        codes = start + _HEAD_BYTES
        flags = codes + count
        names = flags + (max(count - 1, 0) * k + 7) // 8
        steps = names + _read_size(data, start + _NUM_FRAMES_BYTES)
        if steps > stop:
            return number
        for frame in range(count):
            dropped[first + frame] = dropped_of[data[codes + frame]]
        places = (8 * flags, 8 * names, 8 * steps, 8 * stop)
        rows = ids[first:last], log_posteriors[first:last]
        if not _decode_frames(data, places, sizes, tables, *rows):
            return number
    return -1


@_compiled
def _decode_frames(data, places, sizes, tables, ids, log_posteriors):  # type: ignore[no-untyped-def]
    """One record's; False if it is none. Three streams are read at once: a processor works on them side by side."""
    nats, relative = tables
    k, totals = np.uint64(ids.shape[1]), np.empty(len(ids), np.float32)
    zero, one, lowest = np.uint64(0), np.uint64(1), np.uint64(IMPOSSIBLE)
    id_width, rank_width, escape = np.uint64(sizes[0]), np.uint64(sizes[1]), np.uint64(_ESCAPE_ZEROS)
    rank_mask, saved, escape_mask = (one << rank_width) - one, id_width - rank_width, (one << escape) - one
    flag_place, id_place, step_place = np.uint64(places[0]), np.uint64(places[1]), np.uint64(places[2])
    id_end, step_end = np.uint64(places[2]), np.uint64(places[3])
    widths, step_place = _read_widths(data, step_place, k)
    widest = max(id_width, rank_width, escape - one + widths.max())
    ranks_per_peek = np.uint64(_PEEKED_BITS) // widest
    # the senones of the frame before and of this one, in turns; a place beyond them names 0
    senones, before, here = np.zeros(np.uint64(2) << rank_width, np.int32), zero, one << rank_width
    all_ids, all_nats, row, is_later = ids.reshape(-1), log_posteriors.reshape(-1), zero, zero
    for frame in range(len(totals)):
        flags, names, steps, left, level, total = zero, zero, zero, zero, zero, 0.0
        for rank in range(k):
            if left == zero:
                flags = _peek(data, flag_place + rank) & is_later
                names, steps, left = _peek(data, id_place), _peek(data, step_place), ranks_per_peek
            left -= one
            known = zero - (flags & one)  # all bits or none: no branch that a processor would have to guess
            width = id_width - (saved & known)
            field = names & ((one << width) - one)
            flags, names, id_place = flags >> one, names >> width, id_place + width
            senone = np.uint64(senones[before + (field & rank_mask)])
            senone = field ^ ((field ^ senone) & known)
            all_ids[row + rank] = senones[here + rank] = senone
            if rank:
                if steps & escape_mask:
                    step, width = _read_step(steps, widths[rank])
                else:  # it may end beyond what was peeked: look again, now and for the next rank
                    step, left = _peek(data, step_place + escape) & lowest, zero
                    width = np.uint64(_STEP_BITS)
                steps, step_place, level = steps >> width, step_place + width, level + step
            all_nats[row + rank] = nats[level & lowest]
            total += relative[level & lowest]
        if id_place > id_end or step_place > step_end or level > lowest:
            return False
        flag_place, row, is_later = flag_place + (k & is_later), row + k, ~zero
        before, here, totals[frame] = here, before, total
    _renormalise(log_posteriors, totals)
    whole = _ends_in_byte_before(id_place, id_end) and _ends_in_byte_before(step_place, step_end)
    return whole and _highest(all_ids) < sizes[2]


@_compiled
def _renormalise(log_posteriors, totals):  # type: ignore[no-untyped-def]
    """log_posteriors (T, K) relative to the highest, whose posteriors are totals (T,) together."""
    for frame in range(len(totals)):
        log_total = np.log(totals[frame])
        for rank in range(log_posteriors.shape[1]):
            log_posteriors[frame, rank] -= log_total


@_compiled
def _highest(senones):  # type: ignore[no-untyped-def]
    highest = np.int32(0)
    for place in range(len(senones)):
        highest = max(highest, senones[place])
    return highest


@_compiled
def _read_widths(data, place, k):  # type: ignore[no-untyped-def]
    """Of each rank, the bits that follow a step's zeros: one more than its parameter."""
    widths = np.ones(k, np.uint64)
    for rank in range(1, k):
        widths[rank] += _peek(data, place) & np.uint64(15)
        place += np.uint64(_PARAMETER_BITS)
    return widths, place


@_compiled
def _read_step(window, width):  # type: ignore[no-untyped-def]
    """A step and its bits, from the lowest of a word on, which is not 0."""
    zeros = _count_zeros(window)  # type: ignore[call-arg, var-annotated]
    with_one = (zeros << width) + ((window >> zeros) & ((np.uint64(1) << width) - np.uint64(1)))
    return with_one >> np.uint64(1), zeros + width


@_compiled
def _ends_in_byte_before(place, end):  # type: ignore[no-untyped-def]
    return end - np.uint64(8) < place <= end
