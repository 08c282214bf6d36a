import itertools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from teacherstudent.config import Senones
from teacherstudent.senones import (
    NUM_TREE_FEATURES,
    PRIOR_FLOOR,
    Inventory,
    Statistics,
    build,
    frame_events,
    tree_features,
)

PHONES = ("SIL", "A", "B", "C", "D", "E", "F")
NUM_PHONES = len(PHONES)


def spoken(seed, num_phones=NUM_PHONES, num_utterances=60, length=12):
    """Utterances of random phones of one to three frames, with silence at both ends."""
    generator = np.random.default_rng(seed)
    for _ in range(num_utterances):
        phones = [1, *generator.integers(1, num_phones + 1, length), 1]
        durations = generator.integers(1, 4, len(phones))
        first = np.zeros(durations.sum(), dtype=bool)
        first[np.cumsum(durations) - durations] = True
        yield np.repeat(phones, durations), first


def statistics_of(utterances, emit, num_phones=NUM_PHONES, num_features=3):
    """emit(event) gives the features of a frame."""
    statistics = Statistics(num_phones, num_features)
    for phone, first in utterances:
        features = np.array([emit(tuple(event)) for event in frame_events(phone, first).tolist()])
        statistics.accumulate(features, phone, first)
    return statistics


def random_statistics(seed, num_utterances=60):
    generator = np.random.default_rng([seed, 1])
    means = generator.normal(size=(8, 8, 8, 2, 3))
    return statistics_of(
        spoken(seed, num_utterances=num_utterances), lambda event: means[event] + generator.normal(size=3)
    )


@pytest.fixture(scope="module")
def inventory():
    return build(random_statistics(0), PHONES, Senones(target=40, min_count=8, min_gain=1.0))


def every_triphone(num_phones=NUM_PHONES):
    contexts, centres = range(num_phones + 1), range(1, num_phones + 1)
    return np.array(list(itertools.product(contexts, centres, contexts, (0, 1))))


# -- features and events -------------------------------------------------------------------------------------


def test_tree_features_are_the_orthonormal_dct_of_the_mean_and_slope_of_the_stacked_frames():
    stacked = np.random.default_rng(0).normal(size=(5, 192))
    frames = stacked.reshape(5, 3, 64)
    mean = frames.sum(axis=1) / np.sqrt(3)
    slope = (frames[:, 2] - frames[:, 0]) / np.sqrt(2)
    expected = np.concatenate([dct(part, norm="ortho")[:, :13] for part in (mean, slope)], axis=1)
    assert expected.shape[1] == NUM_TREE_FEATURES
    np.testing.assert_allclose(tree_features(stacked), expected, atol=1e-12)


def test_an_utterance_without_frames_has_no_features_events_or_labels(inventory):
    assert tree_features(np.zeros((0, 192))).shape == (0, NUM_TREE_FEATURES)
    assert frame_events([], []).shape == (0, 4)
    assert inventory.label([], []).shape == (0,)


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
    generator = np.random.default_rng(3)
    frames = {}
    statistics = Statistics(len(PHONES), 2)
    for phone, first in spoken(3, num_utterances=10):
        features = generator.normal(size=(len(phone), 2))
        statistics.accumulate(features, phone, first)
        for event, values in zip(frame_events(phone, first).tolist(), features):
            frames.setdefault(tuple(event), []).append(values)
    events, moments = statistics.events()
    assert [tuple(event) for event in events.tolist()] == sorted(frames)
    for event, row in zip(events.tolist(), moments):
        values = np.array(frames[tuple(event)])
        np.testing.assert_allclose(row, [len(values), *values.sum(0), *(values**2).sum(0)])
    assert statistics.num_frames == sum(map(len, frames.values()))


def test_features_of_another_length_than_their_phones_are_refused():
    with pytest.raises(ValueError, match="3 phones"):
        Statistics(3, 2).accumulate(np.zeros((4, 2)), [1, 1, 1], [True, False, False])


