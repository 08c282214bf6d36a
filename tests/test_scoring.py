import itertools
import math
import statistics
import sys

import kaldialign
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.decoding.scoring import _matched_pairs, compare, count_errors, score

words = st.lists(st.sampled_from("abc"), max_size=6)


def edit_distance(reference, hypothesis):
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        before, row = row, [i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
    return row[-1]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(words, words), max_size=5))
def test_errors_are_the_edit_distance_and_account_for_both_lengths(pairs):
    counts = count_errors([r for r, _ in pairs], [h for _, h in pairs])
    assert counts.shape == (len(pairs), 4)
    for (reference, hypothesis), (total, substitutions, insertions, deletions) in zip(pairs, counts.tolist()):
        assert total == len(reference)
        assert substitutions + insertions + deletions == edit_distance(reference, hypothesis)
        assert total - deletions + insertions == len(hypothesis)


def test_the_rate_is_over_all_words_and_not_a_mean_of_rates():
    references = [["a"], ["a", "b", "c", "d"], []]
    found = score(references, [["b"], ["a", "b", "c"], ["x"]], samples=10)
    assert (found.words, found.substitutions, found.insertions, found.deletions) == (5, 1, 1, 1)
    assert found.word_error_rate == pytest.approx(3 / 5)


def made(seed, num_utterances, error_rate):
    """References of ten words each, and hypotheses with that share substituted."""
    generator = np.random.default_rng(seed)
    references = [["w"] * 10 for _ in range(num_utterances)]
    wrong = generator.random((num_utterances, 10)) < error_rate
    return references, [["x" if is_wrong else "w" for is_wrong in row] for row in wrong]


def test_the_interval_is_that_of_an_independent_bootstrap():
    references, hypotheses = made(0, 200, 0.2)
    found = score(references, hypotheses, samples=4000)
    theirs = kaldialign.bootstrap_wer_ci(references, hypotheses, replications=2000)
    assert found.low == pytest.approx(theirs["ci95min"], abs=0.004)
    assert found.high == pytest.approx(theirs["ci95max"], abs=0.004)


def test_the_interval_holds_the_truth_about_95_times_in_100():
    held = 0
    for seed in range(200):
        found = score(*made(seed, 60, 0.2), samples=300)
        held += found.low <= 0.2 <= found.high
    assert 180 <= held <= 199


def test_an_interval_over_speakers_is_wider_when_speakers_differ():
    references, hypotheses, speakers = [], [], []
    for speaker, rate in enumerate(np.linspace(0.05, 0.5, 10)):
        some = made(speaker, 30, rate)
        references += some[0]
        hypotheses += some[1]
        speakers += [speaker] * 30
    alone, blocked = score(references, hypotheses), score(references, hypotheses, speakers)
    assert blocked.word_error_rate == alone.word_error_rate
    assert blocked.high - blocked.low > 2 * (alone.high - alone.low)


def test_a_comparison_is_paired():
    """Both systems fail on the same hard utterances: each one's rate is unsure, their difference is not."""
    references = [["w"] * 10 for _ in range(100)]
    baseline = [["x"] * 10 if hard else ["x", *["w"] * 9] for hard in np.arange(100) % 5 == 0]
    better = [["x"] * 9 + ["w"] if row[1] == "x" else row for row in baseline]
    found = compare(references, baseline, better)
    assert found.relative_reduction == pytest.approx(20 / 280)
    assert found.low > 0.04
    assert found.high < 0.1
    assert found.probability_better == 1.0
    intervals = [score(references, hypotheses) for hypotheses in (baseline, better)]
    assert intervals[0].low < intervals[1].high


def test_a_system_compared_with_itself_gains_nothing():
    references, hypotheses = made(1, 50, 0.3)
    found = compare(references, hypotheses, hypotheses)
    assert (found.relative_reduction, found.low, found.high, found.probability_better) == (0, 0, 0, 0)
    assert (found.p_value, found.matched_pairs, found.matched_pairs_p_value) == (1, 0, 1)


