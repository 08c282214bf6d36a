import itertools
import json
import warnings

import numpy as np
import pytest

from teacherstudent.config import Senones
from teacherstudent.tying.events import Statistics, frame_events
from teacherstudent.tying.questions import place_in_word, stress, variants
from teacherstudent.tying.senones import PRIOR_FLOOR, Inventory, build

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


def test_phones_and_states_that_do_not_exist_are_refused(inventory):
    for event, what in (
        ((1, 2, 8, 0), "phone id 8"),
        ((1, 0, 1, 0), "phone id 0"),
        ((1, 2, 3, 2), "states 0 and 1"),
    ):
        with pytest.raises(ValueError, match=what):
            inventory.senone(*event)


def test_a_label_is_the_senone_of_the_frames_event(inventory):
    phone, first = next(iter(spoken(9)))
    expected = [inventory.senone(*event) for event in frame_events(phone, first).tolist()]
    labels = inventory.label(phone, first)
    assert labels.tolist() == expected
    assert labels.dtype == np.int32
    assert inventory.label([], []).shape == (0,)


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


# -- phones with stress and place in the word --------------------------------------------------------------------

MARKED = (
    "SIL",
    *(f"{base}{mark}_{place}" for base in ("AE", "IY", "OW", "UH") for mark in "01" for place in "BIES"),
    *(f"{base}_{place}" for base in ("K", "M", "N", "S", "T", "Z") for place in "BIES"),
)
NASALS = ("M", "N")


def marked_words(seed, num_words=2000):
    """One utterance of words of one to four marked phones, each phone of two frames, with silence now and then."""
    generator = np.random.default_rng(seed)
    at = {place: [i for i, name in enumerate(MARKED, 1) if name.endswith("_" + place)] for place in "BIES"}
    phones = [1]
    for number, length in enumerate(generator.integers(1, 5, num_words)):
        phones += [1] if number % 20 == 0 else []
        phones += [
            generator.choice(at[place]) for place in ("S" if length == 1 else "B" + "I" * (length - 2) + "E")
        ]
    return np.repeat([*phones, 1], 2), np.tile([True, False], len(phones) + 1)


def marked_statistics(utterance, emit, seed=0):
    generator = np.random.default_rng([seed, 9])
    phone, first = utterance
    means = np.array([emit(*event) for event in frame_events(phone, first).tolist()])
    statistics = Statistics(len(MARKED), means.shape[1])
    statistics.accumulate(means + 0.3 * generator.normal(size=means.shape), phone, first)
    return statistics


def base_number(phone):
    return next((n for n, ids in enumerate(variants(MARKED).values(), 1) if phone in ids), 0)


def true_class(left, centre, right, state):
    """Vowels: their stress, and at first whether a nasal is before them; consonants: whether they begin a word."""
    name, before = MARKED[centre - 1], MARKED[left - 1] if left else ""
    if centre == 1:
        return ("SIL", state)
    if stress(name):
        return (base_number(centre), state, stress(name), state == 0 and before.startswith(NASALS))
    return (base_number(centre), state, place_in_word(name) in "BS")


def emit_marked(*event):
    kind = true_class(*event)
    if kind[0] == "SIL":
        return [-20.0, kind[1], 0.0, 0.0]
    position = 5.0 * kind[0] + 30 * (MARKED[event[1] - 1].startswith(NASALS))
    return [position, 3.0 * kind[1], 2.0 * float(kind[2]), 2.0 * float(kind[-1] if len(kind) == 4 else 0)]


@pytest.fixture(scope="module")
def marked():
    """With only those questions left that the truth asks: 3 s of frames for each class."""
    statistics = marked_statistics(marked_words(0), emit_marked)
    return build(statistics, MARKED, Senones(target=500, min_count=10, min_gain=60.0))


def test_a_tying_by_stress_place_in_the_word_and_neighbours_is_recovered_from_shared_roots(marked):
    phone, first = marked_words(1)
    events = frame_events(phone, first)
    pairs = {
        (true_class(*event), senone)
        for event, senone in zip(events.tolist(), marked.label(phone, first).tolist())
    }
    assert len(pairs) == len({kind for kind, _ in pairs}) == marked.num_senones == 2 + 4 * 6 + 6 * 4


