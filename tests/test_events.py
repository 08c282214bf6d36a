import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from teacherstudent.tying.events import (
    NUM_TREE_FEATURES,
    Statistics,
    check_phones,
    frame_events,
    tree_features,
)

NUM_PHONES = 7


def spoken(seed, num_utterances):
    """Utterances of random phones of one to three frames, with their features."""
    generator = np.random.default_rng(seed)
    for _ in range(num_utterances):
        phones = generator.integers(1, NUM_PHONES + 1, 12)
        durations = generator.integers(1, 4, len(phones))
        first = np.zeros(durations.sum(), dtype=bool)
        first[np.cumsum(durations) - durations] = True
        yield generator.normal(size=(len(first), 2)), np.repeat(phones, durations), first


def test_tree_features_are_the_orthonormal_dct_of_the_mean_and_slope_of_the_stacked_frames():
    stacked = np.random.default_rng(0).normal(size=(5, 192))
    frames = stacked.reshape(5, 3, 64)
    mean = frames.sum(axis=1) / np.sqrt(3)
    slope = (frames[:, 2] - frames[:, 0]) / np.sqrt(2)
    expected = np.concatenate([dct(part, norm="ortho")[:, :13] for part in (mean, slope)], axis=1)
    assert expected.shape[1] == NUM_TREE_FEATURES
    np.testing.assert_allclose(tree_features(stacked), expected, atol=1e-12)


def test_an_utterance_without_frames_has_no_features_and_no_events():
    assert tree_features(np.zeros((0, 192))).shape == (0, NUM_TREE_FEATURES)
    assert frame_events([], []).shape == (0, 4)
    statistics = Statistics(3, 2)
    statistics.accumulate(np.zeros((0, 2)), [], [])
    assert statistics.num_frames == 0
    assert statistics.events()[0].shape == (0, 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=10))
def test_a_frame_belongs_to_the_triphone_of_its_segment_and_only_the_first_has_state_0(segments):
    expected = []
    for index, (phone, duration) in enumerate(segments):
        left = segments[index - 1][0] if index else 0
        right = segments[index + 1][0] if index + 1 < len(segments) else 0
        left, right = (0, 0) if phone == 1 else (left, right)
        expected += [[left, phone, right, min(frame, 1)] for frame in range(duration)]
    phone = [phone for phone, duration in segments for _ in range(duration)]
    first = [frame == 0 for _, duration in segments for frame in range(duration)]
    assert frame_events(phone, first).tolist() == expected


def test_a_cut_that_begins_within_a_phone_begins_in_its_later_state():
    assert frame_events([2, 2, 3], [False, False, True]).tolist() == [
        [0, 2, 3, 1],
        [0, 2, 3, 1],
        [2, 3, 0, 0],
    ]


def test_a_phone_that_changes_without_a_first_frame_is_an_error_naming_the_frame():
    with pytest.raises(ValueError, match="frame 2"):
        frame_events([2, 2, 3], [True, False, False])


def test_statistics_are_the_count_sum_and_sum_of_squares_of_each_event():
    frames = {}
    statistics = Statistics(NUM_PHONES, 2)
    for features, phone, first in spoken(3, num_utterances=10):
        statistics.accumulate(features, phone, first)
        for event, values in zip(frame_events(phone, first).tolist(), features):
            frames.setdefault(tuple(event), []).append(values)
    events, moments = statistics.events()
    assert [tuple(event) for event in events.tolist()] == sorted(frames)
    for event, row in zip(events.tolist(), moments):
        values = np.array(frames[tuple(event)])
        np.testing.assert_allclose(row, [len(values), *values.sum(0), *(values**2).sum(0)])
    assert statistics.num_frames == sum(map(len, frames.values()))


def test_statistics_that_were_pickled_and_merged_are_those_of_all_utterances():
    utterances = list(spoken(4, num_utterances=150))  # more events than there is room for at first
    whole, merged = Statistics(NUM_PHONES, 2), Statistics(NUM_PHONES, 2)
    for shard in (utterances[:100], utterances[100:100], utterances[100:]):
        part = Statistics(NUM_PHONES, 2)
        for utterance in shard:
            whole.accumulate(*utterance)
            part.accumulate(*utterance)
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert len(whole.events()[0]) > 500
    np.testing.assert_array_equal(merged.events()[0], whole.events()[0])
    np.testing.assert_allclose(merged.events()[1], whole.events()[1], rtol=1e-12)
    assert merged.num_frames == whole.num_frames
    assert (merged.events()[1][:, 0] == whole.events()[1][:, 0]).all()


def test_features_of_another_length_than_their_phones_are_refused():
    with pytest.raises(ValueError, match="3 phones"):
        Statistics(3, 2).accumulate(np.zeros((4, 2)), [1, 1, 1], [True, False, False])


def test_a_phone_id_that_the_phone_table_lacks_is_refused():
    with pytest.raises(ValueError, match="phone id 4"):
        Statistics(3, 2).accumulate(np.zeros((1, 2)), [4], [True])
    with pytest.raises(ValueError, match="phone id 0"):
        check_phones(np.array([0, 1]), 3)
    check_phones(np.array([0, 3]), 3, lowest=0)
