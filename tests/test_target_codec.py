"""Laws of the compact coding; the oracle writes and reads the bits of docs/store.md one by one."""
# T frames, S senones, K kept

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.targets.target_codec import (
    IMPOSSIBLE,
    LEVELS_PER_NAT,
    MAX_DROPPED_ERROR,
    MAX_LEVEL_ERROR_NATS,
    encode,
)
from teacherstudent.targets.target_codec import decode as decode_many


def decode(record, k, num_senones):
    return decode_many(record, np.array([0, len(record)]), k, num_senones)[0]


def rice(step, parameter):
    zeros = step >> parameter
    if zeros < 10:
        return "0" * zeros + "1" + number(step & ((1 << parameter) - 1), parameter)
    return "0" * 10 + number(step, 11)


def number(value, width):
    """The lowest bit first."""
    return "".join(str(value >> bit & 1) for bit in range(width))


def quantise(ids, log_posteriors):
    """Senones with levels, by level and then by senone, of each frame."""
    frames = []
    for row, values in zip(ids.tolist(), log_posteriors.tolist()):
        below = [(values[0] - value) * LEVELS_PER_NAT for value in values]
        levels = [IMPOSSIBLE if x >= IMPOSSIBLE else int(np.rint(x)) for x in below]
        frames.append(sorted(zip(levels, row)))
    return frames


def oracle_encode(ids, log_posteriors, dropped, num_senones):
    k = ids.shape[1]
    id_bits, rank_bits = math.ceil(math.log2(num_senones)), math.ceil(math.log2(k))
    frames = quantise(ids, log_posteriors)
    steps = [[b[0] - a[0] for a, b in pairwise(frame)] for frame in frames]
    columns = [[row[rank] for row in steps] for rank in range(k - 1)]
    parameters = [min(range(11), key=lambda p: sum(len(rice(s, p)) for s in column)) for column in columns]
    flags = names = ""
    stream = "".join(number(parameter, 4) for parameter in parameters)
    before = []
    for place, (frame, row) in enumerate(zip(frames, steps)):
        if place:
            flags += "".join(str(int(senone in before)) for _, senone in frame)
        for _, senone in frame:
            known = senone in before
            names += number(before.index(senone), rank_bits) if known else number(senone, id_bits)
        stream += "".join(rice(step, parameter) for step, parameter in zip(row, parameters))
        before = [senone for _, senone in frame]
    codes = bytes(int(np.rint(np.sqrt(np.float32(x)) * 255)) for x in dropped)
    sizes = len(ids).to_bytes(4, "little") + len(as_bytes(names)).to_bytes(4, "little")
    return sizes + codes + as_bytes(flags) + as_bytes(names) + as_bytes(stream)


def as_bytes(bits):
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


def make(num_frames, num_senones, k, seed, spread=4.0, tied=False, impossible=0.0):
    """ids and log-posteriors (T, K), the highest first and of equals the lower senone, and what they leave (T,)."""
    draw = np.random.default_rng(seed)
    walk = (
        np.cumsum(draw.normal(size=(num_frames, num_senones)), axis=0)
        if num_frames
        else np.zeros((0, num_senones))
    )
    logits = spread * (walk / np.sqrt(np.arange(1, num_frames + 1))[:, None])
    if tied:
        logits = np.rint(logits)
    logits[draw.random(logits.shape) < impossible] = -np.inf
    logits[:, draw.integers(num_senones)] = 0.5
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(logits, ids, axis=1)
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    best = best - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return ids, best.astype(np.float32), np.clip(1 - np.exp(best).sum(axis=1), 0, 1).astype(np.float32)


cases = st.integers(1, 90).flatmap(
    lambda num_senones: st.tuples(
        st.integers(0, 12),
        st.just(num_senones),
        st.integers(1, num_senones),
        st.integers(0, 999),
        st.sampled_from([0.0, 0.05, 4.0, 60.0, 3000.0]),
        st.booleans(),
        st.sampled_from([0.0, 0.5]),
    )
)