def test_variants_of_a_base_phone_share_a_root_for_each_state(marked):
    roots = {base: {marked.roots[i - 1] for i in ids} for base, ids in variants(MARKED).items()}
    assert {len(several) for several in roots.values()} == {1}
    assert len(set.union(*roots.values())) == len(roots)
    assert marked.provenance["roots"] == 2 * (len(roots) + 1)
    apart = build(
        marked_statistics(marked_words(0), emit_marked), MARKED, Senones(min_count=10, shared_roots="phone")
    )
    assert apart.provenance["roots"] == 2 * len(MARKED)
    assert len(set(apart.roots)) == len(MARKED)


def test_a_variant_that_was_never_heard_has_the_senones_of_its_kin():
    phone, first = marked_words(0)
    silent = MARKED.index("AE1_B") + 1
    phone = np.where(phone == silent, MARKED.index("AE1_I") + 1, phone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inventory = build(
            marked_statistics((phone, first), emit_marked),
            MARKED,
            Senones(target=500, min_count=10, min_gain=60.0),
        )
    assert inventory.provenance["roots"] == 22  # rare is what a base phone is, not a variant
    others = np.arange(len(MARKED) + 1)
    for state in (0, 1):
        events = [np.stack(np.broadcast_arrays(others, MARKED.index(name) + 1, 1, state), axis=1)
                  for name in ("AE1_B", "AE1_I", "AE0_B")]  # fmt: skip
        unheard, kin, unstressed = (inventory.senones(rows) for rows in events)
        np.testing.assert_array_equal(unheard, kin)
        assert not set(unheard) & set(unstressed)


def test_questions_that_are_given_are_the_only_ones_asked():
    statistics = marked_statistics(marked_words(0), emit_marked)
    vowels = tuple(i for i, name in enumerate(MARKED, 1) if stress(name))
    questions = [(0,), vowels]
    inventory = build(statistics, MARKED, Senones(min_count=10, min_gain=0.0, target=60), questions)
    assert set(inventory.questions) <= set(questions)
    assert inventory.num_senones > 22


@pytest.fixture(scope="module")
def many_phones():
    """160 phones and silence, with place in the word and stress, from a random tying."""
    bases = [f"V{letter}" for letter in "ABCDEFGH"], [f"C{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWX"]
    phones = ("SIL", *(f"{b}{mark}_{p}" for b in bases[0] for mark in "01" for p in "BIES"),
              *(f"{b}_{p}" for b in bases[1] for p in "BIES"))  # fmt: skip
    generator = np.random.default_rng(3)
    means = 2 * generator.normal(size=(3, len(phones) + 1, 4))
    phone = generator.integers(1, len(phones) + 1, 60_000)
    statistics = Statistics(len(phones), 4)
    values = means[0, np.pad(phone, 1)[:-2]] + means[1, phone] + means[2, np.pad(phone, 1)[2:]]
    statistics.accumulate(values + generator.normal(size=values.shape), phone, np.ones(len(phone), bool))
    return build(statistics, phones, Senones(target=1000, min_count=20, min_gain=1.0))


def test_every_one_of_four_million_triphones_has_a_senone(many_phones):
    num_phones, num_senones = len(many_phones.phones), many_phones.num_senones
    assert num_phones > 160
    assert num_phones**3 > 4e6
    contexts = np.arange(num_phones + 1)
    left, right, state = (grid.ravel() for grid in np.meshgrid(contexts, contexts, [0, 1], indexing="ij"))
    seen, total = np.zeros(num_senones, np.int64), 0
    for centre in range(1, num_phones + 1):
        events = np.stack([left, np.full_like(left, centre), right, state], axis=1)
        senones = many_phones.senones(events)
        assert 0 <= senones.min() <= senones.max() < num_senones
        seen += np.bincount(senones, minlength=num_senones)
        total += len(senones)
    assert total == seen.sum() == 2 * num_phones * (num_phones + 1) ** 2
    assert num_senones > 300
    assert (seen > 0).all()