def test_a_phone_id_that_the_phone_table_lacks_is_refused(inventory):
    with pytest.raises(ValueError, match="phone id 4"):
        Statistics(3, 2).accumulate(np.zeros((1, 2)), [4], [True])
    with pytest.raises(ValueError, match="phone id 8"):
        inventory.senone(1, 2, 8, 0)
    with pytest.raises(ValueError, match="phone id 0"):
        inventory.senone(1, 0, 1, 0)
    with pytest.raises(ValueError, match="states 0 and 1"):
        inventory.senone(1, 2, 3, 2)


# -- the tree against known truth --------------------------------------------------------------------------------


def test_data_drawn_from_a_known_tying_is_recovered():
    """A's first frame depends on whether C or D follows, its later frames on whether E or F came before."""
    generator = np.random.default_rng(7)
    own = {1: (0, 0), 2: (9, 0), 3: (0, 9), 4: (20, 0), 5: (20, 1), 6: (0, 30), 7: (1, 30)}

    def emit(event):
        left, centre, right, state = event
        shift = 0.0
        if centre == 2:
            shift = 4.0 * (right in (4, 5)) if state == 0 else 4.0 * (left in (6, 7))
        return np.array([*own[centre], shift + 5 * state]) + 0.3 * generator.normal(size=3)

    statistics = statistics_of(spoken(7, num_utterances=150), emit)
    inventory = build(statistics, PHONES, Senones(target=100, min_count=10, min_gain=60.0))
    assert inventory.num_senones == 2 * len(PHONES) + 2
    events = every_triphone()
    truth = [
        (event[1], event[3], event[1] == 2 and (event[2] in (4, 5) if event[3] == 0 else event[0] in (6, 7)))
        for event in events.tolist()
    ]
    pairs = set(zip(truth, inventory.senones(events).tolist()))
    assert len(pairs) == inventory.num_senones  # one senone for each true class, and the other way round


# -- the inventory ------------------------------------------------------------------------------------------------


def test_every_triphone_seen_or_not_has_a_senone_and_every_senone_a_triphone(inventory):
    events = every_triphone()
    senones = inventory.senones(events)
    assert set(senones.tolist()) == set(range(inventory.num_senones))
    assert [inventory.senone(*event) for event in events[::37].tolist()] == senones[::37].tolist()


def test_silence_knows_no_neighbours_and_shares_no_senone(inventory):
    events = every_triphone()
    senones, silent = inventory.senones(events), events[:, 1] == 1
    assert len(set(senones[silent])) == 2
    assert not set(senones[silent]) & set(senones[~silent])


@pytest.mark.parametrize(("target", "min_count"), [(14, 8), (25, 8), (300, 30), (300, 60)])
def test_the_target_and_the_minimum_count_are_honoured(target, min_count):
    utterances = list(spoken(5))
    generator = np.random.default_rng(5)
    means = generator.normal(size=(8, 8, 8, 2, 3))
    statistics = statistics_of(utterances, lambda event: means[event] + generator.normal(size=3))
    inventory = build(statistics, PHONES, Senones(target=target, min_count=min_count, min_gain=0.0))
    counts = np.bincount(np.concatenate([inventory.label(*utterance) for utterance in utterances]))
    assert len(counts) == inventory.num_senones <= target
    assert counts.min() >= min_count
    assert inventory.provenance["leaves_before_merging"] == target or target == 300


def test_a_label_is_the_senone_of_the_frames_event(inventory):
    phone, first = next(iter(spoken(9)))
    expected = [inventory.senone(*event) for event in frame_events(phone, first).tolist()]
    labels = inventory.label(phone, first)
    assert labels.tolist() == expected
    assert labels.dtype == np.int32