@given(cases)
@settings(max_examples=120, deadline=None)
def test_a_record_is_bit_for_bit_that_of_the_oracle_and_says_what_was_written(case):
    num_senones, k = case[1:3]
    ids, log_posteriors, dropped = make(*case)
    record = encode(ids, log_posteriors, dropped, num_senones)
    assert record.tobytes() == oracle_encode(ids, log_posteriors, dropped, num_senones)
    check(decode(record, k, num_senones), ids, log_posteriors, dropped)


def check(got, ids, log_posteriors, dropped):
    assert (got.ids.dtype, got.log_posteriors.dtype, got.dropped.dtype) == (np.int32, np.float32, np.float32)
    frames = quantise(ids, log_posteriors)
    assert got.ids.tolist() == [[senone for _, senone in frame] for frame in frames]
    levels = np.array([[level for level, _ in frame] for frame in frames]).reshape(ids.shape)
    relative = np.where(levels < IMPOSSIBLE, -levels / LEVELS_PER_NAT, -np.inf)
    whole = relative - np.log(np.exp(relative).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got.log_posteriors, whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.dropped, dropped, atol=MAX_DROPPED_ERROR)


@pytest.mark.parametrize(
    ("num_frames", "num_senones", "k"),
    [(1, 1, 1), (5, 1, 1), (0, 3000, 20), (1, 3000, 20), (30, 65_536, 20), (9, 70_000, 33), (2, 3000, 3000)],
)
def test_extreme_sizes_come_back(num_frames, num_senones, k):
    ids, log_posteriors, dropped = make(num_frames, num_senones, k, seed=1)
    check(
        decode(encode(ids, log_posteriors, dropped, num_senones), k, num_senones),
        ids,
        log_posteriors,
        dropped,
    )


def test_the_errors_are_within_what_the_header_states_and_the_bounds_are_not_idle():
    ids, log_posteriors, dropped = make(3000, 200, 20, seed=3)
    got = decode(encode(ids, log_posteriors, dropped, 200), 20, 200)
    by_id = np.argsort(ids, axis=1), np.argsort(got.ids, axis=1)
    wide = log_posteriors.astype(np.float64)
    true = np.take_along_axis(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)), by_id[0], axis=1)
    stored = np.take_along_axis(got.log_posteriors.astype(np.float64), by_id[1], axis=1)
    top = np.take_along_axis(true, true.argmax(axis=1)[:, None], axis=1)
    anchor = stored.max(axis=1, keepdims=True)
    error = np.abs((stored - anchor) - (true - top)).max()
    assert 0.95 * MAX_LEVEL_ERROR_NATS < error <= MAX_LEVEL_ERROR_NATS + 1e-5
    assert np.abs(stored - true).max() <= 2 * MAX_LEVEL_ERROR_NATS
    divergence = (np.exp(true) * (true - stored)).sum(axis=1)
    assert divergence.max() <= (2 * MAX_LEVEL_ERROR_NATS) ** 2 / 8
    assert divergence.mean() <= 2e-4


def test_every_dropped_mass_is_off_by_no_more_than_the_bound():
    masses = np.linspace(0, 1, 20_001, dtype=np.float32)
    ids, zeros = np.zeros((len(masses), 1), np.int64), np.zeros((len(masses), 1), np.float32)
    got = decode(encode(ids, zeros, masses, 1), 1, 1).dropped
    assert 0.99 * MAX_DROPPED_ERROR < np.abs(got - masses).max() <= MAX_DROPPED_ERROR
    assert got[0] == 0 and got[-1] == 1


def test_values_far_below_the_highest_are_impossible_and_those_above_are_not():
    ids = np.arange(4)[None]
    got = decode(encode(ids, np.float32([[0, -127.8, -128, -np.inf]]), np.zeros(1, np.float32), 9), 4, 9)
    assert got.log_posteriors.tolist() == [[0, pytest.approx(-127.8, abs=1 / 32), -np.inf, -np.inf]]