def test_the_matched_pairs_statistic_is_that_of_its_definition():
    references = [["w"] * 4 for _ in range(6)]
    before, after = [2, 1, 3, 0, 1, 4], [1, 1, 1, 0, 2, 1]
    hypotheses = [[["x"] * wrong + ["w"] * (4 - wrong) for wrong in counts] for counts in (before, after)]
    differences = [1, 0, 2, 0, -1, 3]
    mean = sum(differences) / 6
    variance = sum((value - mean) ** 2 for value in differences) / 5
    found = compare(references, *hypotheses)
    assert found.matched_pairs == pytest.approx(mean / math.sqrt(variance / 6))
    flipped = [
        sum(sign * value for sign, value in zip(signs, differences))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    as_far = sum(abs(value) >= abs(sum(differences)) for value in flipped)
    assert found.matched_pairs_p_value == pytest.approx(as_far / len(flipped)) == 24 / 64
    other_way = compare(references, *hypotheses[::-1])
    assert other_way.matched_pairs == -found.matched_pairs
    assert other_way.p_value == pytest.approx(found.p_value)


def differing(differences):
    """References of four words, and two systems whose word errors differ by so many in each utterance."""
    references = [["w"] * 4 for _ in differences]
    return references, *(
        [["x"] * max(0, sign * value) + ["w"] * (4 - max(0, sign * value)) for value in differences]
        for sign in (1, -1)
    )


def test_a_few_blocks_that_agree_are_no_certainty():
    assert compare(*differing([2])).matched_pairs_p_value == 1
    assert compare(*differing([2, 2])).matched_pairs_p_value == pytest.approx(0.5)
    assert compare(*differing([1, 3, 0, 0])).matched_pairs_p_value == pytest.approx(0.5)
    assert compare(*differing([1] * 5)).matched_pairs_p_value == pytest.approx(2 / 2**5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9).filter(any))
def test_the_p_value_is_the_share_of_signs_that_bring_as_much(differences):
    flipped = [
        abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    share = np.mean(np.array(flipped) >= abs(sum(differences)))
    assert _matched_pairs(np.array(differences))[1] == pytest.approx(share)


def test_with_many_blocks_the_p_value_is_that_of_the_normal_distribution():
    draw = np.random.default_rng(3)
    for mean in (0.0, 0.02, 0.05):
        differences = np.rint(draw.normal(mean, 1.2, 4000)).astype(int)
        statistic, p_value = _matched_pairs(differences)
        assert p_value == pytest.approx(2 * statistics.NormalDist().cdf(-abs(statistic)), abs=0.01)
    assert _matched_pairs(np.ones(2000, int)) == (math.inf, pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("num_blocks", [2, 3, 5, 8, 12])
def test_with_few_blocks_equal_systems_are_not_called_different_more_often_than_the_level_says(num_blocks):
    draw = np.random.default_rng([7, num_blocks])
    values = [_matched_pairs(np.diff(draw.binomial(50, 0.2, (num_blocks, 2)))[:, 0])[1] for _ in range(800)]
    for level in (0.05, 0.1, 0.3):
        share = np.mean(np.array(values) <= level)
        assert share <= level + 3 * math.sqrt(level * (1 - level) / 800)
        if num_blocks >= 8:  # with fewer, the p-values are too few to come near the level
            assert share >= 0.6 * level


def test_equal_systems_are_called_different_about_as_often_as_the_level_says():
    called = [0, 0]
    for seed in range(200):
        references, first = made(seed, 60, 0.2)
        _, second = made(seed + 10_000, 60, 0.2)
        found = compare(references, first, second, samples=300)
        called[0] += found.p_value < 0.1
        called[1] += found.matched_pairs_p_value < 0.1
    assert all(8 <= times <= 36 for times in called)  # 20 expected, ± 4 standard deviations


def test_a_clear_difference_has_a_small_p_value():
    references, worse = made(0, 100, 0.4)
    _, better = made(1, 100, 0.1)
    found = compare(references, worse, better)
    assert found.p_value < 0.01
    assert found.matched_pairs > 3


def test_a_perfect_baseline_cannot_be_improved():
    references, worse = made(2, 20, 0.5)
    assert compare(references, references, worse).relative_reduction == -np.inf
    assert compare(references, references, references).relative_reduction == 0
    assert compare(references, worse, references).relative_reduction == 1


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    data = made(3, 40, 0.3)
    assert score(*data, seed=1) == score(*data, seed=1)
    assert score(*data, seed=1, samples=50) != score(*data, seed=2, samples=50)


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(ValueError, match="got 1 hypotheses for 2 references"):
        count_errors([["a"], ["b"]], [["a"]])
    with pytest.raises(ValueError, match="no reference words"):
        score([[]], [["a"]])
    with pytest.raises(ValueError, match="got 1 blocks for 2 utterances"):
        score([["a"], ["b"]], [["a"], ["b"]], blocks=["s"])


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldialign", None)
    with pytest.raises(ValueError, match=r"pip install 'teacherstudent\[decode\]'"):
        count_errors([["a"]], [["a"]])