def test_phones_too_rare_for_a_senone_share_the_nearest_phones_and_a_warning_names_them():
    generator = np.random.default_rng(2)
    utterances = [pair for pair in spoken(2, num_phones=5) if len(pair[0])]
    utterances.append((np.array([1, 6, 6, 1]), np.array([True, True, False, True])))
    means = {1: 0.0, 2: 5.0, 3: 10.0, 4: 15.0, 5: 20.0, 6: 15.1}
    statistics = statistics_of(
        utterances, lambda event: means[event[1]] + event[3] + generator.normal(size=3) * 0.1
    )
    with pytest.warns(UserWarning, match=r"E with C.*F with"):
        inventory = build(statistics, PHONES, Senones(target=100, min_count=20, min_gain=1.0))
    events = every_triphone()
    of_c, of_e, of_f, of_silence = (
        set(inventory.senones(events[events[:, 1] == phone]).tolist()) for phone in (4, 6, 7, 1)
    )
    assert of_e <= of_c
    assert not of_f & of_silence


def test_building_does_not_depend_on_the_order_of_the_utterances():
    utterances = list(spoken(11))
    texts = []
    for order in (1, -1):
        statistics = statistics_of(utterances[::order], lambda event: np.array(event)[1:] % 5 * 1.0)
        texts.append(build(statistics, PHONES, Senones(target=40, min_count=8, min_gain=0.1)).sha256)
    assert texts[0] == texts[1]


def test_a_target_below_the_number_of_roots_and_no_frames_at_all_are_errors():
    with pytest.raises(ValueError, match="at least 14 senones"):
        build(random_statistics(0), PHONES, Senones(target=13, min_count=8))
    with pytest.raises(ValueError, match="no aligned frames"):
        build(Statistics(len(PHONES), 3), PHONES, Senones())
    with pytest.raises(ValueError, match="frames of speech are aligned"):
        build(random_statistics(0), PHONES, Senones(min_count=10**6))
    with pytest.raises(ValueError, match="need 7, all different"):
        build(random_statistics(0), PHONES[:-1], Senones())


def test_priors_are_shares_of_the_frames_with_a_floor(inventory):
    counts = np.full(inventory.num_senones, 100)
    counts[3] = 0
    priors = inventory.with_priors(counts).priors
    assert priors.sum() == pytest.approx(1)
    uniform = 1 / inventory.num_senones
    assert priors[3] == pytest.approx(PRIOR_FLOOR * uniform, rel=0.02)
    assert priors[4] / priors[5] == 1
    np.testing.assert_allclose(np.exp(inventory.with_priors(counts).log_priors), priors, rtol=1e-6)
    with pytest.raises(ValueError, match="count of frames for each"):
        inventory.with_priors(counts[1:])


def test_an_inventory_survives_being_written_and_read(inventory, tmp_path):
    weighted = inventory.with_priors(np.arange(inventory.num_senones) + 1)
    weighted.save(tmp_path / "one.json")
    read = Inventory.load(tmp_path / "one.json")
    read.save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert read.sha256 == weighted.sha256 != inventory.sha256
    assert read.phones == PHONES
    np.testing.assert_array_equal(read.priors, weighted.priors)
    np.testing.assert_array_equal(read.senones(every_triphone()), inventory.senones(every_triphone()))


def test_what_is_no_inventory_or_a_damaged_one_is_refused_by_name(inventory, tmp_path):
    path = tmp_path / "inventory.json"
    with pytest.raises(ValueError, match=r"no senone inventory at .*inventory.json"):
        Inventory.load(path)
    for text, what in (("}", "is not a senone inventory"), ('{"a": 1}', "does not say format")):
        path.write_text(text)
        with pytest.raises(ValueError, match=what):
            Inventory.load(path)
    inventory.save(path)
    values = json.loads(path.read_text())
    for change, what in (
        ({"version": 99}, "version 99"),
        ({"num_senones": 5}, "sha256"),
        ({"nodes": None}, "damaged"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=what):
            Inventory.load(path)


def test_ordinary_data_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(random_statistics(0), PHONES, Senones(target=40, min_count=8, min_gain=1.0))