@given(st.binary(max_size=200), st.integers(1, 70), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_record_are_refused_or_read_as_some_possible_targets(data, k, num_frames):
    num_senones = 100
    for record in (data, num_frames.to_bytes(4, "little") + bytes(data[:1]) + b"\0\0\0" + data):
        try:
            got = decode(np.frombuffer(record, np.uint8), k, num_senones)
        except ValueError:
            continue
        assert ((got.ids >= 0) & (got.ids < num_senones)).all()
        np.testing.assert_allclose(np.exp(got.log_posteriors).sum(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("parameter", [0, 1, 2, 3])
def test_long_steps_and_escapes_come_back_wherever_in_a_word_they_lie(parameter):
    """In most frames steps are short, so that the parameter is low; in some, as long as it allows, and one longer."""
    draw = np.random.default_rng(parameter)
    num_frames, num_senones, k = 800, 32, 12
    usual, longest = (1 << parameter) - 1, (10 << parameter) - 1
    steps = np.full((num_frames, k - 1), usual)
    steps[::8] = draw.choice([usual, longest, longest + 1], (num_frames // 8, k - 1), p=[0.1, 0.85, 0.05])
    steps[np.arange(0, num_frames, 8), draw.integers(0, k - 1, num_frames // 8)] = 1100
    levels = np.concatenate([np.zeros((num_frames, 1), int), steps.cumsum(axis=1)], axis=1)
    ids = np.sort(draw.permuted(np.tile(np.arange(num_senones), (num_frames, 1)), axis=1)[:, :k], axis=1)
    values, dropped = (-levels / LEVELS_PER_NAT).astype(np.float32), np.zeros(num_frames, np.float32)
    record = encode(ids, values, dropped, num_senones)
    assert record.tobytes() == oracle_encode(ids, values, dropped, num_senones)
    check(decode(record, k, num_senones), ids, values, dropped)


def test_many_records_end_to_end_decode_as_each_alone():
    pieces = [make(num_frames, 300, 20, seed=num_frames) for num_frames in (9, 0, 1, 40)]
    records = [encode(*piece, 300) for piece in pieces]
    offsets = np.cumsum([0, *map(len, records)])
    together, frames = decode_many(np.concatenate(records), offsets, 20, 300)
    assert frames.tolist() == [0, 9, 9, 10, 50]
    alone = [decode(record, 20, 300) for record in records]
    for got, parts in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(got, np.concatenate(parts))


def test_a_record_cut_short_or_with_bytes_added_is_refused():
    record = encode(*make(20, 300, 20, seed=0), 300)
    for length in range(len(record)):
        with pytest.raises(ValueError, match=r"too short for the frames|bytes are not 20 frames"):
            decode(record[:length], 20, 300)
    with pytest.raises(ValueError, match=r"its .* bytes are not 20 frames of 20 of 300 senones"):
        decode(np.append(record, np.uint8(0)), 20, 300)


def test_a_senone_that_there_is_not_is_refused():
    ids = np.array([[3, 127]])
    record = encode(ids, np.zeros((1, 2), np.float32), np.zeros(1, np.float32), 128)
    assert decode(record, 2, 128).ids.tolist() == [[3, 127]]
    with pytest.raises(ValueError, match=r"not 1 frames of 2 of 127 senones"):  # 7 bits an id, too
        decode(record, 2, 127)


@pytest.mark.parametrize(("second", "possible"), [(547, True), (548, False)])
def test_a_level_beyond_the_last_is_refused(second, possible):
    names = number(4, 4) + number(1, 4) + number(2, 4)
    steps = number(0, 4) * 2 + rice(1500, 0) + rice(second, 0)
    data = bytes([1, 0, 0, 0, 2, 0, 0, 0, 7]) + as_bytes(names) + as_bytes(steps)
    record = np.frombuffer(data, np.uint8)
    if possible:
        got = decode(record, 3, 9)
        assert got.ids.tolist() == [[4, 1, 2]]
        assert got.log_posteriors.tolist() == [[0, -1500 / 16, -np.inf]]
    else:
        with pytest.raises(ValueError, match="not 1 frames of 3 of 9 senones"):
            decode(record, 3, 9)
